"""Telling out-of-distribution inputs by how uncertain the predictive is."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from blob_hf.metrics.uncertainty import mutual_information, predictive_entropy, predictive_log_probs
from blob_hf.utils.errors import BlobError

DETECTION_METRICS = ("auroc", "aupr", "fpr95")


def detection_metrics(inside: ArrayLike, outside: ArrayLike) -> dict[str, float]:
    """How well a score tells two sets apart, out-of-distribution being the positive class (scikit-learn).

    Args:
        inside: Scores of in-distribution inputs, `(n,)`, higher means stranger.
        outside: Scores of out-of-distribution inputs, `(m,)`.

    Returns:
        auroc; aupr (average precision; by chance m / (n + m)); fpr95, the share of in-distribution inputs that are
        flagged at the threshold which flags 95 % of the others.

    Raises:
        BlobError: One of the sets is empty, or a score is not finite.
    """
    negative, positive = np.asarray(inside, dtype=float), np.asarray(outside, dtype=float)
    if negative.ndim != 1 or positive.ndim != 1 or not len(negative) or not len(positive):
        raise BlobError(f"need scores of both sets, (n,) and (m,), got {negative.shape} and {positive.shape}")
    scores = np.concatenate([negative, positive])
    if not np.isfinite(scores).all():
        raise BlobError("scores must be finite")
    truth = np.concatenate([np.zeros(len(negative)), np.ones(len(positive))])
    false_rate, true_rate, _ = roc_curve(truth, scores, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(truth, scores)),
        "aupr": float(average_precision_score(truth, scores)),
        "fpr95": float(false_rate[np.searchsorted(true_rate, 0.95)]),
    }


def uncertainty_scores(sample_log_probs: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """Scores `(batch,)` that are higher where a classifier is less sure.

    Args:
        sample_log_probs: `(batch, samples, classes)`, nats; of one network with samples = 1.

    Returns:
        entropy of the predictive, max_prob (1 - the largest probability) and, of several samples, mutual_information.
    """
    values = np.asarray(sample_log_probs, dtype=np.float64)
    scores = {"entropy": predictive_entropy(values), "max_prob": -np.expm1(predictive_log_probs(values).max(axis=-1))}
    if values.shape[1] > 1:
        scores["mutual_information"] = mutual_information(values)
    return scores


def detection_report(inside: ArrayLike, outside: ArrayLike, prefix: str = "") -> dict[str, float]:
    """`detection_metrics` of each of the scores of `uncertainty_scores`, as `{prefix}{score}_{metric}`."""
    scores = uncertainty_scores(inside), uncertainty_scores(outside)
    return {
        f"{prefix}{name}_{metric}": value
        for name in scores[0]
        for metric, value in detection_metrics(scores[0][name], scores[1][name]).items()
    }
