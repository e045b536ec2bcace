"""Entropies of the posterior predictive, in nats: how uncertain, and how much of it the samples disagree about."""

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, logsumexp

from blob_hf.metrics.calibration import check_log_probs
from blob_hf.utils.errors import BlobError


def _check(sample_log_probs: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(sample_log_probs, dtype=np.float64)
    if values.ndim != 3 or values.size == 0:
        raise BlobError(f"expected sample log-probabilities (batch, samples, classes), got shape {values.shape}")
    check_log_probs(values)
    return values


def predictive_log_probs(sample_log_probs: ArrayLike) -> NDArray[np.float64]:
    """log mean_s p_s: log-probabilities of the predictive, `(batch, classes)`.

    Args:
        sample_log_probs: `(batch, samples, classes)`, nats.

    Raises:
        BlobError: Another shape, nothing in it, or rows that are not log-probabilities (so in every function here).
    """
    values = _check(sample_log_probs)
    return logsumexp(values, axis=1) - np.log(values.shape[1])


def predictive_entropy(sample_log_probs: ArrayLike) -> NDArray[np.float64]:
    """H[mean_s p_s] `(batch,)`, nats: total uncertainty."""
    return entr(np.exp(predictive_log_probs(sample_log_probs))).sum(axis=-1)


def expected_entropy(sample_log_probs: ArrayLike) -> NDArray[np.float64]:
    """mean_s H[p_s] `(batch,)`, nats: aleatoric uncertainty."""
    return entr(np.exp(_check(sample_log_probs))).sum(axis=-1).mean(axis=1)


def mutual_information(sample_log_probs: ArrayLike) -> NDArray[np.float64]:
    """Predictive less expected entropy `(batch,)`, nats: epistemic uncertainty (BALD, Houlsby et al., 2011)."""
    return np.maximum(predictive_entropy(sample_log_probs) - expected_entropy(sample_log_probs), 0.0)


def uncertainty_metrics(sample_log_probs: ArrayLike) -> dict[str, float]:
    """Means over the batch of predictive_entropy, expected_entropy and mutual_information, nats."""
    return {
        "predictive_entropy": float(predictive_entropy(sample_log_probs).mean()),
        "expected_entropy": float(expected_entropy(sample_log_probs).mean()),
        "mutual_information": float(mutual_information(sample_log_probs).mean()),
    }


class Uncertainty(evaluate.Metric):
    """`evaluate.Metric` of `uncertainty_metrics`: predictions are (samples, classes) log-probabilities."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Predictive entropy, expected entropy and mutual information, nats.",
            citation="",
            inputs_description="predictions: per-sample log-probabilities, (samples, classes) for each example.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float64")))}
            ),
        )

    def _compute(self, predictions: ArrayLike) -> dict[str, float]:
        return uncertainty_metrics(predictions)
