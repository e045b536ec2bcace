"""Verbs on a whole model's posterior: attach it, fix it at its mean or at samples, measure it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.layer import GaussianA
from blob_hf.tuner.sampled import SampledLinear, layer_name
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor, gathered


def attach_posterior(model: nn.Module, config: BlobConfig, adapter: str) -> None:
    """Replace the point-valued A of every LoRA layer of `adapter` by a `GaussianA` around it, in place.

    Raises:
        BlobError: No LoRA layer of that name, or one that is not a linear layer (embeddings, convolutions).
    """
    found = False
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = layer_name(path)
        if adapter in module.lora_embedding_A:
            raise BlobError(f"BLoB supports linear layers, but LoRA is attached to the embedding {name}; untarget it")
        if adapter not in module.lora_A:
            continue
        linear = module.lora_A[adapter]
        if not isinstance(linear, nn.Linear):
            raise BlobError(
                f"BLoB supports linear layers, but lora_A of {name} is {type(linear).__name__}; untarget it"
            )
        found = True
        if not isinstance(linear, GaussianA):
            module.lora_A[adapter] = GaussianA(linear, name, config.init_eps, config.std_parameterization, config.noise)
    if not found:
        raise BlobError(f"the model has no LoRA layers of an adapter named {adapter!r}")


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """Every linear layer with LoRA weights of an adapter, by its path in the PEFT model."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield path, module


def gaussian_layers(model: nn.Module, adapter: str | None = None) -> dict[str, GaussianA]:
    """The Gaussian A of every layer of one adapter (default: of all active ones), by layer name, in model order."""
    layers = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for key in module.active_adapters if adapter is None else [adapter]:
                if key in module.lora_A and isinstance(layer := module.lora_A[key], GaussianA):
                    layers[layer.name] = layer
    return layers


def sampled_layers(model: nn.Module) -> list[SampledLinear]:
    """Every layer of the active adapters whose weights can be sampled: A, with some methods also B and heads."""
    inactive = {
        id(layer)
        for module in model.modules()
        if isinstance(module, LoraLayer)
        for weights in (module.lora_A, module.lora_B)
        for key, layer in weights.items()
        if key not in module.active_adapters
    }
    return [module for module in model.modules() if isinstance(module, SampledLinear) and id(module) not in inactive]


def samplable_layers(model: nn.Module) -> list[SampledLinear]:
    """`sampled_layers` of a model that can be sampled from.

    Raises:
        BlobError: There is none, or the adapter is merged.
    """
    layers = sampled_layers(model)
    if not layers:
        raise BlobError("the model has no posterior to sample from; make one with get_blob_model or bayesianize")
    if any(isinstance(module, LoraLayer) and module.merged for module in model.modules()):
        raise BlobError("the adapter is merged into the base weights; unmerge_adapter() before sampling")
    return layers


@contextmanager
def posterior_mean(model: nn.Module) -> Iterator[None]:
    """Inside the block the network is the posterior mean, also in train mode and inside `posterior_samples`."""
    layers = sampled_layers(model)
    outer = [(layer.mean_only, layer._samples) for layer in layers]
    for layer in layers:
        layer.mean_only, layer._samples = True, None
    try:
        yield
    finally:
        for layer, (mean_only, samples) in zip(layers, outer, strict=True):
            layer.mean_only, layer._samples = mean_only, samples


@contextmanager
def posterior_samples(model: nn.Module, sampling: Sampling | int, seed: int | None = None) -> Iterator[None]:
    """Inside the block the network is coherent posterior samples: `Sampling(S, ...)`, or S of a seed.

    Inputs must be sample-major: S equal blocks of rows (`tensor.repeat(S, 1)`), block s for sample `first + s`, and so
    are outputs: `out.unflatten(0, (S, -1)).transpose(0, 1)` is `(inputs, samples, ...)`, the order of `predict`,
    `generate_samples` and, flat, of `generate(sampling=...)`. One sample is one draw of all A matrices, the same for
    every token, layer and decoding step.

    Raises:
        BlobError: S < 1, the model has no posterior, or its adapter is merged.
    """
    drawn = Sampling.of(sampling, seed).required()
    with ExitStack() as stack:
        for layer in samplable_layers(model):
            stack.enter_context(layer.frozen_samples(drawn))
        yield


def sampling_of(model: nn.Module, wanted: Sampling) -> Sampling:
    """What of `wanted` a model can give: no samples of a point, and all networks where their number is given."""
    layers = sampled_layers(model)
    given = [layer.num_networks for layer in layers if layer.num_networks is not None]
    if not layers or wanted.num_samples == 0:
        return replace(wanted, num_samples=0)
    return replace(wanted, num_samples=min(given)) if given else wanted


def kl_divergence(model: nn.Module, prior_std: float) -> Tensor:
    """KL(q || p) over all A matrices of the active adapters, nats, differentiable (scalar float32).

    Under ZeRO-3 the shards are gathered for reading, so the result carries no gradient.
    """
    layers = list(gaussian_layers(model).values())
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.rho)]
    with gathered(parameters):
        return torch.stack([full_tensor(layer.kl(prior_std)) for layer in layers]).sum()


def mean_posterior_std(model: nn.Module) -> Tensor:
    """Mean of Omega over all weights (scalar tensor, detached)."""
    layers = list(gaussian_layers(model).values())
    with torch.no_grad(), gathered([layer.rho for layer in layers]):
        total = torch.stack([full_tensor(layer.std.sum()) for layer in layers]).sum()
        return total / sum(layer.in_features * layer.out_features for layer in layers)


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
