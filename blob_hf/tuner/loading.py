"""From a model to the files of an adapter, and from the files into a model: each step once, downwards."""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from blob_hf.tuner import adapter_names
from blob_hf.tuner.adapter_files import SavedAdapter
from blob_hf.tuner.base_model import (
    class_names,
    has_task_head,
    head_parameters,
    is_resized,
    name_classes,
    saved_class_names,
)
from blob_hf.tuner.config import BlobConfig, changes_base
from blob_hf.tuner.layer import GaussianA, std_to_save
from blob_hf.tuner.posterior import gaussian_layers, lora_layers
from blob_hf.tuner.stacks import in_last_layers
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import gathered

logger = logging.getLogger(__name__)

_RHO = ".rho"  # GaussianA keeps rho next to lora_A's weight
_MEAN = ".weight"
_A = ".lora_A.weight"


def is_beside(name: str) -> bool:
    """Whether a tensor is what a layer in the place of A or B has beside its weight: PEFT's file does not hold it."""
    return (".lora_A." in name or ".lora_B." in name) and not name.endswith((_MEAN, ".bias"))


# ----- saving ----------------------------------------------------------------------------------------------------


def adapter_tensors(
    model: PeftModel,
    adapter: str,
    head: Mapping[str, Tensor],
    state_dict: dict[str, Tensor] | None = None,
    save_embeddings: str | bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What adapter_model.safetensors and posterior_std.safetensors hold.

    Args:
        head: The frozen head under LoRA, by name (see `frozen_head`).
        state_dict: Gathered weights, where an engine has sharded the model's own.
        save_embeddings: "auto" saves token embeddings that are resized; True saves them, False does not.
    """
    weights = adapter_names.own_tensors(model, adapter, state_dict)
    rhos = {name.removesuffix(_RHO) + _MEAN: weights.pop(name) for name in list(weights) if name.endswith(_RHO)}
    config: Any = model.peft_config[adapter]
    parameterization = config.std_parameterization if isinstance(config, BlobConfig) else ""
    weights = {name: value for name, value in weights.items() if not is_beside(name)}
    if isinstance(config, BlobConfig):
        _require_stds(weights, rhos, in_last_layers(model, config.posterior_layers))
    embeddings = _embeddings_to_save(model, config, state_dict, save_embeddings)
    if (head or embeddings) and is_merged(model):
        raise BlobError(
            "the adapter is merged into base weights that are saved with it (a head, embeddings): "
            "unmerge_adapter() first"
        )
    return {**head, **embeddings, **weights}, {name: std_to_save(rho, parameterization) for name, rho in rhos.items()}


def _require_stds(weights: Mapping[str, Tensor], rhos: Mapping[str, Tensor], needed: Callable[[str], bool]) -> None:
    lost = [name for name in weights if name.endswith(_A) and name not in rhos and needed(name.removesuffix(_A))]
    if lost:
        raise BlobError(
            f"{lost[0]} has no std any more ({len(lost)} layers): something has put a plain layer in the place of the "
            "Gaussian A; bayesianize(model) gives it one"
        )


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is merged into the base weights."""
    return any(isinstance(module, LoraLayer) and module.merged for module in model.modules())


def _embeddings_to_save(
    model: PeftModel, config: LoraConfig, state_dict: Mapping[str, Tensor] | None, wanted: str | bool
) -> dict[str, Tensor]:
    if wanted not in (True, False, "auto"):
        raise BlobError(f"save_embedding_layers must be True, False or 'auto', got {wanted!r}")
    resized = wanted == "auto" and is_resized(model.get_base_model(), config)
    if not (resized or wanted is True):
        return {}
    embeddings = adapter_names.embedding_tensors(model, state_dict)
    if resized:
        logger.info("the token embeddings were resized: all of them are saved with the adapter")
    elif not embeddings:
        logger.warning("save_embedding_layers: %s has no token embeddings", type(model.get_base_model()).__name__)
    return embeddings


def warn_of_changed_base(configs: Mapping[str, PeftConfig]) -> None:
    """Say that an adapter whose initialisation changes the base model's weights is beside another one."""
    changing = [name for name, config in configs.items() if changes_base(config)]
    if changing and len(configs) > 1:
        name, init = changing[0], getattr(configs[changing[0]], "init_lora_weights", None)
        warnings.warn(
            f"adapter {name!r} has init_lora_weights={init!r}, which changes the base model's weights, under "
            f"{', '.join(key for key in configs if key != name)}, too: adapters beside it are not what they are on a "
            "base model of their own; use init_lora_weights=True for adapters that share a base model",
            stacklevel=3,
        )


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
    if isinstance(dtype := getattr(base, "dtype", None), torch.dtype):
        mapping["dtype"] = str(dtype).removeprefix("torch.")
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


def as_named_here(model: PeftModel, saved: SavedAdapter, adapter: str) -> SavedAdapter:
    """A saved adapter with the names of its tensors as the installed transformers calls the model's modules."""
    std = saved.std and adapter_names.as_in_this_transformers(model, adapter, saved.std)
    return replace(saved, mean=adapter_names.as_in_this_transformers(model, adapter, saved.mean), std=std)


def with_key_mapping(saved: SavedAdapter, key_mapping: dict[str, str] | None) -> SavedAdapter:
    """A saved adapter with its tensors renamed as the caller says (see `adapter_names.renamed`)."""
    std = saved.std and adapter_names.renamed(saved.std, key_mapping)
    return replace(saved, mean=adapter_names.renamed(saved.mean, key_mapping), std=std, key_mapping=key_mapping)


def resize_vocabulary(base: Any, saved: SavedAdapter) -> None:
    """Give a base model as many token embeddings as an adapter was saved with."""
    size, own = adapter_names.saved_vocabulary_size(base, saved.mean), adapter_names.vocabulary_size(base)
    if size is not None and size != own:
        logger.info("%s was saved with %d token embeddings, the base model has %s: resized", saved.folder, size, own)
        base.resize_token_embeddings(size, mean_resizing=False)  # the adapter has all of them


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
    if missing := head_parameters(model).keys() - saved.mean.keys():
        logger.warning(
            "%s does not hold the head under its LoRA (%s ...): the head stays as it is in the base model, for a "
            "pretrained encoder that is at random",
            saved.folder,
            min(missing),
        )
    result: Any
    with gathered(list(head_parameters(model).values()), write=True):
        if _is_offloaded(model):  # PEFT then spreads the model anew, and reads the file once more for it
            result = PeftModel.load_adapter(
                model, str(saved.folder), adapter, is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype, key_mapping=saved.key_mapping,
            )  # fmt: skip
        else:
            absent = adapter_names.absent_parameters(model, adapter)
            tensors = {**saved.mean, **dict.fromkeys(absent, torch.empty(0))}
            result = set_peft_model_state_dict(
                model, tensors, adapter_name=adapter, low_cpu_mem_usage=low_cpu_mem_usage
            )
            result.unexpected_keys[:] = [key for key in result.unexpected_keys if key not in absent.values()]
            tuner: Any = model.base_model
            tuner._cast_adapter_dtype(adapter_name=adapter, autocast_adapter_dtype=autocast_adapter_dtype)
    own = {name for name in adapter_names.own_parameters(model, adapter).values() if not is_beside(name)}
    result.missing_keys[:] = [key for key in result.missing_keys if key in own]
    if result.unexpected_keys:
        logger.warning(
            "%s has weights for which this model has no place, they are ignored: %s ... (%d)",
            saved.folder, min(result.unexpected_keys), len(result.unexpected_keys),
        )  # fmt: skip
    _leave_meta(model, adapter)
    _fill_std(model, saved, adapter)
    return result


def _leave_meta(model: PeftModel, adapter: str) -> None:
    """Give every Gaussian A that was made without memory (`low_cpu_mem_usage`) a rho on its mean's device."""
    config = model.peft_config[adapter]
    for _, module in lora_layers(model, adapter):
        layer = module.lora_A[adapter]
        if isinstance(layer, GaussianA) and isinstance(config, BlobConfig) and layer.rho.is_meta:
            made = GaussianA(layer, layer.name, config.init_eps, config.std_parameterization, config.noise)
            made.weight_name = layer.weight_name
            module.lora_A[adapter] = made


def _is_offloaded(model: PeftModel) -> bool:
    devices = getattr(model, "hf_device_map", None) or {}
    return bool({"cpu", "disk"} & {str(device) for device in devices.values()}) and len(model.peft_config) == 1


def _fill_std(model: PeftModel, saved: SavedAdapter, adapter: str) -> None:
    layers = gaussian_layers(model, adapter)
    if layers and saved.std is None:
        logger.warning("%s is a plain LoRA adapter: its posterior std comes from BlobConfig, untrained", saved.folder)
    elif saved.std is not None:
        if missing := sorted({layer.weight_name for layer in layers.values()} - saved.std.keys()):
            raise BlobError(f"{saved.folder} has no stds for {missing[0]}, which is one of its posterior_layers")
        for layer in layers.values():
            layer.set_std(saved.std[layer.weight_name])
