"""Which tensors of a PEFT model belong to an adapter, and what its files call them.

Found by structure. PEFT's own saving looks for `.{adapter}.` in names, and takes an adapter "0" beside another one for
the number of a layer: the other is then saved without that layer.
"""

import re
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn

from blob_hf.tuner.posterior import lora_layers
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor

_PREFIX = "base_model.model."
_FSDP = "_fsdp_wrapped_module."
_INNER = ("", ".base_layer", ".original_module", ".token_adapter.base_layer")  # where PEFT keeps what it wraps


def own_parameters(model: PeftModel, adapter: str) -> dict[str, str]:
    """Names in the model of what is an adapter's own, by the names that its files have for them.

    LoRA's matrices (the rho of a Gaussian A among them), `modules_to_save` and trainable tokens.
    """
    return _parameters(model, adapter)[0]


def absent_parameters(model: PeftModel, adapter: str) -> dict[str, str]:
    """What PEFT looks for in the files of an adapter although it has none: the trained tokens of another one."""
    return _parameters(model, adapter)[1]


def _parameters(model: PeftModel, adapter: str) -> tuple[dict[str, str], dict[str, str]]:
    # not model.state_dict(): of an FSDP2 model it is for all processes, and only one of them saves
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    names: dict[str, str] = {}
    absent: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for part in module.adapter_layer_names:
                weights = getattr(module, part, None)
                if isinstance(weights, nn.ParameterDict) and adapter in weights:
                    names[f"{path}.{part}"] = f"{path}.{part}.{adapter}"
                elif isinstance(weights, nn.ModuleDict) and adapter in weights:
                    for key, _ in weights[adapter].named_parameters():
                        names[f"{path}.{part}.{key}"] = f"{path}.{part}.{adapter}.{key}"
        elif isinstance(module, AuxiliaryTrainingWrapper):
            for saved, own in module.adapter_state_dict_load_map(adapter).items():
                there = names if f"{path}.{own}" in known else absent
                there[f"{path}.{saved}"] = f"{path}.{own}"
    return names, absent


def own_tensors(model: PeftModel, adapter: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """An adapter's own tensors, and the biases of the base model that it has trained, by their names in its files.

    Args:
        state_dict: Gathered weights, where an engine has sharded the model's own.
    """
    state = model.state_dict() if state_dict is None else state_dict
    names = {**own_parameters(model, adapter), **_biases(model, adapter, state)}
    missing = [own for own in names.values() if own.replace(_FSDP, "") not in state and own not in state]
    if missing:
        raise BlobError(
            f"the state_dict to save has no {missing[0]} of adapter {adapter!r} ({len(missing)} are missing); "
            "under ZeRO-3 set stage3_gather_16bit_weights_on_model_save"
        )
    return {
        saved.replace(_FSDP, ""): full_tensor(state[own] if own in state else state[own.replace(_FSDP, "")])
        for saved, own in names.items()
    }


def _biases(model: PeftModel, adapter: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The base model's biases that are trained with an adapter (`bias` is "all" or "lora_only")."""
    config: LoraConfig = model.peft_config[adapter]  # type: ignore[assignment]
    if config.bias == "none":
        return {}
    if config.bias == "all":
        adapters = {own for name in model.peft_config for own in own_parameters(model, name).values()}
        return {name: name for name in state if name.endswith(".bias") and name not in adapters}
    return {name: name for path, _ in lora_layers(model, adapter) if (name := f"{path}.base_layer.bias") in state}


def embedding_tensors(model: PeftModel, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The base model's token embeddings, input and output, by their names in the files of an adapter."""
    state = model.state_dict() if state_dict is None else state_dict
    return {name: full_tensor(state[name]) for name in embedding_names(model) if name in state}


def embedding_names(model: PeftModel) -> list[str]:
    """Names that parameters of the token embeddings, input and output, have in the model if it has them."""
    base = model.get_base_model()
    layers = {id(layer) for layer in _embeddings(base)}
    paths = [path for path, module in base.named_modules() if id(module) in layers]
    return [f"{_PREFIX}{path}{inner}.{kind}" for path in paths for inner in _INNER for kind in ("weight", "bias")]


def _embeddings(base: nn.Module) -> list[nn.Module]:
    layers = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layers.append(getattr(base, getter)())
        except (AttributeError, NotImplementedError):
            continue  # no transformers model, or one without token embeddings
    return [layer for layer in layers if layer is not None]


def vocabulary_size(base: nn.Module) -> int | None:
    """Rows of a model's token embeddings."""
    layer = next(iter(_embeddings(base)), None)
    weight = getattr(layer, "weight", None)
    return None if weight is None else int(getattr(weight, "ds_shape", weight.shape)[0])


def saved_vocabulary_size(base: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """Rows of the token embeddings among an adapter's tensors; None if it has none."""
    layers = {id(layer) for layer in _embeddings(base)[:1]}
    for path, module in base.named_modules():
        if id(module) in layers:
            for inner in _INNER:
                if (found := tensors.get(f"{_PREFIX}{path}{inner}.weight")) is not None:
                    return int(found.shape[0])
    return None


# ----- names of earlier versions of a model ----------------------------------------------------------------------


def renamed(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Tensors by other names, as PEFT does it: the first pattern in a name, less PEFT's prefix, is replaced."""
    return {_rename(name, key_mapping or {}): tensor for name, tensor in tensors.items()}


def _rename(name: str, key_mapping: Mapping[str, str]) -> str:
    prefix = _PREFIX if name.startswith(_PREFIX) else ""
    inner = name.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        try:
            inner, count = re.subn(pattern, replacement, inner)
        except re.error as error:
            raise BlobError(
                f"key_mapping: {pattern!r} -> {replacement!r} is no regular expression ({error})"
            ) from error
        if count:
            break
    return prefix + inner


def as_in_this_transformers(model: PeftModel, adapter: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an adapter by the names that the model's modules have in the installed transformers.

    Its loading of checkpoints knows the earlier names of many models, and so does PEFT's of adapters.
    """
    with torch.no_grad():
        return dict(
            convert_peft_adapter_state_dict_for_transformers(model, model.peft_config[adapter], dict(tensors), adapter)
        )
