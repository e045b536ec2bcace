"""Verbs on a whole model's posterior: attach it, fix it at its mean or at samples, measure it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.draws import drawn_ahead
from blob_hf.tuner.in_flight import Frozen, Later, fixed
from blob_hf.tuner.injection import check_layer, has_adapter, make_gaussian
from blob_hf.tuner.kl import gaussian_kl
from blob_hf.tuner.layer import GaussianA, std_from_rho
from blob_hf.tuner.parameters import make_sampled
from blob_hf.tuner.repeating import repeating
from blob_hf.tuner.rows import as_row, in_rows
from blob_hf.tuner.sampled import SampledLinear, layer_name
from blob_hf.tuner.sampling import Sampling
from blob_hf.tuner.stacks import in_last_layers
from blob_hf.tuner.trunk import find_trunk, sharing
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor, gathered, is_sharded


def attach_posterior(model: nn.Module, config: BlobConfig, adapter: str) -> None:
    """Replace the point-valued A of every LoRA layer of `adapter` by a `GaussianA` around it, in place.

    (Of those in the last `config.posterior_layers`.)

    Raises:
        BlobError: No LoRA layer of that name, or one whose A cannot be a posterior (see `injection`).
    """
    layers = {path: module for path, module in model.named_modules() if has_adapter(module, adapter)}
    if not layers:
        raise BlobError(f"the model has no LoRA layers of an adapter named {adapter!r}")
    is_last = in_last_layers(model, config.posterior_layers)
    layers = {path: module for path, module in layers.items() if is_last(path)}
    if not layers:
        raise BlobError(f"no LoRA layer is in the last {config.posterior_layers} layers, which posterior_layers names")
    for path, layer in layers.items():  # all are looked at before the first is changed
        check_layer(layer, layer_name(path), adapter)
    for path in layers:
        parent, _, name = path.rpartition(".")
        make_sampled(model.get_submodule(parent), name)
        layer = getattr(model.get_submodule(parent), name)
        make_gaussian(layer, adapter, layer_name(path), config)


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """Every linear layer with LoRA weights of an adapter, by its path in the PEFT model."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield path, module


def gaussian_layers(model: nn.Module, adapter: str | None = None) -> dict[str, GaussianA]:
    """The Gaussian A of every layer of one adapter (default: of all active ones), by layer name, in model order.

    Where a second active adapter is on the same layer, its A is called by layer and adapter.
    """
    layers: dict[str, GaussianA] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for key in module.active_adapters if adapter is None else [adapter]:
                if key in module.lora_A and isinstance(layer := module.lora_A[key], GaussianA):
                    layers[f"{layer.name} of {key}" if layer.name in layers else layer.name] = layer
    return layers


def _check_complete(model: nn.Module, lora: Sequence[LoraLayer]) -> None:
    """Refuse an adapter that says it is BLoB, but has layers with a point-valued A.

    Raises:
        BlobError: There is one.
    """
    for adapter, config in (getattr(model, "peft_config", None) or {}).items():
        if isinstance(config, BlobConfig):
            plain = {
                layer for layer in lora
                if adapter in layer.lora_A and not isinstance(layer.lora_A[adapter], SampledLinear)
            }  # fmt: skip
            is_last = in_last_layers(model, config.posterior_layers if plain else None)
            for path, module in model.named_modules() if plain else ():
                if module in plain and is_last(path):
                    raise BlobError(
                        f"adapter {adapter!r} is a BlobConfig, but {layer_name(path)} is plain LoRA: something has "
                        "replaced its A; bayesianize(model) makes it a posterior again"
                    )


def sampled_layers(model: nn.Module) -> list[SampledLinear]:
    """Every layer of the active adapters whose weights can be sampled: A, with some methods also B and heads."""
    return list(layer_positions(model))


def layer_positions(model: nn.Module, inactive: bool = False) -> dict[SampledLinear, int]:
    """`sampled_layers`, and of each how many active adapters come before its own on the same LoRA layer.

    Args:
        inactive: Those of adapters that are not active, at position 0, instead.
    """
    positions = _positions(*_parts(model))
    return {layer: max(position, 0) for layer, position in positions.items() if (position < 0) == inactive}


def _parts(model: nn.Module) -> tuple[list[LoraLayer], list[SampledLinear]]:
    """In one walk over a model, which takes milliseconds where there are thousands of modules."""
    modules = list(model.modules())
    lora: list[LoraLayer] = [module for module in modules if isinstance(module, LoraLayer)]
    return lora, [module for module in modules if isinstance(module, SampledLinear)]


def _positions(lora: Sequence[LoraLayer], sampled: Sequence[SampledLinear]) -> dict[SampledLinear, int]:
    """Of every layer that can be sampled, how many active adapters come before its own; -1: its own is not active."""
    positions = {}
    for module in lora:
        for weights in (module.lora_A, module.lora_B):
            for key, layer in weights.items():
                positions[layer] = module.active_adapters.index(key) if key in module.active_adapters else -1
    return {layer: positions.get(layer, 0) for layer in sampled}


