"""From a network to a `BlobModel`: with a fresh adapter, around a trained one, or of the modules that PEFT has made."""

import os
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import nn
from transformers import PreTrainedModel

from blob_hf.tuner import adapter_files, posterior
from blob_hf.tuner.base_model import check_targets, targets_head
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.injection import remove_layers
from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError


def _task_classes() -> dict[type[PeftModel], type[BlobModel]]:
    """A `BlobModel` for every task class that PEFT has: `BlobModelForSequenceClassification`, ..."""
    classes: dict[type[PeftModel], type[BlobModel]] = {PeftModel: BlobModel}
    for task, peft_class in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items():
        name = peft_class.__name__.replace("PeftModel", "BlobModel")
        body = {"__doc__": f"`BlobModel` for task_type {task}.", "__module__": __name__}
        classes[peft_class] = type(name, (BlobModel, peft_class), body)
    return classes


_CLASSES = _task_classes()
globals().update({kind.__name__: kind for kind in _CLASSES.values()})  # for pickle, which looks them up by name


def task_class_names() -> dict[str, str]:
    """Names of the classes of `BlobModel` by those of PEFT that they stand for."""
    return {peft_class.__name__: own.__name__ for peft_class, own in _CLASSES.items()}


def get_blob_model(model: PreTrainedModel, config: BlobConfig, adapter_name: str = "default") -> BlobModel:
    """Put a fresh BLoB adapter on a model: the counterpart of `peft.get_peft_model`.

    With task_type SEQ_CLS, PEFT trains the classification head in full. When `target_modules` names layers *of the
    head*, as the paper does, the head instead stays frozen under its LoRA and is saved with the adapter.

    Args:
        model: Base model, changed in place.
        config: LoRA and posterior settings.

    Raises:
        BlobError: config is not a `BlobConfig`, or its target_modules match nothing.
    """
    if not isinstance(config, BlobConfig):
        raise BlobError(f"get_blob_model needs a BlobConfig, got {type(config).__name__}")
    lora = config.to_lora()  # whose A are drawn like plain LoRA's, before any std
    blob_model = get_lora_model(model, lora, adapter_name)
    try:
        return bayesianize(blob_model, config, adapter_name)
    except BlobError:
        remove_layers(blob_model, adapter_name)
        raise


def get_lora_model(
    model: PreTrainedModel,
    config: LoraConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> BlobModel:
    """A plain LoRA model with all else as in `get_blob_model`, the head's treatment and saving included.

    For comparing BLoB with LoRA. It has no posterior until `bayesianize`.

    Args:
        autocast_adapter_dtype, low_cpu_mem_usage: See `BlobModel.from_pretrained`.

    Raises:
        BlobError: target_modules match nothing.
    """
    if targets_head(model, config):
        config.task_type = None
    check_targets(model, config)
    memory = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
    try:
        peft_model: Any = get_peft_model(model, config, adapter_name, **memory)  # type: ignore[call-overload]
    except Exception:
        remove_layers(model, adapter_name)
        raise
    return as_blob_model(peft_model)


def bayesianize(peft_model: PeftModel, config: BlobConfig | None = None, adapter_name: str | None = None) -> BlobModel:
    """Turn a (trained) plain LoRA adapter into a posterior around it, in the modules that it has.

    The adapter's A becomes the posterior mean, B and every LoRA setting stay; of `config` only the posterior's
    fields are used (`prior_std`, `init_eps`, `std_parameterization`, `noise`).

    Args:
        peft_model: From `get_peft_model` or `PeftModel.from_pretrained(..., is_trainable=True)`.
        config: Posterior settings, default `BlobConfig()`.
        adapter_name: Default: the active adapter.

    Returns:
        A `BlobModel` of the same modules; go on with it in the place of `peft_model`, which can no longer be saved.

    Raises:
        BlobError: Not a PEFT model, or the adapter is not plain LoRA on linear layers.
    """
    if not isinstance(peft_model, PeftModel):
        raise BlobError(f"bayesianize needs a PeftModel with a LoRA adapter, got {type(peft_model).__name__}")
    adapter = adapter_name or peft_model.active_adapter
    if adapter not in peft_model.peft_config:
        raise BlobError(f"no adapter named {adapter!r}; this model has {', '.join(peft_model.peft_config)}")
    lora: Any = peft_model.peft_config[adapter]
    if lora.peft_type != PeftType.LORA:
        raise BlobError(f"bayesianize needs a LoRA adapter, but {adapter!r} is {lora.peft_type.value}")
    blob_config = BlobConfig.from_lora(lora, config)
    posterior.attach_posterior(peft_model, blob_config, adapter)
    peft_model.peft_config[adapter] = blob_config
    return as_blob_model(peft_model)


def load_lora(base: PreTrainedModel, folder: str | os.PathLike[str], is_trainable: bool = False) -> BlobModel:
    """Load a plain LoRA adapter as what it is: `BlobModel.from_pretrained` would give it a posterior."""
    saved = adapter_files.read(Path(folder))
    config = saved.config.to_lora() if isinstance(saved.config, BlobConfig) else saved.config
    config.inference_mode = not is_trainable
    model = get_lora_model(base, config)
    model._fill(saved, "default", is_trainable)
    return model


def _refuse_to_save(*args: object, **kwargs: object) -> None:
    """In the place of PEFT's, which would write stds among the weights, or none."""
    raise BlobError("this PEFT model has become a BlobModel: save the one that bayesianize returned")


def as_blob_model(peft_model: PeftModel) -> BlobModel:
    """A `BlobModel` of the same modules, with our saving and loading; it has no posterior by that."""
    if isinstance(peft_model, BlobModel):
        return peft_model
    kind = _CLASSES[type(peft_model)]
    model = kind.__new__(kind)
    model.__dict__.update(peft_model.__dict__)  # modules, hooks and settings are shared, nothing is made twice
    model.companions, model.adapter_heads, model.folders, model.tokenizers = {}, {}, {}, {}
    peft_model.save_pretrained = _refuse_to_save  # type: ignore[method-assign]
    model.remember_head()
    return model


def adopted(model: nn.Module) -> nn.Module:
    """A LoRA model of PEFT with our saving and loading; any other model stays as it is."""
    is_lora = isinstance(model, PeftModel) and str(getattr(model.peft_type, "value", model.peft_type)) == "LORA"
    return as_blob_model(model) if is_lora else model  # type: ignore[arg-type]
