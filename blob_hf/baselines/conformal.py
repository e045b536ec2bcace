"""Decisions with a guarantee, from held-out rows that nothing else was fitted to.

Prediction sets by split conformal prediction (Vovk et al., 2005): of inputs like the held-out ones, at least 1 - alpha
have their class in the set. The score is LAC (Sadinle et al., JASA 2019: 1 - p of the class) or APS (Romano et al.,
NeurIPS 2020: the probability of all classes down to it). A threshold on the confidence by Learn then Test (Angelopoulos
et al., 2021): with probability 1 - delta over the draw of the held-out rows, at most alpha of the inputs that are
answered are answered wrongly.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blob_hf.baselines.posterior_scale import PosteriorScale
from blob_hf.baselines.temperature import Temperatures
from blob_hf.inference.decisions import Bools, ClassDecisions, Floats
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.registry import Companion, register_companion
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

CONFORMAL_FILE = "conformal.json"
SCORES = ("lac", "aps")
DEFAULT_DELTA = 0.1
_EPSILON = 1e-8  # by which two probabilities are equal, as MAPIE has it


def check_level(name: str, value: float) -> None:
    """Refuse a share that is none.

    Args:
        name: What it is called.

    Raises:
        BlobError: Not between 0 and 1.
    """
    if not 0 < value < 1:
        raise BlobError(f"{name} must be > 0 and < 1, got {value:g}")


def least_rows(alpha: float) -> int:
    """The fewest held-out rows that can promise anything: with fewer every class is in every set."""
    return max(1, math.ceil(1 / alpha - 1e-9) - 1)


def check_rows(count: int, alpha: float) -> None:
    """Refuse too few held-out rows.

    Raises:
        BlobError: There are fewer than `least_rows`.
    """
    if count < least_rows(alpha):
        raise BlobError(
            f"conformal_alpha {alpha:g} needs at least {least_rows(alpha)} held-out rows that nothing else is fitted "
            f"to, got {count}: hold out more (calibration_samples, calibration_file), or take a larger alpha"
        )


# ----- what a rule was fitted to --------------------------------------------------------------------------------


def fitted_to(model: BlobModel, sampling: Sampling) -> dict[str, object]:
    """What the probabilities of a model depend on beside its weights; a rule holds for these alone."""
    temperatures, scale = (model.companion(kind.slot) for kind in (Temperatures, PosteriorScale))
    return {
        **{name: getattr(sampling, name) for name in ("num_samples", "seed", "draw", "layers", "tolerance")},
        "temperatures": list(asdict(temperatures).values()) if isinstance(temperatures, Temperatures) else None,
        "posterior_scale": scale.scale if isinstance(scale, PosteriorScale) else None,
    }


def still_holds(then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Compare what a rule was fitted to with what it is asked about; other samples or another decoding are warned of.

    Raises:
        BlobError: The adapter has another temperature or scale by now, so that the rule says nothing.
    """
    sampled = bool(now["num_samples"])
    for name in ("temperatures", *(["posterior_scale"] if sampled else [])):
        if then.get(name) != now[name]:
            raise BlobError(
                f"the adapter's decisions were fitted with {name.replace('_', ' ')} {then.get(name)}, but it has "
                f"{now[name]} now: fit them again, or delete their file"
            )
    relevant = [name for name in now if sampled or name not in _OF_SAMPLES]  # the mean has no samples to be others
    changed = {name: now[name] for name in relevant if then.get(name) != now[name]}
    if changed:
        own = ", ".join(f"{name} {then.get(name)!r}" for name in changed)
        other = ", ".join(f"{name} {value!r}" for name, value in changed.items())
        warn_once(f"the adapter's decisions were fitted with {own}; with {other} their guarantee does not hold")


_OF_SAMPLES = ("num_samples", "seed", "draw", "layers", "tolerance", "posterior_scale")


@lru_cache
def warn_once(message: str) -> None:
    """Log a warning the first time: a file is predicted in many pieces."""
    logger.warning("%s", message)


# ----- classes --------------------------------------------------------------------------------------------------


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
        numbers = [self.quantile, *([] if self.confidence is None else [self.confidence])]
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers):
            raise ValueError("not numbers")


@register_companion
@dataclass(frozen=True)
class PredictionSets(Companion):
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

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha)
        check_level("delta", self.delta)
        if self.score not in SCORES:
            raise BlobError(f"the conformity score must be one of {', '.join(SCORES)}, got {self.score!r}")

    @classmethod
    def load(cls, folder: Path) -> "PredictionSets | None":
        file = folder / CONFORMAL_FILE
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            found |= {
                name: None if found[name] is None else ClassThresholds(**found[name]) for name in ("mean", "predictive")
            }
            found["fitted_to"] = dict(found["fitted_to"])
            if found["mean"] is None:
                raise TypeError
            return cls(**found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BlobError(f"{file} is damaged: it has no thresholds of prediction sets; get it again") from error

    def save(self, model: BlobModel, folder: Path) -> None:
        files.write_text(folder / CONFORMAL_FILE, json.dumps(asdict(self), indent=2) + "\n")

    def settings(self) -> dict[str, object]:
        return {"prediction sets": f"{self.score}, alpha {self.alpha:g}, fitted to {self.rows} held-out rows"}

    def decide(self, model: BlobModel, probabilities: Floats, sampling: Sampling) -> ClassDecisions | None:
        still_holds(self.fitted_to, fitted_to(model, sampling))
        return self.decided(probabilities, sampled=sampling.num_samples > 0)

    def decided(self, probabilities: Floats, sampled: bool) -> ClassDecisions | None:
        """Decisions on probabilities `(inputs, classes)` of the samples' predictive, or of the posterior mean."""
        own = self.predictive if sampled else self.mean
        if own is None:
            warn_once("the adapter's prediction sets were fitted to its posterior mean: there are none for samples")
            return None
        sets = conformal_sets(probabilities, own.quantile, self.score)
        sure = probabilities.max(axis=1)
        answered = np.zeros(len(sure), dtype=bool) if own.confidence is None else sure >= own.confidence
        return ClassDecisions(sets, ~answered)


def conformal_sets(probabilities: Floats, quantile: float, score: str) -> Bools:
    """Prediction sets `(inputs, classes)`: the classes whose conformity score is not above a quantile.

    A class of probability 0, as of a choice that a question does not have, is in no set. Those of APS have at least one
    class, those of LAC may have none: then no class is as likely as that of most held-out rows.
    """
    if score == "lac":
        smallest: NDArray[Any] = np.full((len(probabilities), 1), 1 - quantile)
    else:  # the likeliest classes up to the one with which they reach the quantile
        ordered = -np.sort(-probabilities, axis=1)
        reached = ordered.cumsum(axis=1) >= quantile - _EPSILON
        last = np.where(reached.any(axis=1), reached.argmax(axis=1), probabilities.shape[1] - 1)
        smallest = ordered[np.arange(len(ordered)), last, None]
    return (probabilities >= smallest - _EPSILON) & (probabilities > 0)
