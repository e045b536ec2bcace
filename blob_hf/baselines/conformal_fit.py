"""Fitting prediction sets and a threshold for answering to held-out rows, with MAPIE."""

import importlib.util
import math
import warnings
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binom
from sklearn.base import BaseEstimator, ClassifierMixin

from blob_hf.baselines.conformal import SCORES, ClassThresholds
from blob_hf.baselines.fitted_rules import check_level, check_rows
from blob_hf.inference.decisions import Floats
from blob_hf.utils.errors import BlobError

# Confidences that are tried, from sure to any: even in log-odds, because they crowd near 1. They must not depend on the
# held-out rows, nor may it where the tests begin: few inputs are as sure as the first, so the tests begin at several.
CONFIDENCES: Floats = np.append(expit(8.0 - 0.25 * np.arange(41)), 0.0)
STARTS = 5


def require_mapie() -> None:
    """Refuse to fit without MAPIE; what was fitted needs it no more.

    Raises:
        BlobError: It is not installed.
    """
    if importlib.util.find_spec("mapie") is None:
        raise BlobError("prediction sets need MAPIE to be fitted: pip install 'blob_hf[conformal]'")


def check_score(labels: Iterable[int], score: str) -> None:
    """Refuse APS for two classes, for which MAPIE has none: all classes down to the second are both.

    Args:
        labels: Class ids of the held-out rows.

    Raises:
        BlobError: The score is aps, and the rows are of no more than two classes.
    """
    count = len(set(labels))
    if score != SCORES[0] and count < 3:
        raise BlobError(
            f"the conformity score {score} needs held-out rows of three or more classes, got {count}: take lac"
        )


def fit_thresholds(
    probabilities: Floats, labels: NDArray[np.integer], alpha: float, delta: float, score: str = "lac"
) -> ClassThresholds:
    """Thresholds of prediction sets and of answering.

    Args:
        probabilities: Of held-out rows, `(rows, classes)`.
        labels: Their class ids, `(rows,)`.
        alpha, delta, score: As of `PredictionSets`. The U of aps is drawn for each row, from one seed: the same rows
            have the same thresholds.

    Raises:
        BlobError: MAPIE is not installed, there are too few rows, no classes (a regression), or two, and the score is
            aps.
    """
    require_mapie()
    check_level("alpha", alpha)
    check_level("delta", delta)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise BlobError(
            f"prediction sets are of two or more classes, got probabilities of shape {probabilities.shape} (a "
            "regression has none)"
        )
    if len(labels) != len(probabilities):
        raise BlobError(f"need a label for each row, got {len(labels)} for {len(probabilities)}")
    check_rows(len(labels), alpha)
    check_score(labels.tolist(), score)
    scores = np.sort(_conformity(probabilities, labels, score))
    rank = math.ceil(round((len(scores) + 1) * (1 - alpha), 9))  # 0.9 * 10 is 9, whatever floats make of it
    wrong = probabilities.argmax(axis=1) != labels
    return ClassThresholds(float(scores[rank - 1]), answering_threshold(probabilities.max(axis=1), wrong, alpha, delta))


def _conformity(probabilities: Floats, labels: NDArray[np.integer], score: str) -> Floats:
    from mapie.classification import SplitConformalClassifier

    given = _Given(np.arange(probabilities.shape[1]))
    fitted = SplitConformalClassifier(given, conformity_score=score, random_state=0)  # of APS's U
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*less labels than your training dataset.*")  # rare classes
        fitted.conformalize(probabilities, labels)
    return np.asarray(fitted.conformity_scores, dtype=np.float64).ravel()


class _Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted classifier, as scikit-learn has them, whose inputs are its probabilities."""

    def __init__(self, classes: NDArray[np.integer]) -> None:
        self.classes = classes

    @property
    def classes_(self) -> NDArray[np.integer]:
        return self.classes

    def fit(self, X: Floats, y: NDArray[np.integer]) -> "_Given":
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict_proba(self, X: Floats) -> Floats:
        return X

    def predict(self, X: Floats) -> NDArray[np.integer]:
        return self.classes[X.argmax(axis=1)]


def answering_threshold(confidence: Floats, wrong: NDArray[np.bool_], alpha: float, delta: float) -> float | None:
    """The lowest confidence from which on the answers are wrong at a rate that is surely at most alpha.

    Learn then Test (Angelopoulos et al., 2021): for each of `CONFIDENCES` the hypothesis that the rate is above alpha,
    with the exact binomial p-value of the errors among the rows that would be answered; fixed-sequence tests from
    several starts keep the probability of rejecting any true one below delta.

    Args:
        confidence: Of the likeliest class, `(rows,)`.
        wrong: Whether it is not the label, `(rows,)`.

    Returns:
        None if no hypothesis is rejected: the rows are too few, or too many of them are wrong.
    """
    from mapie.risk_control import FWERFixedSequenceTesting, control_fwer

    answered = confidence >= CONFIDENCES[:, None]
    p_values = binom.cdf((answered & wrong).sum(axis=1), answered.sum(axis=1), alpha)
    valid = control_fwer(p_values, delta, FWERFixedSequenceTesting(n_starts=STARTS))
    return float(CONFIDENCES[np.max(valid)]) if len(valid) else None
