"""`BlobConfig` inside PEFT: each LoRA layer that PEFT makes for one has a Gaussian A, whoever asked for it.

PEFT makes layers in `LoraModel._create_and_replace`, for `peft.get_peft_model`, `add_adapter` of PEFT and transformers,
mixed models and weighted adapters alike, and makes their weights (anew for EVA's ranks) in `LoraLayer.update_layer`.
A posterior hooked in there is never silently plain LoRA. These two, and what would fill a posterior with zeros or pad
it, are all that is changed of PEFT; for any other config nothing is. `tests/tuner/test_injection.py` fails when a
release of PEFT moves one of them.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import hotswap
from torch import nn

from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.layer import GaussianA
from blob_hf.tuner.parameters import make_sampled
from blob_hf.tuner.sampled import SampledLinear, weight_name
from blob_hf.tuner.stacks import in_last_layers
from blob_hf.utils.errors import BlobError

# PEFT's LoRA for these does not go through a linear layer called A
_REFUSED: dict[type[nn.Module], str] = {
    nn.Embedding: "an embedding looks rows up, its A is never multiplied with an input",
    nn.MultiheadAttention: "PEFT merges LoRA into its in-projection and never calls A",
    nn.Conv1d: "its A is a convolution",
    nn.Conv2d: "its A is a convolution",
    nn.Conv3d: "its A is a convolution",
}


def has_adapter(module: nn.Module, adapter: str) -> TypeGuard[LoraLayer]:
    """Whether a module is a LoRA layer with weights of an adapter."""
    return isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)


def check_target(base_layer: nn.Module, name: str) -> None:
    """Refuse a layer whose A cannot be a posterior.

    Raises:
        BlobError: It cannot.
    """
    for kind, reason in _REFUSED.items():
        if isinstance(base_layer, kind):
            raise BlobError(
                f"BLoB supports linear layers and parameters, but {name} is {type(base_layer).__name__}: {reason}; "
                "leave it out of target_modules"
            )


def check_layer(module: LoraLayer, name: str, adapter: str) -> None:
    """Refuse a LoRA layer that is there already, and whose A cannot be a posterior.

    Raises:
        BlobError: It cannot.
    """
    check_target(module.get_base_layer(), name)
    linear = module.lora_A[adapter]
    if not isinstance(linear, nn.Linear):
        raise BlobError(f"BLoB supports linear layers, but lora_A of {name} is {type(linear).__name__}; untarget it")


def make_gaussian(layer: LoraLayer, adapter: str, path: str, config: BlobConfig) -> None:
    """Put a `GaussianA` in the place of a layer's A, around it; one that is there stays, and gets its name.

    Args:
        path: Of the layer in the base model. A layer on a parameter is called by that: its path depends on how many
            are wrapped around it.
    """
    name = path
    if isinstance(layer, lora.ParamWrapper):
        name = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
    linear = layer.lora_A[adapter]
    if isinstance(linear, nn.Linear) and not isinstance(linear, SampledLinear):
        linear = GaussianA(linear, name, config.init_eps, config.std_parameterization, config.noise)
        layer.lora_A[adapter] = linear
    if isinstance(linear, GaussianA):
        linear.name, linear.weight_name = name, weight_name(path)


def make_plain(layer: LoraLayer, adapter: str) -> None:
    """Put a plain linear layer in the place of a layer's Gaussian A."""
    linear = layer.lora_A[adapter]
    if isinstance(linear, SampledLinear):
        layer.lora_A[adapter] = linear.plain()


def remove_layers(model: nn.Module, adapter: str) -> None:
    """Take an adapter that failed half-way out of a model; where it was alone, the base layers are as before."""
    for path, module in reversed(list(model.named_modules())):  # from inside out
        if not has_adapter(module, adapter):
            continue
        layer: Any = module
        layer.delete_adapter(adapter)
        if not layer.lora_A and not layer.lora_embedding_A:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.base_layer)


# ----- where PEFT makes layers ------------------------------------------------------------------------------------

_update_layer = LoraLayer.update_layer
_create_and_replace = LoraModel._create_and_replace
_add_weighted_adapter = LoraModel.add_weighted_adapter
_hotswap_from_state_dict = hotswap.hotswap_adapter_from_state_dict
_pad_lora_weights = hotswap._pad_lora_weights


