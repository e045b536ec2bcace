"""What a teacher says of the classes of inputs, or of the choices of questions, and how far a student is from it."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blob_hf.distillation.cache import Shard, TargetCache
from blob_hf.distillation.loss import kl_classes
from blob_hf.inference.answers import Prediction
from blob_hf.inference.choices import ChoiceRows
from blob_hf.inference.inputs import Rows
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.sampling import Sampling

LOG_PROBS, EPISTEMIC = "teacher_log_probs", "teacher_epistemic"


class ClassRows:
    """Inputs of a classifier, or questions, and once the teacher has answered its predictive of them.

    Args:
        inputs: As `BlobModel.predict` takes a list of them.
        rows: The same, tokenized.
        max_length: With which they were, if with any.
    """

    def __init__(self, inputs: Sequence[Any], rows: Rows | ChoiceRows, max_length: int | None = None) -> None:
        self.inputs, self.rows, self.max_length = list(inputs), rows, max_length
        self.log_probs = torch.empty(0)
        self.epistemic = torch.empty(0)

    def __len__(self) -> int:
        return len(self.inputs)

    def ask(self, teacher: BlobModel, sampling: Sampling, cache: TargetCache, batch_size: int, block: int) -> None:
        """Have `log_probs` `(inputs, classes)` and `epistemic` `(inputs,)`, nats: what `teacher.predict` says.

        After the temperature, where one was fitted: the student's softmax is to be what the teacher would answer.

        Args:
            batch_size: Inputs that share a forward.
            block: Inputs that share a shard.
        """

        def answer(indices: Sequence[int]) -> Shard:
            found = self.answered(teacher, sampling, batch_size, indices)
            with np.errstate(divide="ignore"):  # a choice that a question does not have
                log_probs = np.log(found.probabilities)
            return {
                LOG_PROBS: torch.from_numpy(log_probs).float(),
                EPISTEMIC: torch.from_numpy(found.epistemic).float(),
            }

        shards = cache.answers([_content(row) for row in self._each()], block, answer)
        self.log_probs = torch.cat([shard[LOG_PROBS] for shard in shards])
        self.epistemic = torch.cat([shard[EPISTEMIC] for shard in shards])

    def answered(
        self, model: BlobModel, sampling: Sampling, batch_size: int, indices: Sequence[int] | None = None
    ) -> Prediction:
        """What `model.predict` says of these inputs, default all."""
        inputs = self.inputs if indices is None else [self.inputs[index] for index in indices]
        return model.predict(inputs, sampling=sampling, batch_size=batch_size, max_length=self.max_length)

    def _each(self) -> Iterator[Any]:
        if isinstance(self.rows, ChoiceRows):
            yield from self.rows.rows
            return
        for index in range(len(self.rows)):
            yield {name: values[index].tolist() for name, values in self.rows.columns.items()}

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch for `loss`."""
        batch = self.rows.batch(indices, torch.device("cpu"))
        return {**batch, LOG_PROBS: self.log_probs[list(indices)]}

    def loss(self, student: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Mean KL(teacher || student) of a batch, nats an input."""
        targets = batch.pop(LOG_PROBS)
        return kl_classes(student(**batch).logits, targets).mean()


def _content(row: Any) -> bytes:
    return json.dumps(row, sort_keys=True, default=str).encode()
