"""What the task `blob_choices` reads, and how it scores the answers; blob_choices.yaml names these functions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from scipy.special import log_softmax

from blob_hf.data.multiple_choice import PUBLISHED, find_task, load_choices
from blob_hf.metrics.calibration import ece
from blob_hf.utils.errors import BlobError

Scored = tuple[list[float], int]  # log-probabilities of a question's choices, and the index of the right one


def load(data_file: str | None = None, task_name: str | None = None, **others: Any) -> DatasetDict:
    """Questions of a file, and `asked`, what precedes an answer: as `--scoring text` of our script asks.

    Args:
        data_file: With the columns that `run_multiple_choice_blob.py` reads.
        task_name: Of a task that asks otherwise than ARC: openbookqa, boolq.
        others: The model's arguments, which the harness hands to every task.

    Raises:
        BlobError: No file, no labels, or a row that is no question.
    """
    if data_file is None:
        raise BlobError("blob_choices needs a file of questions: --metadata data_file=questions.jsonl")
    if not Path(data_file).exists():
        raise BlobError(f"data_file {data_file} does not exist")
    template = (PUBLISHED if task_name is None else find_task(task_name).asking).text
    rows = load_choices(task_name, {"test": str(data_file)})["test"]
    if "label" not in rows.column_names:
        raise BlobError(f"{data_file} has no labels to compare the answers with; add a column label")

    def ask(row: Mapping[str, Any]) -> dict[str, str]:
        return {"asked": template.format(question=row["question"], passage=row.get("passage") or "").lstrip()}

    return DatasetDict(test=rows.map(ask, load_from_cache_file=False))


def score(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """A question's metrics, from the log-likelihoods of its choices.

    Args:
        results: Log-likelihood of each choice, nats, and whether greedy decoding would write it.

    Returns:
        acc and acc_norm (per character), as the harness has them; nll (nats) and brier of the softmax over the
        choices; for ece that softmax's logarithm with the label.
    """
    scores, label = np.array([value for value, _ in results]), int(doc["label"])
    per_character = scores / np.array([len(choice) for choice in doc["choices"]])
    log_probs = log_softmax(scores)
    error = np.exp(log_probs) - np.eye(len(scores))[label]
    return {
        "acc": float(scores.argmax() == label),
        "acc_norm": float(per_character.argmax() == label),
        "nll": float(-log_probs[label]),
        "brier": float(np.square(error).sum()),
        "ece": (log_probs.tolist(), label),
    }


def calibration_error(scored: Sequence[Scored]) -> float:
    """Expected calibration error over questions, which may have different numbers of choices; in [0, 1]."""
    padded = np.full((len(scored), max(len(values) for values, _ in scored)), -np.inf)
    for row, (values, _) in zip(padded, scored, strict=True):
        row[: len(values)] = values
    return ece(padded, np.array([label for _, label in scored]))