@functools.wraps(_update_layer)
def _update_layer_with_posterior(
    self: LoraLayer, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
) -> None:
    before = dict(self.lora_A.items()).get(adapter_name)
    _update_layer(self, adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
    if isinstance(config, BlobConfig) and (before is None or isinstance(before, SampledLinear)):
        make_gaussian(self, adapter_name, before.name if isinstance(before, GaussianA) else "", config)


@functools.wraps(_create_and_replace)
def _create_and_replace_with_posterior(
    self: LoraModel, lora_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
    current_key: str, *, parameter_name: str | None = None,
) -> None:  # fmt: skip
    args = (lora_config, adapter_name, target, target_name, parent, current_key)
    if not isinstance(lora_config, BlobConfig):
        return _create_and_replace(self, *args, parameter_name=parameter_name)
    if parameter_name is None:
        check_target(target.get_base_layer() if isinstance(target, LoraLayer) else target, current_key)
    _create_and_replace(self, *args, parameter_name=parameter_name)
    path = current_key
    layer: Any = getattr(parent, target_name)
    if parameter_name is None:
        check_layer(layer, path, adapter_name)
    else:  # parent and target are somewhere in a nest of wrappers, the outermost has the module's path
        path = current_key.rpartition(".")[0]
        above, _, name = path.rpartition(".")
        make_sampled(self.model.get_submodule(above), name)
        layer = self.model.get_submodule(path)
    has_posterior = in_last_layers(self.model, lora_config.posterior_layers)(path)
    while isinstance(layer, LoraLayer):
        if adapter_name in layer.lora_A:
            if has_posterior:
                make_gaussian(layer, adapter_name, path, lora_config)
            else:
                make_plain(layer, adapter_name)
            for part in (layer.lora_A, layer.lora_B, layer.lora_dropout):  # PEFT leaves new layers in train mode
                part[adapter_name].train(self.training)
        path, layer = f"{path}.base_layer", layer.base_layer
    return None


# ----- weighted adapters ------------------------------------------------------------------------------------------


@functools.wraps(_add_weighted_adapter)
def _add_weighted_adapter_with_posterior(
    self: LoraModel, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd",
    **kwargs: Any,
) -> None:  # fmt: skip
    kinds = [isinstance(self.peft_config.get(name), BlobConfig) for name in adapters]
    kind = "linear" if len(adapters) == 1 else combination_type  # as PEFT does
    if any(kinds) and not all(kinds):
        plain = adapters[kinds.index(False)]
        raise BlobError(f"a weighted sum with a posterior needs posteriors, but {plain!r} is plain; bayesianize it")
    if any(kinds) and kind not in ("cat", "linear"):
        raise BlobError(
            f"combination_type={kind!r} of Gaussians is not a Gaussian; use 'cat' (exact) or 'linear', or merge the "
            "means of the adapters as plain LoRA"
        )
    known = adapter_name in self.peft_config
    _add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **kwargs)  # type: ignore[arg-type]
    if any(kinds) and not known:
        config: Any = self.peft_config[adapter_name]
        for module in self.modules():
            if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
                _combine_stds(module, adapters, weights, adapter_name, kind, config.prior_std)


@torch.no_grad()
def _combine_stds(
    module: LoraLayer, adapters: Sequence[str], weights: Sequence[float], result: str, kind: str, prior_std: float
) -> None:
    """The stds of sums of independent Gaussians, of which PEFT has made the means.

    `cat` stacks w_i s_i A_i; `linear` is the sum of sqrt(|w_i s_i|) A_i, up to signs. Rows that no adapter has fill a
    layer up: their B is 0, and they are at the prior.
    """
    parts = []
    for name, weight in zip(adapters, weights, strict=True):
        if name in module.lora_A:
            layer: Any = module.lora_A[name]
            parts.append((layer.std, abs(weight * float(module.scaling[name]))))
    target: Any = module.lora_A[result]
    std = torch.full_like(target.rho, prior_std)
    if kind == "cat":
        stacked = torch.cat([own * factor for own, factor in parts])
        std[: len(stacked)] = stacked
    elif parts:
        std = torch.stack([own.square() * factor for own, factor in parts]).sum(0).sqrt()
    target.set_std(std)


# ----- hot swapping -----------------------------------------------------------------------------------------------


@functools.wraps(_hotswap_from_state_dict)
def _no_hotswap(
    model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    layers = (module for module in model.modules() if isinstance(module, LoraLayer) and adapter_name in module.lora_A)
    if any(isinstance(layer.lora_A[adapter_name], GaussianA) for layer in layers):
        raise BlobError(
            f"hotswap_adapter brings no stds and would fill those of {adapter_name!r} with zeros; "
            f"model.load_adapter(folder, {adapter_name!r}) swaps a posterior in place"
        )
    _hotswap_from_state_dict(model, state_dict, adapter_name, *args, **kwargs)


@functools.wraps(_pad_lora_weights)
def _no_padding(model: nn.Module, target_rank: int) -> bool:
    if any(isinstance(module, GaussianA) and module.out_features != target_rank for module in model.modules()):
        raise BlobError(
            "prepare_model_for_compiled_hotswap pads plain LoRA and would drop the posterior; leave target_rank out, "
            "or merge the adapter first"
        )
    return _pad_lora_weights(model, target_rank)


def install() -> None:
    """Put these in the place of PEFT's."""
    LoraLayer.update_layer = _update_layer_with_posterior  # type: ignore[method-assign,assignment]
    LoraModel._create_and_replace = _create_and_replace_with_posterior  # type: ignore[method-assign]
    LoraModel.add_weighted_adapter = _add_weighted_adapter_with_posterior  # type: ignore[method-assign,assignment]
    hotswap.hotswap_adapter_from_state_dict = _no_hotswap
    hotswap._pad_lora_weights = _no_padding


install()
