"""What rules that decide beside an answer have in common: their levels, what they were fitted to, and their files."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from blob_hf.baselines.posterior_scale import PosteriorScale
from blob_hf.baselines.temperature import Temperatures
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.registry import Companion
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)


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


def fitted_to(model: BlobModel, sampling: Sampling) -> dict[str, object]:
    """What the probabilities of a model depend on beside its weights; a rule holds for these alone.

    Where inputs are cut (`max_length`) is not in it: that changes only those that are longer, and a rule sees none.
    """
    temperatures, scale, method = (model.companion(slot) for slot in (Temperatures.slot, PosteriorScale.slot, "method"))
    return {
        **{name: getattr(sampling, name) for name in _OF_SAMPLING},
        "predictive": getattr(method, "predictive", None),  # Laplace's two ways, of which none is saved
        "temperatures": list(asdict(temperatures).values()) if isinstance(temperatures, Temperatures) else None,
        "posterior_scale": scale.scale if isinstance(scale, PosteriorScale) else None,
    }


def still_holds(then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Compare what a rule was fitted to with what it is asked about; other samples or another decoding are warned of.

    Raises:
        BlobError: The adapter has another temperature or scale by now, so that the rule says nothing.
    """
    changed = differences(then, now)
    for name in ("temperatures", "posterior_scale"):
        if name in changed:
            own, other = changed[name]
            raise BlobError(
                f"the adapter's decisions were fitted with {name.replace('_', ' ')} {own}, but it has {other} now: fit "
                "them again, or delete their file"
            )
    if changed:
        own, other = (", ".join(f"{name} {pair[i]!r}" for name, pair in changed.items()) for i in (0, 1))
        warn_once(f"the adapter's decisions were fitted with {own}; with {other} their guarantee does not hold")


def differences(then: Mapping[str, object], now: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """What a rule was fitted to and what it is asked about, of all that is not the same; empty where it holds."""
    sampled = bool(now["num_samples"])
    names = [name for name in {**now, **then} if sampled or name not in _OF_SAMPLES]  # the mean has no samples
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}


_KINDS: dict[str, Any] = {"num_samples": int, "seed": int, "draw": str, "layers": int, "tolerance": (int, float)}
_OF_SAMPLING = tuple(_KINDS)
_OF_SAMPLES = (*_OF_SAMPLING, "predictive", "posterior_scale", "decoding", "temperature", "utility")


@lru_cache
def warn_once(message: str) -> None:
    """Log a warning the first time: a file is predicted in many pieces."""
    logger.warning("%s", message)


def check_finite(*values: object) -> None:
    """Refuse what a threshold cannot be.

    Raises:
        ValueError: Not a finite number.
    """
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise ValueError("not numbers")


def check_samples(then: Mapping[str, object]) -> None:
    """Refuse what no samples can have been drawn by.

    Args:
        then: What a rule was fitted to, as its file has it.

    Raises:
        ValueError: A value of another type, or out of its range.
    """
    given: dict[str, Any] = {name: then[name] for name in _OF_SAMPLING if then.get(name) is not None}
    if not all(isinstance(value, _KINDS[name]) for name, value in given.items()):
        raise ValueError("not a sampling")
    Sampling(**given)


class FittedRule(Companion):
    """A dataclass of thresholds of the posterior mean, and of the samples (None for a point), in a json file.

    Attributes:
        mean, predictive: Of the class `thresholds`.
        rows: Held-out rows.
        fitted_to: See `fitted_to`.
        what: That file's contents, for messages.
    """

    thresholds: ClassVar[type[Any]]
    what: ClassVar[str]
    fitted = True
    mean: Any
    predictive: Any
    rows: int
    fitted_to: Mapping[str, object]

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        file = folder / cls.files[0]
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            found |= {
                name: None if found[name] is None else cls.thresholds(**found[name]) for name in ("mean", "predictive")
            }
            found["fitted_to"] = dict(found["fitted_to"])
            check_samples(found["fitted_to"])
            if found["mean"] is None:
                raise TypeError
            return cls(**found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BlobError(f"{file} is damaged: it has no {cls.what}; get it again") from error

    def save(self, model: BlobModel, folder: Path) -> None:
        written: Any = self
        files.write_text(folder / self.files[0], json.dumps(asdict(written), indent=2) + "\n")

    def differences(
        self, model: BlobModel, sampling: Sampling, decoding: Mapping[str, object]
    ) -> dict[str, tuple[object, object]]:
        """What was otherwise where it was fitted than it is for these samples; empty where its promise holds.

        Args:
            decoding: How texts are written, as of `TextRule.abstains`; empty for classes.
        """
        return differences(self.fitted_to, {**fitted_to(model, sampling), **decoding})

    def of(self, sampled: bool) -> Any:
        """Thresholds of the samples' predictive or of the posterior mean; None where there are none, which is said."""
        own = self.predictive if sampled else self.mean
        if own is None:
            warn_once(f"the adapter's {self.name}: fitted to its posterior mean alone, there are none for samples")
        return own