def layer_samplings(model: nn.Module, sampling: Sampling) -> dict[SampledLinear, Sampling]:
    """The layers of a model that can be sampled from, and what each draws.

    That is `sampling`, but a second active adapter on a layer has another seed: its noise is its own.

    Raises:
        BlobError: There is none, or the adapter is merged.
    """
    positions = _samplable(model)
    return {layer: sampling.of_adapter(position) for layer, position in positions.items() if position >= 0}


def samplable_layers(model: nn.Module) -> list[SampledLinear]:
    """`sampled_layers` of a model that can be sampled from.

    Raises:
        BlobError: There is none, or the adapter is merged.
    """
    return [layer for layer, position in _samplable(model).items() if position >= 0]


def _samplable(model: nn.Module) -> dict[SampledLinear, int]:
    lora, sampled = _parts(model)
    _check_complete(model, lora)
    positions = _positions(lora, sampled)
    if all(position < 0 for position in positions.values()):
        raise BlobError("the model has no posterior to sample from; make one with get_blob_model or bayesianize")
    if any(module.merged for module in lora):
        raise BlobError("the adapter is merged into the base weights; unmerge_adapter() before sampling")
    return positions


@contextmanager
def posterior_mean(model: nn.Module) -> Iterator[None]:
    """Inside the block the network is the posterior mean, also in train mode and inside `posterior_samples`."""
    layers = [*sampled_layers(model), *layer_positions(model, inactive=True)]
    with fixed(dict.fromkeys(layers, Frozen(None))), repeating(model, 1), sharing(model, None):
        yield


@contextmanager
def posterior_samples(
    model: nn.Module, sampling: Sampling | int, seed: int | None = None, repeat: bool = False
) -> Iterator[None]:
    """Inside the block the network is coherent posterior samples: `Sampling(S, ...)`, or S of a seed.

    Inputs must be sample-major: S equal blocks of rows (`tensor.repeat(S, 1)`), block s for sample `first + s`, and so
    are outputs: `out.unflatten(0, (S, -1)).transpose(0, 1)` is `(inputs, samples, ...)`, the order of `predict`,
    `generate_samples` and, flat, of `generate(sampling=...)`. One sample is one draw of all A matrices, the same for
    every token, layer and decoding step.

    Rows that divide by S are taken for such blocks: that they are the *same* inputs S times, nobody can see here. What
    was repeated by `repeat_interleave`, or not at all, gives samples of different texts. `model.predict` and
    `BlobModel.posterior_samples(..., repeat=True)` repeat by themselves.

    The samples belong to the thread (or asyncio task) that opened the block: others go on undisturbed, with their own
    or without. Adapters that rows choose by PEFT's `adapter_names` are sampled, too.

    With `Sampling(layers=k)` the samples differ in the last k layers, and what is below is computed once (`trunk`):
    hidden states and caches of those layers that the model returns have one block's rows.

    Args:
        repeat: Have a `BlobModel`'s forward and `generate` repeat every tensor of the batch S times themselves.

    Raises:
        BlobError: S < 1, the model has no posterior or not so many layers, or its adapter is merged.
    """
    drawn = Sampling.of(sampling, seed).required()
    positions = _samplable(model)
    at_mean = _below(model, drawn, positions)
    differing = {layer: position for layer, position in positions.items() if layer not in at_mean}
    layers = {layer: drawn.of_adapter(position) for layer, position in differing.items() if position >= 0}
    frozen: dict[SampledLinear, Frozen | Later] = dict.fromkeys(at_mean, Frozen(None))
    with drawn_ahead(filter(None, (layer.wanted_noise(own) for layer, own in layers.items()))):
        frozen |= {layer: layer.freeze(own) for layer, own in layers.items()}
    frozen |= {layer: Later(layer, drawn) for layer, position in differing.items() if position < 0}
    trunk = find_trunk(model, layers, drawn.num_samples) if shares_trunk(model, drawn) else None
    with fixed(frozen), repeating(model, drawn.num_samples if repeat else 1), sharing(model, trunk):
        yield


def shares_trunk(model: nn.Module, sampling: Sampling) -> bool:
    """Whether samples differ in the last layers alone, so that all of them should share a forward."""
    if sampling.layers is not None:
        return True
    adapted = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    configs = [] if adapted is None else [adapted.peft_config[name] for name in adapted.active_adapters]
    return bool(configs) and all(getattr(config, "posterior_layers", None) for config in configs)


