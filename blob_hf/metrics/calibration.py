"""Accuracy, expected calibration error, NLL and Brier score, exact over the whole set."""

from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from torchmetrics.functional.classification import multiclass_calibration_error

from blob_hf.errors import BlobError


def check_predictions(log_probs: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Validate log-probabilities `(examples, classes)` and labels `(examples,)`, and return them as arrays.

    Raises:
        BlobError: Wrong shapes, no examples, a label outside the classes, rows that are not log-probabilities.
    """
    scores = np.asarray(log_probs, dtype=np.float64)
    targets = np.asarray(labels)
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise BlobError(
            f"expected log_probs (examples, classes) and labels (examples,), got {scores.shape} and {targets.shape}"
        )
    if len(scores) == 0:
        raise BlobError("there are no examples to measure")
    bad = (targets < 0) | (targets >= scores.shape[1])
    if bad.any():
        raise BlobError(f"label {targets[bad][0]} is outside the range of {scores.shape[1]} classes")
    totals = logsumexp(scores, axis=1)
    normalised = np.abs(totals) < 1e-3  # False for NaN
    if not normalised.all():
        raise BlobError(
            f"rows must be log-probabilities, but one has log-sum-exp {totals[~normalised][0]:.3g}; apply log_softmax"
        )
    return scores, targets.astype(np.int64)


def accuracy(log_probs: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of examples whose most probable class is the label (the first of equal ones)."""
    scores, targets = check_predictions(log_probs, labels)
    return float((scores.argmax(axis=1) == targets).mean())


def ece(log_probs: ArrayLike, labels: ArrayLike, num_bins: int = 15) -> float:
    """Expected calibration error (Naeini et al., 2015): L1, equal-width bins of the largest probability, in [0, 1]."""
    scores, targets = check_predictions(log_probs, labels)
    probs = torch.from_numpy(_probabilities(scores))
    value = multiclass_calibration_error(
        probs, torch.from_numpy(targets), num_classes=scores.shape[1], n_bins=num_bins, norm="l1"
    )
    return float(value)


def nll(log_probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean negative log-likelihood of the labels, nats; infinite when a label has probability 0."""
    scores, targets = check_predictions(log_probs, labels)
    return float(-scores[np.arange(len(targets)), targets].mean())


def brier(log_probs: ArrayLike, labels: ArrayLike) -> float:
    """Brier score: mean over examples of sum_c (p_c - y_c)^2, in [0, 2]."""
    scores, targets = check_predictions(log_probs, labels)
    error = np.exp(scores)
    error[np.arange(len(targets)), targets] -= 1
    return float(np.square(error).sum(axis=1).mean())


def calibration_metrics(log_probs: ArrayLike, labels: ArrayLike, num_bins: int = 15) -> dict[str, float]:
    """accuracy, ece, nll and brier by name.

    Args:
        log_probs: Log-probabilities `(examples, classes)`, nats.
        labels: Class ids `(examples,)`.
        num_bins: Bins of the ECE.
    """
    return {
        "accuracy": accuracy(log_probs, labels),
        "ece": ece(log_probs, labels, num_bins),
        "nll": nll(log_probs, labels),
        "brier": brier(log_probs, labels),
    }


@dataclass(frozen=True)
class ReliabilityBins:
    """Per bin of confidence: mean confidence, accuracy (both NaN in an empty bin) and number of examples."""

    edges: NDArray[np.float64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    count: NDArray[np.int64]


def reliability_bins(log_probs: ArrayLike, labels: ArrayLike, num_bins: int = 15) -> ReliabilityBins:
    """The bins behind `ece`: sum over bins of count / n * |accuracy - confidence| equals it."""
    scores, targets = check_predictions(log_probs, labels)
    probs = _probabilities(scores)
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == targets
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64).numpy()  # torchmetrics' own edges
    index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, num_bins - 1)
    count = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, confidence, num_bins) / count
        mean_accuracy = np.bincount(index, correct, num_bins) / count
    return ReliabilityBins(edges, mean_confidence, mean_accuracy, count)


def _probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    # Just below 1: torchmetrics takes rows outside [0, 1] for logits, and puts a confidence of exactly 1 into a bin
    # of its own, where the definition's last bin is closed at 1.
    return np.clip(np.exp(scores), 0.0, np.nextafter(1.0, 0.0))


class Calibration(evaluate.Metric):
    """`evaluate.Metric` of `calibration_metrics`: predictions are rows of log-probabilities, references labels."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, ECE (15 equal-width bins, L1), NLL (nats) and Brier score.",
            citation="",
            inputs_description="predictions: log-probabilities per class; references: class ids.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any, num_bins: int = 15) -> dict[str, float]:
        return calibration_metrics(predictions, references, num_bins)
