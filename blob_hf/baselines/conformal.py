"""Decisions with a guarantee, from held-out rows that nothing else was fitted to.

Prediction sets by split conformal prediction (Vovk et al., 2005): of inputs like the held-out ones, at least 1 - alpha
have their class in the set. The score is LAC (Sadinle et al., JASA 2019: 1 - p of the class) or APS (Romano et al.,
NeurIPS 2020: the probability of all classes down to it, less U p of the class itself, U uniform on [0, 1)). U is drawn
for the held-out rows alone: a set has every class that some U would have put into it, so it is never empty, and covers
at least as often as one with a U of its own. A threshold on the confidence by Learn then Test (Angelopoulos et al.,
2021): with probability 1 - delta over the draw of the held-out rows, at most alpha of the inputs that are answered are
answered wrongly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blob_hf.baselines.fitted_rules import FittedRule, check_finite, check_level, fitted_to, still_holds
from blob_hf.inference.decisions import Bools, ClassDecisions, Floats
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.registry import register_companion
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

CONFORMAL_FILE = "conformal.json"
SCORES = ("lac", "aps")
DEFAULT_DELTA = 0.1
_EPSILON = 1e-8  # by which two probabilities are equal, as MAPIE has it


@dataclass(frozen=True)
class ClassThresholds:
    """Of one predictive, that of samples or of the posterior mean.

    Attributes:
        quantile: Of the conformity scores of the held-out rows: a class with a larger one is not in the set.
        confidence: From which on an input is answered: probability of the likeliest class. None: no threshold has its
            error rate controlled by the held-out rows, nothing is answered.
    """

    quantile: float
    confidence: float | None

    def __post_init__(self) -> None:
        check_finite(self.quantile, *([] if self.confidence is None else [self.confidence]))


@register_companion
@dataclass(frozen=True)
class PredictionSets(FittedRule):
    """Prediction sets and abstention of a classifier's adapter, and what they were fitted to.

    Attributes:
        alpha: Share of inputs whose class may be missing in their set, and of answered inputs that may be wrong.
        delta: Probability, over the draw of the held-out rows, that more of the answered inputs are wrong.
        score: `lac` or `aps`.
        rows: Held-out rows.
        mean: Thresholds of the posterior mean.
        predictive: Of the samples; None for a point.
        fitted_to: See `fitted_to`; num_samples 0 for a point.
    """

    alpha: float
    delta: float
    score: str
    rows: int
    mean: ClassThresholds
    predictive: ClassThresholds | None
    fitted_to: Mapping[str, object]

    slot = "conformal"
    name = "prediction sets"
    files = (CONFORMAL_FILE,)
    thresholds = ClassThresholds
    what = "thresholds of prediction sets"

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha)
        check_level("delta", self.delta)
        if self.score not in SCORES:
            raise BlobError(f"the conformity score must be one of {', '.join(SCORES)}, got {self.score!r}")

    def settings(self) -> dict[str, object]:
        return {"prediction sets": f"{self.score}, alpha {self.alpha:g}, fitted to {self.rows} held-out rows"}

    def decide(self, model: BlobModel, probabilities: Floats, sampling: Sampling) -> ClassDecisions | None:
        still_holds(self.fitted_to, fitted_to(model, sampling))
        return self.decided(probabilities, sampled=sampling.num_samples > 0)

    def decided(self, probabilities: Floats, sampled: bool) -> ClassDecisions | None:
        """Decisions on probabilities `(inputs, classes)` of the samples' predictive, or of the posterior mean."""
        own = self.of(sampled)
        if own is None:
            return None
        sets = conformal_sets(probabilities, own.quantile, self.score)
        sure = probabilities.max(axis=1)
        answered = np.zeros(len(sure), dtype=bool) if own.confidence is None else sure >= own.confidence
        return ClassDecisions(sets, ~answered)


def conformal_sets(probabilities: Floats, quantile: float, score: str) -> Bools:
    """Prediction sets `(inputs, classes)`: the classes whose conformity score is not above a quantile.

    That of APS is its smallest, of a U near 1: the probability of the classes above it. Of classes that are equally
    likely all are in the set, or none. A class of probability 0, as of a choice that a question does not have, is in no
    set. Sets of APS have at least one class, those of LAC may have none: then no class is as likely as that of most
    held-out rows.
    """
    if score == "lac":
        smallest: NDArray[Any] = np.full((len(probabilities), 1), 1 - quantile)
    else:  # the likeliest classes up to the one with which they reach the quantile
        ordered = -np.sort(-probabilities, axis=1)
        reached = ordered.cumsum(axis=1) >= quantile - _EPSILON
        last = np.where(reached.any(axis=1), reached.argmax(axis=1), probabilities.shape[1] - 1)
        smallest = ordered[np.arange(len(ordered)), last, None]
    return (probabilities >= smallest - _EPSILON) & (probabilities > 0)
