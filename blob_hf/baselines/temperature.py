"""Temperature scaling (Guo et al., ICML 2017): one number, fitted to held-out rows, that every method has to beat.

For a predictive of several networks it is applied to the averaged probabilities: pool, then calibrate (Rahaman &
Thiery, NeurIPS 2021).
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from blob_hf.baselines.base import METHOD_FILE, read_facts
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.registry import Companion, register_companion
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

TEMPERATURE_FILE = "temperature.json"

_BOUNDS = (np.log(0.02), np.log(50.0))  # of log T


def scale(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities `(examples, classes)`, nats, of p^(1/T) normalised."""
    return log_softmax(log_probs / temperature, axis=-1)


def fit_temperature(log_probs: np.ndarray, labels: np.ndarray) -> float:
    """The temperature under which the labels have the smallest NLL.

    The NLL is convex in 1/T, so what a bounded search finds is the minimum. Where every label is the likeliest class it
    has none: T is then at its bound, 0.02, and the log says so.

    Args:
        log_probs: `(examples, classes)`, nats.
        labels: Class ids `(examples,)`.
    """
    rows = np.arange(len(labels))
    if (log_probs.argmax(axis=1) == labels).all():
        logger.warning(
            "all %d held-out rows are right, so their temperature is the least there is, %.2g: predictions become "
            "certain, and one that is wrong costs much; hold more rows out, or leave temperature scaling",
            len(labels),
            np.exp(_BOUNDS[0]),
        )

    def nll(log_temperature: float) -> float:
        return float(-scale(log_probs, np.exp(log_temperature))[rows, labels].mean())

    return float(np.exp(minimize_scalar(nll, bounds=_BOUNDS, method="bounded", options={"xatol": 1e-5}).x))


@register_companion
@dataclass(frozen=True)
class Temperatures(Companion):
    """Temperatures of an adapter, of whatever method: of the samples' predictive, and of the mean's."""

    predictive: float
    mean: float

    slot = "temperature"
    fitted = True
    name = "temperature"
    files = (TEMPERATURE_FILE,)

    @classmethod
    def load(cls, folder: Path) -> "Temperatures | None":
        file = folder / TEMPERATURE_FILE
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            if found is None:  # adapters of the first version had them in method.json
                file, found = folder / METHOD_FILE, read_facts(folder).get("temperatures")
            return None if found is None else cls(float(found["predictive"]), float(found["mean"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BlobError(f"{file} is damaged: it has no temperatures; get it again") from error

    def calibrated(self, log_probs: np.ndarray, sampled: bool) -> np.ndarray:
        """Scaled by the temperature of the predictive, or of the mean."""
        return scale(log_probs, self.predictive if sampled else self.mean)

    def save(self, model: BlobModel, folder: Path) -> None:
        files.write_text(folder / TEMPERATURE_FILE, json.dumps(asdict(self), indent=2) + "\n")
