"""What of an adapter is refused before the model that loads it is touched."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from blob_hf.tuner import adapter_files, adapter_names
from blob_hf.tuner.adapter_files import SavedAdapter
from blob_hf.tuner.base_model import head_parameters
from blob_hf.tuner.config import BlobConfig, changes_base
from blob_hf.tuner.loading import is_beside
from blob_hf.tuner.registry import Companion
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor, gathered

_REASONS = {  # of PEFT's keywords: why they are refused
    "ephemeral_gpu_offload": "it is for DoRA, which BLoB does not have",
    "ignore_mismatched_sizes": "a posterior with a part left out would be silently wrong",
    "use_safetensors": "weights are read from safetensors only",
    "push_to_hub": "call model.push_to_hub(repo_id)",
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
    "use_auth_token": "its name is token=",
}


def refuse_unknown(function: str, keywords: Mapping[str, Any], why: str = "") -> None:
    """Refuse keywords that would change nothing; None, and False for what is refused, ask for nothing.

    Raises:
        BlobError: Names the first, and why.
    """
    for name, value in keywords.items():
        if value is not None and not (value is False and name in _REASONS):
            reason = _REASONS.get(name, why)
            raise BlobError(f"{function} does not take {name}={value!r}" + (f": {reason}" if reason else ""))


def check_name(adapter: str) -> None:
    """Refuse what torch cannot take for the name of a submodule.

    Raises:
        BlobError: Empty, with a dot in it, or an attribute of `nn.ModuleDict`.
    """
    if not adapter or "." in adapter or hasattr(nn.ModuleDict(), adapter):
        raise BlobError(f"an adapter cannot be called {adapter!r} (PyTorch has no submodule of that name); rename it")


def checked_arguments(
    source: Any, model: Any, config: Any, base_keywords: Mapping[str, Any]
) -> tuple[str | os.PathLike[str], nn.Module | None]:
    """Source and base model; what `from_pretrained` cannot load from, or onto, is refused.

    Args:
        source: Where the adapter is.
        base_keywords: For the base model's own loading.

    Raises:
        BlobError: Not a folder or repo; a model with adapters; settings of another method; or keywords for a base
            model that is there already.
    """
    if not isinstance(source, (str, os.PathLike)) or isinstance(model, (str, os.PathLike)):
        raise BlobError(f"from_pretrained needs the folder or Hub repo of an adapter, got {source!r}")
    if isinstance(model, PeftModel):
        raise BlobError("model= has adapters already: give its base model, or call its load_adapter(path, name)")
    if config is not None and not isinstance(config, BlobConfig):
        raise BlobError(f"config= is for the posterior's settings, a BlobConfig; got {type(config).__name__}")
    if model is not None:
        refuse_unknown("from_pretrained", base_keywords, "with model= there is no base model to load by it")
    return source, model


def check_companions(saved: SavedAdapter) -> None:
    """Refuse an adapter beside others whose method changes layers: that is done when it is loaded as a model's own.

    Raises:
        BlobError: It is of such a method.
    """
    names = [one.name for one in saved.companions if type(one).attach is not Companion.attach]
    if names and saved.std is None:
        raise BlobError(
            f"{saved.folder} is of the method {names[0]!r}, which changes layers of the model, so it cannot be one of "
            "several adapters; load it by BlobModel.from_pretrained on a base model of its own"
        )


def check_memory(config: LoraConfig, low_cpu_mem_usage: bool) -> None:
    """Refuse `low_cpu_mem_usage` for an adapter whose initialisation has to change the base model.

    Raises:
        BlobError: It is such a one.
    """
    if low_cpu_mem_usage and changes_base(config):
        raise BlobError(
            f"low_cpu_mem_usage=True leaves out init_lora_weights={config.init_lora_weights!r}, which changes the base "
            "model's weights: leave it off"
        )


def check_fits(model: PeftModel, saved: SavedAdapter, adapter: str) -> None:
    """Check that a model has room for an adapter, before anything is copied.

    Raises:
        BlobError: Another base model, number of classes or rank.
    """
    check_vocabulary(model.get_base_model(), saved)
    own = [name for name in adapter_names.own_parameters(model, adapter) if not is_beside(name)]
    adapter_files.check_fits(saved.mean, _shapes(model, adapter, saved.mean), saved.folder, saved.config, own)


def check_scaling(config: LoraConfig, saved: SavedAdapter, adapter: str) -> None:
    """Check that an adapter scales B A as the one in the model does that it takes the place of.

    Raises:
        BlobError: It does not: its weights would be of another size here.
    """
    for name in ("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern"):
        own, found = getattr(config, name), getattr(saved.config, name)
        if (own or None) != (found or None):
            raise BlobError(
                f"{saved.folder} has {name}={found!r}, but the adapter {adapter!r} of this model {own!r}: "
                "load it under another name"
            )


def check_vocabulary(base: nn.Module, saved: SavedAdapter) -> None:
    """Check that token embeddings saved with an adapter have the size of the model's.

    Raises:
        BlobError: They have not.
    """
    size, own = adapter_names.saved_vocabulary_size(base, saved.mean), adapter_names.vocabulary_size(base)
    if size is not None and size != own:
        raise BlobError(
            f"{saved.folder} was saved with {size} token embeddings, but the base model has {own}: call "
            f"base.resize_token_embeddings({size}) first, or leave model= out"
        )


def check_shares(model: PeftModel, saved: SavedAdapter, adapter: str) -> None:
    """Check that an adapter beside others would change nothing of the base model that all share.

    Raises:
        BlobError: It brings another frozen head, or other embeddings or biases.
    """
    own = adapter_names.own_parameters(model, adapter)
    parameters = dict(model.named_parameters())
    shared = {name: parameters[name] for name in saved.mean if name in parameters and name not in own}
    with gathered(list(shared.values())):
        odd = [name for name, value in shared.items() if not _same(full_tensor(value), saved.mean[name])]
    if odd:
        raise BlobError(
            f"{saved.folder} brings weights of its own for what all adapters of this model share ({odd[0]} ...): "
            f"{', '.join(name for name in model.peft_config if name != adapter)} would predict something else; "
            "load it on a base model of its own"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().cpu(), other.to(one.dtype))


def _shapes(model: PeftModel, adapter: str, found: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of what loading fills, by the names in adapter_model.safetensors."""
    parameters = dict(model.named_parameters())
    own = adapter_names.own_parameters(model, adapter)
    filled = {saved: parameters[name] for saved, name in own.items() if name in parameters and not is_beside(saved)}
    shared = {name: parameters[name] for name in found if name in parameters}  # the head, embeddings, biases
    every = {**shared, **filled, **head_parameters(model)}
    return {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in every.items()}
