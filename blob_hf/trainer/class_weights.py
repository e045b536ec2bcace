"""Weights of classes, so that a rare one counts as much in the loss as a frequent one."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import has_length

from blob_hf.inference.predict import IGNORED_LABEL
from blob_hf.utils.errors import BlobError

CLASS_WEIGHTS = ("balanced",)
_COLUMNS = ("labels", "label")


def balanced_weights(rows: Any, num_classes: int) -> Tensor:
    """n / (K n_c) for a class c with n_c of the n rows, K the classes that occur: scikit-learn's `balanced`.

    Args:
        rows: Of a training set, with class ids as `labels` or `label`.

    Returns:
        `(num_classes,)`; 0 for a class that does not occur. Their mean over the rows is 1.

    Raises:
        BlobError: There are no class ids.
    """
    column = next((name for name in _COLUMNS if isinstance(rows, Dataset) and name in rows.column_names), None)
    is_stream = not has_length(rows)
    try:
        if is_stream:
            raise TypeError
        found = list(rows[column]) if column else [row.get("labels", row.get("label")) for row in rows]
        labels = torch.as_tensor(found)
        if labels.dim() != 1 or labels.is_floating_point():
            raise TypeError
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise BlobError(
            "class_weights needs a class id as label of every training row; for other labels leave it out"
        ) from error
    counts = labels.bincount(minlength=num_classes).double()
    return torch.where(counts > 0, len(labels) / (counts.clamp(min=1) * (counts > 0).sum()), 0.0).float()


def total_weight(batches: Iterable[Mapping[str, Any]], weights: Tensor) -> Tensor:
    """Sum of the weights of all labels in some batches."""
    labels = [batch["labels"].flatten() for batch in batches]
    return sum((weights.to(one.device)[one[one != IGNORED_LABEL]].sum() for one in labels), torch.zeros(()))
