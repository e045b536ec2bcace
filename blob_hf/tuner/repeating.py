"""Batches that repeat themselves for posterior samples: S blocks of the same rows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from blob_hf.utils.errors import BlobError

_TIMES: ContextVar[Mapping[int, int]] = ContextVar("blob_hf_repeat", default=MappingProxyType({}))  # by id of the model


@contextmanager
def repeating(model: nn.Module, times: int) -> Iterator[None]:
    """Inside the block, and in this context alone, a model's batches are repeated so many times.

    The innermost block of a model decides: what predicts inside another's samples has its own.
    """
    outer = _TIMES.get()
    wrapped = [model]
    while isinstance(inner := getattr(wrapped[-1], "module", None), nn.Module):  # DDP, DeepSpeed
        wrapped.append(inner)
    _TIMES.set({**outer, **dict.fromkeys(map(id, wrapped), times)})
    try:
        yield
    finally:
        _TIMES.set(outer)


def repeated(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward, every tensor with a row for each input S times over, block by block.

    Raises:
        BlobError: There is no tensor that tells how many inputs there are.
    """
    times = _TIMES.get().get(id(model), 1)
    if times == 1:
        return args, kwargs
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise BlobError("posterior_samples(..., repeat=True) needs a batch of tensors to repeat, got none")
    rows = tensors[0].shape[0]

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
            return value.repeat(times, *[1] * (value.dim() - 1))
        return list(value) * times if isinstance(value, list) and len(value) == rows else value  # adapter_names

    return tuple(map(repeat, args)), {name: repeat(value) for name, value in kwargs.items()}
