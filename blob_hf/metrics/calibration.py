"""Accuracy, expected calibration error, NLL and Brier score, exact over the whole set."""

from dataclasses import dataclass

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from torchmetrics.functional.classification import multiclass_calibration_error

from blob_hf.utils.errors import BlobError

_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def check_log_probs(scores: NDArray[np.float64]) -> None:
    """Check that the last axis holds log-probabilities in nats; -inf, a probability of 0, is allowed.

    Raises:
        BlobError: A NaN, or a row whose log-sum-exp is not within 1e-3 of 0.
    """
    if np.isnan(scores).any():
        raise BlobError("log-probabilities must be numbers, but some are NaN; look for inf or NaN in the logits")
    totals = logsumexp(scores, axis=-1)
    bad = ~(np.abs(totals) < 1e-3)
    if bad.any():
        raise BlobError(
            f"rows must be log-probabilities, but one has log-sum-exp {totals[bad][0]:.3g}; apply log_softmax"
        )


def check_predictions(log_probs: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Validate log-probabilities `(examples, classes)` and labels `(examples,)`, and return them as arrays.

    Raises:
        BlobError: Wrong shapes, no examples, a label that is no class id, rows that are not log-probabilities.
    """
    scores = np.asarray(log_probs, dtype=np.float64)
    targets = np.asarray(labels)
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise BlobError(
            f"expected log_probs (examples, classes) and labels (examples,), got {scores.shape} and {targets.shape}"
        )
    if len(scores) == 0:
        raise BlobError("there are no examples to measure")
    if targets.dtype.kind not in "iub":
        raise BlobError(f"labels must be integer class ids, got dtype {targets.dtype}")
    bad = (targets < 0) | (targets >= scores.shape[1])
    if bad.any():
        raise BlobError(f"label {targets[bad][0]} is outside the range of {scores.shape[1]} classes")
    check_log_probs(scores)
    return scores, targets.astype(np.int64)


def accuracy(log_probs: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of examples whose most probable class is the label (the first of equal ones)."""
    scores, targets = check_predictions(log_probs, labels)
    return float((scores.argmax(axis=1) == targets).mean())


def ece(log_probs: ArrayLike, labels: ArrayLike, num_bins: int = 15) -> float:
    """Expected calibration error (Naeini et al., 2015): L1, equal-width bins of the largest probability.

    Args:
        log_probs: Log-probabilities `(examples, classes)`, nats.
        labels: Class ids `(examples,)`.
        num_bins: Bins [k/n, (k+1)/n) of confidence; the last one is closed.

    Returns:
        sum_b count_b / n * |accuracy_b - confidence_b|, a fraction in [0, 1].

    Raises:
        BlobError: Bad predictions (`check_predictions`) or fewer than one bin.
    """
    scores, targets = check_predictions(log_probs, labels)
    _check_bins(num_bins)
    probs = torch.from_numpy(_probabilities(scores))
    value = multiclass_calibration_error(
        probs, torch.from_numpy(targets), num_classes=scores.shape[1], n_bins=num_bins, norm="l1"
    )
    return float(value)


def nll(log_probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean negative log-likelihood of the labels, nats; infinite when a label has probability 0."""
    scores, targets = check_predictions(log_probs, labels)
    return float((0.0 - scores[np.arange(len(targets)), targets]).mean())  # 0 - x: a sure model has 0, not -0


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

    Returns:
        accuracy and ece in [0, 1], nll in nats, brier in [0, 2].

    Raises:
        BlobError: Bad predictions (`check_predictions`) or fewer than one bin.
    """
    return {
        "accuracy": accuracy(log_probs, labels),
        "ece": ece(log_probs, labels, num_bins),
        "nll": nll(log_probs, labels),
        "brier": brier(log_probs, labels),
    }


@dataclass(frozen=True)
class ReliabilityBins:
    """Per bin of confidence: mean confidence, accuracy (both NaN in an empty bin) and number of examples; their ECE."""

    edges: NDArray[np.float64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    count: NDArray[np.int64]
    ece: float


def reliability_bins(log_probs: ArrayLike, labels: ArrayLike, num_bins: int = 15) -> ReliabilityBins:
    """The bins behind `ece`: sum over bins of count / n * |accuracy - confidence| equals it.

    Args:
        log_probs: Log-probabilities `(examples, classes)`, nats.
        labels: Class ids `(examples,)`.
        num_bins: Equal-width bins of confidence.

    Returns:
        Edges `(num_bins + 1,)`; confidence, accuracy and count `(num_bins,)`; and the ECE itself.

    Raises:
        BlobError: Bad predictions (`check_predictions`) or fewer than one bin.
    """
    scores, targets = check_predictions(log_probs, labels)
    _check_bins(num_bins)
    probs = _probabilities(scores)
    largest, correct = probs.max(axis=1), probs.argmax(axis=1) == targets
    edges = torch.linspace(0, 1, num_bins + 1).numpy()  # torchmetrics bins in float32: the same bins, edges included
    index = np.searchsorted(edges, largest.astype(np.float32), side="right") - 1
    count = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, largest, num_bins) / count
        mean_accuracy = np.bincount(index, correct, num_bins) / count
    error = ece(scores, targets, num_bins)
    return ReliabilityBins(np.linspace(0, 1, num_bins + 1), mean_confidence, mean_accuracy, count, error)


@dataclass(frozen=True)
class Confidence:
    """Of each prediction its largest probability and whether it is right, `(examples,)`, among so many classes."""

    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]
    num_classes: int


def confidence(log_probs: ArrayLike, labels: ArrayLike) -> Confidence:
    """How sure each prediction is and whether it is right (the first of equally probable classes counts).

    Args:
        log_probs: Log-probabilities `(examples, classes)`, nats.
        labels: Class ids `(examples,)`.

    Raises:
        BlobError: Bad predictions (`check_predictions`).
    """
    scores, targets = check_predictions(log_probs, labels)
    return Confidence(np.exp(scores.max(axis=1)), scores.argmax(axis=1) == targets, scores.shape[1])


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise BlobError(f"num_bins must be >= 1, got {num_bins}")


def _probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    # Just below 1 in float32, which torchmetrics casts to: it takes rows outside [0, 1] for logits, and puts a
    # confidence of exactly 1 into a bin of its own, where the definition's last bin is closed at 1.
    return np.clip(np.exp(scores), 0.0, _BELOW_ONE)


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

    def _compute(self, predictions: ArrayLike, references: ArrayLike, num_bins: int = 15) -> dict[str, float]:
        return calibration_metrics(predictions, references, num_bins)
