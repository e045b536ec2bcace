"""LoRA on a parameter of a module, such as the stacked experts of an MoE layer, with an A that can be sampled.

PEFT adds scaling * B A to the parameter and never calls A. So what A is at the moment (a noisy draw in training, a
posterior sample, the mean) is put where PEFT reads it. One weight for the whole forward: the noise of training is that
of `noise="shared"` here, whatever the config says, and S samples are S passes over their blocks of rows.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from blob_hf.tuner.in_flight import Frozen, check_blocks, fixed, frozen_now
from blob_hf.tuner.layer import GaussianA
from blob_hf.tuner.sampled import SampledLinear

_LOCK = threading.RLock()  # PEFT changes the wrapped module for the time of a forward: one thread at a time


class SampledParamWrapper(ParamWrapper):
    """PEFT's wrapper of a parameter; its A may be a `SampledLinear`."""

    @classmethod
    def of(cls, wrapper: ParamWrapper) -> "SampledParamWrapper":
        """A wrapper of the same parameter with the same modules."""
        own = cls.__new__(cls)
        own.__dict__.update(wrapper.__dict__)
        return own

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        with _LOCK:
            frozen = {layer: found for layer in self._nested_layers() if (found := frozen_now(layer)) is not None}
            counts = {len(one.weight) for one in frozen.values() if one.weight is not None}
            num_samples = max(counts, default=1)
            if num_samples == 1:
                return self._one_network(x, *args, **kwargs)
            check_blocks(x.shape[0], num_samples, self.parameter_name)
            parts = []
            for index in range(num_samples):
                inputs = [_block(value, x.shape[0], num_samples, index) for value in (x, *args)]
                named = {key: _block(value, x.shape[0], num_samples, index) for key, value in kwargs.items()}
                with fixed({layer: one.sample(index) for layer, one in frozen.items()}):
                    parts.append(self._one_network(*inputs, **named))
            return _joined(parts)

    def _one_network(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for layer in self._layers():
                stack.enter_context(_weight_in_place(layer, frozen_now(layer)))
            return super().forward(x, *args, **kwargs)

    def _layers(self) -> list[SampledLinear]:
        found = [self.lora_A[name] for name in self.active_adapters if name in self.lora_A]
        return [layer for layer in found if isinstance(layer, SampledLinear)]

    def _nested_layers(self) -> list[SampledLinear]:
        """Of this wrapper and of those inside it, which wrap other parameters of the same module."""
        inner = self.base_layer
        return self._layers() + (inner._nested_layers() if isinstance(inner, SampledParamWrapper) else [])


def make_sampled(parent: nn.Module, name: str) -> None:
    """Put `SampledParamWrapper`s in the place of PEFT's, which may be nested, in a module's attribute."""
    wrapper: Any = getattr(parent, name)
    while isinstance(wrapper, ParamWrapper):
        if not isinstance(wrapper, SampledParamWrapper):
            wrapper = SampledParamWrapper.of(wrapper)
            setattr(parent, name, wrapper)
        parent, name, wrapper = wrapper, "base_layer", wrapper.base_layer


SampledParamWrapper.__name__ = "ParamWrapper"  # by which PEFT knows its wrappers


@contextmanager
def _weight_in_place(layer: SampledLinear, frozen: Frozen | None) -> Iterator[None]:
    """Let `layer.weight` be what the layer is at the moment, differentiable in mean and rho."""
    mean = layer._parameters["weight"]
    weight: Tensor | None = mean
    if frozen is not None and frozen.weight is not None:
        weight = frozen.weight[0]
    elif frozen is None and layer.training and not layer.mean_only and isinstance(layer, GaussianA):
        weight = layer.noisy_weight()
    layer._parameters["weight"] = weight  # type: ignore[assignment]
    try:
        yield
    finally:
        layer._parameters["weight"] = mean


def _block(value: Any, rows: int, num_samples: int, index: int) -> Any:
    """Block `index` of what has a row for each row of the input."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
        return value.chunk(num_samples)[index]
    return value


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(_joined(list(each)) for each in zip(*parts, strict=True))
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
