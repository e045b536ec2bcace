"""Samples in flight: what the weights of a layer are frozen at, in the context that froze them and nowhere else.

A context is what `contextvars` means by it: a thread, or a task of asyncio, has one of its own. So a server's threads
answer requests on one model at once, each with its own samples, while others use the mean. A new thread starts without
samples: open `posterior_samples` in the thread that runs the model (`asyncio.to_thread` takes the context along).
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

if TYPE_CHECKING:
    from blob_hf.tuner.sampled import SampledLinear


@dataclass(frozen=True)
class Frozen:
    """What a layer is in a context.

    Attributes:
        weight: Samples of its weight, (S, out_features, in_features); None: the weight itself, also in train mode.
        bias: Samples of its bias, (S, out_features), if it has one.
    """

    weight: Tensor | None
    bias: Tensor | None = None

    def sample(self, index: int) -> "Frozen":
        """One of the samples alone."""
        part = slice(index, index + 1)
        return Frozen(
            None if self.weight is None else self.weight[part], None if self.bias is None else self.bias[part]
        )


class Later:
    """Samples that are drawn when a forward first needs them: of adapters that are not active, but may be asked for."""

    def __init__(self, layer: "SampledLinear", sampling: Sampling) -> None:
        self._layer, self._sampling = layer, sampling

    @cached_property
    def frozen(self) -> Frozen:
        """What is drawn."""
        return self._layer.freeze(self._sampling)


_FROZEN: ContextVar[Mapping[int, Frozen | Later]] = ContextVar("blob_hf_frozen", default=MappingProxyType({}))  # by id
_HOLDERS: Counter[int] = Counter()  # contexts that hold a layer frozen, by its id
_LOCK = threading.Lock()


@contextmanager
def fixed(weights: Mapping["SampledLinear", Frozen | Later]) -> Iterator[None]:
    """Inside the block, and in this context alone, these layers are what they are frozen at."""
    outer = _FROZEN.get()
    _hold(weights, 1)
    _FROZEN.set({**outer, **{id(layer): frozen for layer, frozen in weights.items()}})
    try:
        yield
    finally:
        _FROZEN.set(outer)
        _hold(weights, -1)


def _hold(weights: Mapping["SampledLinear", Frozen | Later], change: int) -> None:
    with _LOCK:
        for layer in weights:
            _HOLDERS[id(layer)] += change
            layer.is_frozen_somewhere = _HOLDERS[id(layer)] > 0
            if not layer.is_frozen_somewhere:
                del _HOLDERS[id(layer)]


def _found(layer_id: int) -> Frozen | None:
    found = _FROZEN.get().get(layer_id)
    return found.frozen if isinstance(found, Later) else found


@torch.compiler.disable
def frozen_now(layer: "SampledLinear") -> Frozen | None:
    """What a layer is frozen at in this context; None: at nothing.

    Raises:
        BlobError: The layer is a copy that `nn.DataParallel` made, which knows no samples; or a backward pass
            recomputes it in a thread that does not know them (gradient checkpointing on a GPU): the gradient would be
            that of another network.
    """
    frozen = _found(id(layer))
    if getattr(layer, "_is_replica", False):
        raise BlobError("nn.DataParallel cannot hold posterior samples; run one process for each GPU instead")
    if frozen is None and layer.is_frozen_somewhere and torch._C._current_graph_task_id() != -1:
        raise BlobError(
            "gradient checkpointing cannot recompute frozen posterior samples in the backward pass of another thread; "
            "switch it off inside posterior_samples, or run without gradients"
        )
    return frozen


def sample_major_linear(x: Tensor, frozen: Frozen, name: str) -> Tensor:
    """x (S * rows, ..., in) times its own W_s (out, in) per block of rows -> (S * rows, ..., out).

    Raises:
        BlobError: The rows are not S equal blocks.
    """
    assert frozen.weight is not None
    num_samples = frozen.weight.shape[0]
    samples = frozen.weight.to(x.dtype)
    bias = None if frozen.bias is None else frozen.bias.to(x.dtype)
    if num_samples == 1:
        return F.linear(x, samples[0], None if bias is None else bias[0])
    check_blocks(x.shape[0], num_samples, name)
    rows = x.shape[:-1].numel() // num_samples  # may be none
    out = x.reshape(num_samples, rows, x.shape[-1]) @ samples.transpose(1, 2)
    if bias is not None:
        out = out + bias.unsqueeze(1)
    return out.view(*x.shape[:-1], samples.shape[1])


def check_blocks(rows: int, num_samples: int, name: str) -> None:
    """Refuse rows that cannot be one block for each sample.

    Rows that divide are taken for blocks: whether they are the same inputs in each, nobody can see here.
    """
    if rows % num_samples:
        raise BlobError(
            f"{num_samples} posterior samples are frozen, so inputs must be {num_samples} equal blocks of the same "
            f"rows (sample-major), got {rows} rows in {name}; repeat the batch with tensor.repeat({num_samples}, 1), "
            "not repeat_interleave, or have it repeated: model.posterior_samples(..., repeat=True)"
        )


# ----- torch.compile ----------------------------------------------------------------------------------------------


@torch.library.custom_op("blob_hf::frozen_linear", mutates_args=())
def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, layer_id: int, name: str) -> Tensor:
    """A layer at what it is frozen at, as one node of a compiled graph, which cannot look into contexts itself.

    Inference alone: there is no gradient through it.
    """
    frozen = _found(layer_id)
    if frozen is None or frozen.weight is None:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).to(x.dtype)
    return sample_major_linear(x, frozen, name).to(x.dtype)


@frozen_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, layer_id: int, name: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
