"""Training the student: transformers' Trainer with one other loss."""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from blob_hf.distillation.cache import TargetCache
from blob_hf.trainer.dropout import no_base_dropout
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.sampling import Sampling


class TaughtRows(Protocol):
    """Inputs, and what a teacher has said of them."""

    def __len__(self) -> int: ...

    def ask(self, teacher: BlobModel, sampling: Sampling, cache: TargetCache, batch_size: int, block: int) -> None:
        """Have the teacher's predictive of all rows."""

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch for `loss`."""

    def loss(self, student: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Mean KL(teacher || student) of a batch, nats."""


class _Indices(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class DistilTrainer(Trainer):
    """Trains a student on KL(teacher's posterior predictive || student), without the backbone's own dropout.

    Args:
        model: Plain LoRA, see `make_student`.
        args: transformers' own.
        rows: That the teacher has answered.
    """

    def __init__(self, model: BlobModel, args: TrainingArguments, rows: TaughtRows) -> None:
        own = copy.copy(args)
        own.remove_unused_columns = False  # a row is its index
        super().__init__(model, own, data_collator=rows.collate, train_dataset=_Indices(len(rows)))
        self.rows = rows
        self.model_accepts_loss_kwargs = False  # the loss is a mean already

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        return self.rows.loss(model, dict(inputs))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None
        with no_base_dropout(self.model):
            return super().train(*args, **kwargs)