def _below(model: nn.Module, sampling: Sampling, layers: Iterable[SampledLinear]) -> set[SampledLinear]:
    """Those of the layers that come before the last `sampling.layers` of the model.

    Raises:
        BlobError: The model has not so many, or its networks are given and differ everywhere.
    """
    if sampling.layers is None:
        return set()
    if any(layer.num_networks is not None for layer in layers):
        raise BlobError("layers: these networks were trained apart and differ everywhere; leave it out")
    is_last = in_last_layers(model, sampling.layers)
    paths = {module: path for path, module in model.named_modules() if isinstance(module, SampledLinear)}
    return {layer for layer in layers if not is_last(paths[layer])}


def sampling_of(model: nn.Module, wanted: Sampling) -> Sampling:
    """What of `wanted` a model can give: no samples of a point, and all networks where their number is given.

    Raises:
        BlobError: As many as needed, of a model whose shards wait for one another.
    """
    layers = sampled_layers(model)
    if wanted.tolerance is not None and is_sharded(model):
        raise BlobError(
            "as many samples as needed are not as many on every process, which a sharded model (ZeRO-3, FSDP) waits "
            "for; give a number of samples"
        )
    given = [layer.num_networks for layer in layers if layer.num_networks is not None]
    if not layers or wanted.num_samples == 0:
        return replace(wanted, num_samples=0)
    return replace(wanted, num_samples=min(given)) if given else wanted


def kl_divergence(model: nn.Module, prior_std: float, adapter: str | None = None) -> Tensor:
    """KL(q || p) over all A matrices of an adapter (default: of all active ones), nats, differentiable scalar float32.

    Under ZeRO-3 the shards are gathered for reading, so the result carries no gradient.
    """
    layers: dict[Tensor, GaussianA] = {layer.weight: layer for layer in gaussian_layers(model, adapter).values()}
    with gathered([parameter for layer in layers.values() for parameter in (layer.weight, layer.rho)]):
        parts = []
        for means in in_rows(layers):
            mean, std = _row(means), _stds([layers[weight] for weight in means])
            parts.append(gaussian_kl(mean, std, prior_std))
        return _total(parts)


def mean_posterior_std(model: nn.Module) -> Tensor:
    """Mean of Omega over all weights (scalar tensor, detached)."""
    layers: dict[Tensor, GaussianA] = {layer.rho: layer for layer in gaussian_layers(model).values()}
    with torch.no_grad(), gathered(list(layers)):
        total = _total([_stds([layers[rho] for rho in rhos]).sum() for rhos in in_rows(layers)])
        return total / sum(layer.in_features * layer.out_features for layer in layers.values())


def _stds(layers: Sequence[GaussianA]) -> Tensor:
    """Omega of many layers in one row."""
    kinds = {layer.parameterization for layer in layers}
    if len(kinds) == 1:
        return std_from_rho(_row([layer.rho for layer in layers]), kinds.pop())
    return _row([layer.std for layer in layers])


def _row(parameters: Sequence[Tensor]) -> Tensor:
    return as_row([full_tensor(parameter) for parameter in parameters]).float()


def _total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


@dataclass(frozen=True)
class LayerStatistics:
    """Posterior of one layer, or of all together.

    Attributes:
        num_weights: Entries of A.
        mean_std, min_std, max_std: Of the posterior std Omega.
        kl: Nats.
        signal_to_noise: Mean over weights of |M| / Omega.
    """

    num_weights: int
    mean_std: float
    min_std: float
    max_std: float
    kl: float
    signal_to_noise: float


@dataclass(frozen=True)
class PosteriorStatistics:
    """What `posterior_statistics` returns: `total` over the model and `layers` by name."""

    total: LayerStatistics
    layers: dict[str, LayerStatistics]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain numbers, for JSON."""
        return asdict(self)


@torch.no_grad()
def posterior_statistics(model: nn.Module, prior_std: float) -> PosteriorStatistics:
    """Std, KL and signal-to-noise ratio of the posterior, per layer and in total."""
    layers = {}
    for name, layer in gaussian_layers(model).items():
        with gathered([layer.weight, layer.rho]):
            mean, std = full_tensor(layer.weight).float(), full_tensor(layer.std)
            layers[name] = LayerStatistics(
                num_weights=std.numel(),
                mean_std=std.mean().item(),
                min_std=std.min().item(),
                max_std=std.max().item(),
                kl=full_tensor(layer.kl(prior_std)).item(),
                signal_to_noise=(mean.abs() / std).mean().item(),
            )
    if not layers:
        raise BlobError("the model has no posterior; make one with get_blob_model or bayesianize")
    parts = list(layers.values())
    count = sum(part.num_weights for part in parts)
    total = LayerStatistics(
        num_weights=count,
        mean_std=sum(part.mean_std * part.num_weights for part in parts) / count,
        min_std=min(part.min_std for part in parts),
        max_std=max(part.max_std for part in parts),
        kl=sum(part.kl for part in parts),
        signal_to_noise=sum(part.signal_to_noise * part.num_weights for part in parts) / count,
    )
    return PosteriorStatistics(total, layers)
