"""The numbers that a classifier's run reports: the same metrics for the posterior mean (N=0) and for N samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from blob_hf.metrics.calibration import calibration_metrics, check_predictions
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
        accuracy, macro_f1, ece, nll, brier of the predictive of the N samples, and rejection_area, its mean accuracy
        over all shares of rejected inputs, least certain first; the same as `mean_*` for the posterior mean;
        `*_sample_std`, the std over samples of each sample's own metric; entropies in nats.
    """
    metrics = _scores(log_probs, labels)
    metrics.update({MEAN + name: value for name, value in _scores(mean, labels).items()})
    each = [_scores(samples[:, s], labels) for s in range(samples.shape[1])]
    metrics.update({name + STD: float(np.std([one[name] for one in each])) for name in each[0]})
    metrics.update(uncertainty_metrics(samples))
    curves = rejection_curves(samples, mean, labels)
    metrics["rejection_area"] = 1 - curves.get(SAMPLES_CURVE, curves[MEAN_CURVE]).area
    metrics[f"{MEAN}rejection_area"] = 1 - curves[MEAN_CURVE].area
    return metrics


def _scores(log_probs: Floats, labels: NDArray[np.integer]) -> dict[str, float]:
    return {**calibration_metrics(log_probs, labels), "macro_f1": macro_f1(log_probs, labels)}


def macro_f1(log_probs: Floats, labels: NDArray[np.integer]) -> float:
    """Mean F1 over the classes that occur among the labels or the predictions, each counting the same.

    Args:
        log_probs: Log-probabilities `(examples, classes)`, nats.
        labels: Class ids `(examples,)`.

    Returns:
        A fraction in [0, 1]; a class that is never predicted rightly has F1 0.
    """
    scores, targets = check_predictions(log_probs, labels)
    return float(f1_score(targets, scores.argmax(axis=1), average="macro", zero_division=0))


@dataclass(frozen=True)
class ClassReport:
    """How each class fares.

    Attributes:
        table: precision, recall, f1 (fractions in [0, 1]) and support (true examples) of each class, by name.
        confusion: Counts `(classes, classes)`: true class by predicted class.
    """

    table: pd.DataFrame
    confusion: NDArray[np.int64]


def class_report(log_probs: Floats, labels: NDArray[np.integer], names: Sequence[str]) -> ClassReport:
    """Precision, recall, F1 and support of each class, and which classes are taken for which.

    Args:
        log_probs: Log-probabilities `(examples, classes)`, nats.
        labels: Class ids `(examples,)`.
        names: Of the classes, in the order of their ids.
    """
    scores, targets = check_predictions(log_probs, labels)
    predicted, classes = scores.argmax(axis=1), list(range(scores.shape[1]))
    values = precision_recall_fscore_support(targets, predicted, labels=classes, zero_division=0)
    columns = dict(zip(("precision", "recall", "f1", "support"), values, strict=True))
    table = pd.DataFrame(columns, index=pd.Index(list(names), name="class"))
    return ClassReport(table, confusion_matrix(targets, predicted, labels=classes))


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
