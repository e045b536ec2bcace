"""Reading (and writing) parameters that an engine has sharded over the processes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


def gathered(parameters: Sequence[Tensor], write: bool = False) -> AbstractContextManager[Any]:
    """Inside the block ZeRO-3 parameters hold their full values on every rank; nothing to do for others.

    Args:
        write: Keep what rank 0 writes into them.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None)


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are ZeRO-3's or FSDP2's shards."""
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor") for parameter in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of an FSDP2 / tensor-parallel shard (a DTensor); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor, written in place with it; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def num_trained(model: nn.Module) -> int:
    """Trainable weights, also where ZeRO-3 has sharded them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
