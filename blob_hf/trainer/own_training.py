"""Where a method that is trained in its own way, from a higher floor, comes between the trainer and its optimizer."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError

if TYPE_CHECKING:
    from blob_hf.trainer.trainer import BlobTrainerMixin


@runtime_checkable
class TrainsItself(Protocol):
    """A companion that says how its adapter is trained."""

    def own_optimizer(self, trainer: "BlobTrainerMixin", optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer of a training: the trainer's with something added, or another one in its place."""
        ...


def with_own_optimizer(trainer: "BlobTrainerMixin", optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A trainer's optimizer as the method of its model wants it (made once for each optimizer of the trainer's).

    Raises:
        BlobError: It has a scheduler already.
    """
    model = trainer.blob_model
    method = model.companion("method") if isinstance(model, BlobModel) else None
    bare = getattr(optimizer, "optimizer", optimizer)  # of a second call to train()
    if not isinstance(method, TrainsItself) or trainer.own_optimizer is bare:
        return optimizer
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise BlobError("the optimizer already has a scheduler: pass it alone, as optimizers=(optimizer, None)")
    trainer.own_optimizer = trainer.optimizer = method.own_optimizer(trainer, optimizer)
    return trainer.own_optimizer
