"""Selective prediction: is the quality better where the uncertainty is lower?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blob_hf.utils.errors import BlobError


@dataclass(frozen=True)
class RiskCoverage:
    """Mean risk of the most certain inputs.

    Attributes:
        coverage: Share of the inputs that are answered, 1/n ... 1, `(n,)`.
        risk: Mean risk of these inputs, `(n,)`.
        area: Mean of `risk` over all coverages (AURC; Geifman et al., 2019), lower is better.
    """

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    area: float


def risk_coverage(uncertainty: ArrayLike, risk: ArrayLike) -> RiskCoverage:
    """Risk-coverage curve: answer the inputs from the most to the least certain.

    Inputs of equal uncertainty are answered in random order: each counts with the mean risk of its group.

    Args:
        uncertainty: `(n,)`, higher is less certain.
        risk: `(n,)`, for example 1 - ROUGE-L.

    Raises:
        BlobError: No inputs, unequal lengths, or values that are not finite.
    """
    uncertainties, risks = _checked(uncertainty, risk)
    _, group = np.unique(uncertainties, return_inverse=True)
    tied = np.bincount(group, weights=risks) / np.bincount(group)
    order = np.argsort(uncertainties, kind="stable")
    count = np.arange(1, len(risks) + 1)
    curve = np.cumsum(tied[group][order]) / count
    return RiskCoverage(count / len(risks), curve, float(curve.mean()))


def _checked(uncertainty: ArrayLike, risk: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    uncertainties, risks = np.asarray(uncertainty, dtype=float), np.asarray(risk, dtype=float)
    if uncertainties.ndim != 1 or uncertainties.shape != risks.shape or len(risks) == 0:
        raise BlobError(f"need one uncertainty and one risk per input, got {uncertainties.shape} and {risks.shape}")
    if not (np.isfinite(uncertainties).all() and np.isfinite(risks).all()):
        raise BlobError("uncertainties and risks must be finite")
    return uncertainties, risks


def prediction_rejection_ratio(uncertainty: ArrayLike, risk: ArrayLike) -> float:
    """PRR (Malinin et al., 2017): 1 for an uncertainty that orders the inputs by their risk, 0 for random order.

    (random area - area) / (random area - oracle area); NaN where all inputs have the same risk.
    """
    area, oracle = risk_coverage(uncertainty, risk).area, risk_coverage(risk, risk).area
    random = float(np.mean(np.asarray(risk, dtype=float)))
    if np.isclose(random, oracle, rtol=0, atol=1e-12):
        return float("nan")
    return (random - area) / (random - oracle)


@dataclass(frozen=True)
class Selection:
    """What a threshold on the uncertainty does: inputs above it are not answered.

    Attributes:
        answered: Number of inputs that are answered.
        coverage: Their share of all.
        risk: Their mean risk; NaN where none is answered.
    """

    answered: int
    coverage: float
    risk: float


def select(uncertainty: ArrayLike, risk: ArrayLike, threshold: float) -> Selection:
    """Answer the inputs whose uncertainty is at most a threshold.

    Args:
        uncertainty, risk: As of `risk_coverage`.

    Raises:
        BlobError: As `risk_coverage`.
    """
    uncertainties, risks = _checked(uncertainty, risk)
    kept = uncertainties <= threshold
    risk_of_kept = float(risks[kept].mean()) if kept.any() else float("nan")
    return Selection(int(kept.sum()), float(kept.mean()), risk_of_kept)
