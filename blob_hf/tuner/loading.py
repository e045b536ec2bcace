"""From a model to the files of an adapter, and from the files into a model: each step once, downwards."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from blob_hf.tuner import adapter_files
from blob_hf.tuner.adapter_files import SavedAdapter
from blob_hf.tuner.base_model import class_names, has_task_head, head_parameters, name_classes, saved_class_names
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.layer import std_to_save
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.utils.sharding import gathered

logger = logging.getLogger(__name__)

_RHO = ".rho"  # GaussianA keeps rho next to lora_A's weight
_MEAN = ".weight"


def _is_beside(name: str) -> bool:
    """Whether a tensor is what a layer in the place of A or B has beside its weight: PEFT's file does not hold it."""
    return (".lora_A." in name or ".lora_B." in name) and not name.endswith((_MEAN, ".bias"))


# ----- saving ----------------------------------------------------------------------------------------------------


def adapter_tensors(
    model: PeftModel,
    adapter: str,
    head: Mapping[str, Tensor],
    state_dict: dict[str, Tensor] | None = None,
    save_embeddings: Any = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What adapter_model.safetensors and posterior_std.safetensors hold.

    Args:
        head: The frozen head under LoRA, by name (see `frozen_head`).
        state_dict: Gathered weights, where an engine has sharded the model's own.
    """
    weights = get_peft_model_state_dict(model, state_dict, adapter, save_embedding_layers=save_embeddings)
    rhos = {name.removesuffix(_RHO) + _MEAN: weights.pop(name) for name in list(weights) if name.endswith(_RHO)}
    config = model.peft_config[adapter]
    parameterization = config.std_parameterization if isinstance(config, BlobConfig) else ""
    weights = {name: value for name, value in weights.items() if not _is_beside(name)}
    return {**head, **weights}, {name: std_to_save(rho, parameterization) for name, rho in rhos.items()}


def frozen_head(
    model: PeftModel, snapshot: Mapping[str, Tensor], state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The frozen parameters of a task head under LoRA: no checkpoint on the Hub has them.

    Args:
        snapshot: Of `snapshot_head`, for where ZeRO-3 has sharded them since: only one rank is saving, and cannot
            gather.
    """
    head = {}
    for name, parameter in head_parameters(model).items():
        if state_dict is not None and name in state_dict:
            head[name] = state_dict[name]
        else:
            head[name] = snapshot[name] if hasattr(parameter, "ds_id") else parameter.detach()
    return head


def snapshot_head(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the frozen head on the CPU (called on every process)."""
    parameters = head_parameters(model)
    with gathered(list(parameters.values())):
        return {name: value.detach().cpu().clone() for name, value in parameters.items()}


def save_config(model: PeftModel, config: LoraConfig, folder: Path, is_active: bool = True) -> None:
    """adapter_config.json, which also names the class of the base model, and a classifier's classes, for loading.

    Args:
        is_active: Whether the names that the base model's configuration has are this adapter's.
    """
    base: Any = model.get_base_model()
    mapping: dict[str, Any] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    # AutoPeftModel ignores the rest; our from_pretrained does not
    mapping["dtype"] = str(base.dtype).removeprefix("torch.")
    if has_task_head(base):
        mapping["num_labels"] = base.config.num_labels
        if (names := (None if is_active else saved_class_names(config)) or class_names(base)) is not None:
            mapping["id2label"] = {str(index): name for index, name in enumerate(names)}
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None)
    inference_mode, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder), auto_mapping_dict=mapping)
    finally:
        config.inference_mode = inference_mode


# ----- loading ---------------------------------------------------------------------------------------------------


def check_fits(model: PeftModel, saved: SavedAdapter, adapter: str) -> None:
    """Check that a model has room for an adapter, before anything is copied.

    Raises:
        BlobError: Another base model, number of classes or rank.
    """
    adapter_files.check_fits(saved.mean, _shapes(model, adapter), saved.folder, saved.config)


def _shapes(model: PeftModel, adapter: str) -> dict[str, tuple[int, ...]]:
    """Shapes of what loading fills, by the names in adapter_model.safetensors."""
    own = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and f".{adapter}." in name and not _is_beside(name):
            own[name.replace(f".{adapter}.", ".")] = parameter
        elif f".modules_to_save.{adapter}." in name:
            own[name.replace(f".modules_to_save.{adapter}.", ".")] = parameter
    every = {**own, **head_parameters(model)}
    return {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in every.items()}


def restore_class_names(model: PeftModel, saved: SavedAdapter) -> None:
    """Call the classes of a base model as the adapter was saved with; names that the base model has already stay."""
    names, base = saved_class_names(saved.config), model.get_base_model()
    if names is None:
        return
    own = class_names(base)
    if own is None:
        name_classes(base, names)
    elif own != names:
        logger.warning(
            "%s calls its classes %s, but the base model's configuration %s: that stays (id2label)",
            saved.folder, ", ".join(names[:10]), ", ".join(own[:10]),
        )  # fmt: skip


def fill(
    model: PeftModel,
    saved: SavedAdapter,
    adapter: str,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Copy the weights of a saved adapter that fits into the model's adapter of this name.

    Returns:
        PEFT's missing and unexpected keys.
    """
    with gathered(list(head_parameters(model).values()), write=True):
        if _is_offloaded(model):  # PEFT then spreads the model anew, and reads the file once more for it
            result = PeftModel.load_adapter(
                model, str(saved.folder), adapter, is_trainable, autocast_adapter_dtype=autocast_adapter_dtype
            )
        else:
            result = set_peft_model_state_dict(
                model, dict(saved.mean), adapter_name=adapter, low_cpu_mem_usage=low_cpu_mem_usage
            )
            tuner: Any = model.base_model
            tuner._cast_adapter_dtype(adapter_name=adapter, autocast_adapter_dtype=autocast_adapter_dtype)
    result.missing_keys[:] = [
        key for key in result.missing_keys if "lora_" in key and f".{adapter}." in key and not _is_beside(key)
    ]
    _fill_std(model, saved, adapter)
    if missing := head_parameters(model).keys() - saved.mean.keys():
        logger.warning(
            "%s does not hold the head under its LoRA (%s ...): the head stays as it is in the base model, for a "
            "pretrained encoder that is at random",
            saved.folder,
            min(missing),
        )
    return result


def _is_offloaded(model: PeftModel) -> bool:
    devices = getattr(model, "hf_device_map", None) or {}
    return bool({"cpu", "disk"} & {str(device) for device in devices.values()}) and len(model.peft_config) == 1


def _fill_std(model: PeftModel, saved: SavedAdapter, adapter: str) -> None:
    layers = gaussian_layers(model, adapter)
    if layers and saved.std is None:
        logger.warning("%s is a plain LoRA adapter: its posterior std comes from BlobConfig, untrained", saved.folder)
    elif saved.std is not None:
        for layer in layers.values():
            layer.set_std(saved.std[layer.weight_name])
