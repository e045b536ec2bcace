"""The numbers that a classifier's run reports: the same metrics for the posterior mean (N=0) and for N samples."""

import numpy as np
from numpy.typing import NDArray

from blob_hf.metrics.calibration import calibration_metrics
from blob_hf.metrics.detection import uncertainty_scores
from blob_hf.metrics.selective import RiskCoverage, risk_coverage
from blob_hf.metrics.uncertainty import predictive_log_probs, uncertainty_metrics
from blob_hf.utils.names import MEAN, STD

Floats = NDArray[np.floating]
MEAN_CURVE, SAMPLES_CURVE = "posterior mean, max. probability", "samples, max. probability"


def classification_metrics(
    log_probs: NDArray[np.floating],
    samples: NDArray[np.floating],
    mean: NDArray[np.floating],
    labels: NDArray[np.integer],
) -> dict[str, float]:
    """What a classifier is worth with its samples (N=S), with its mean (N=0), and how far single samples differ.

    Args:
        log_probs: Log-probabilities of the predictive, `(examples, classes)`, nats.
        samples: Those of each posterior sample, `(examples, samples, classes)`.
        mean: Those of the posterior mean, `(examples, classes)`.
        labels: Class ids `(examples,)`.

    Returns:
        accuracy, ece, nll, brier of the predictive of the N samples, and rejection_area, its mean accuracy over all
        shares of rejected inputs, least certain first; the same as `mean_*` for the posterior mean;
        `*_sample_std`, the std over samples of each sample's own metric; entropies in nats.
    """
    metrics = calibration_metrics(log_probs, labels)
    metrics.update({MEAN + name: value for name, value in calibration_metrics(mean, labels).items()})
    each = [calibration_metrics(samples[:, s], labels) for s in range(samples.shape[1])]
    metrics.update({name + STD: float(np.std([one[name] for one in each])) for name in each[0]})
    metrics.update(uncertainty_metrics(samples))
    curves = rejection_curves(samples, mean, labels)
    metrics["rejection_area"] = 1 - curves.get(SAMPLES_CURVE, curves[MEAN_CURVE]).area
    metrics[f"{MEAN}rejection_area"] = 1 - curves[MEAN_CURVE].area
    return metrics


def rejection_curves(samples: Floats, mean: Floats, labels: NDArray[np.integer]) -> dict[str, RiskCoverage]:
    """Error against coverage: of the posterior mean, of the samples' predictive, and if an oracle chose.

    Args:
        samples: Log-probabilities `(examples, samples, classes)`, nats.
        mean: The posterior mean's, `(examples, classes)`.
        labels: Class ids `(examples,)`.
    """
    curves = {}
    scores = uncertainty_scores(mean[:, None])
    wrong = (mean.argmax(-1) != labels).astype(float)
    curves[MEAN_CURVE] = risk_coverage(scores["max_prob"], wrong)
    if samples.shape[1] > 1:
        scores = uncertainty_scores(samples)
        wrong = (predictive_log_probs(samples).argmax(-1) != labels).astype(float)
        curves[SAMPLES_CURVE] = risk_coverage(scores["max_prob"], wrong)
        curves["samples, mutual information"] = risk_coverage(scores["mutual_information"], wrong)
    curves["oracle"] = risk_coverage(wrong, wrong)
    return curves
