"""Reading parameters that an engine has sharded over the processes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Inside the block ZeRO-3 parameters hold their full values on every rank; nothing to do for others."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of an FSDP2 / tensor-parallel shard (a DTensor); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
