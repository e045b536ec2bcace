"""One scale on all stds of a trained posterior, fitted to held-out rows: as cheap as temperature scaling.

The samples then lie s times as far from the mean: the temperature of the posterior is s^2 (a cold posterior for s < 1,
Wenzel et al., ICML 2020). Temperature scaling changes how sure the averaged probabilities are; this changes how far the
networks are apart, so that rankings change, too: which inputs are uncertain, and what the answer is.

A dozen rows that happen to be easy would have the samples be one network, so s has a prior, log s ~ N(0, (log 2)^2):
what is minimised is the NLL of all held-out rows less the log of that. It is at most some nats, so that from some
hundred rows on the rows decide.
"""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from blob_hf.tuner.layer import GaussianA
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import samplable_layers
from blob_hf.tuner.registry import Companion, register_companion
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

SCALE_FILE = "posterior_scale.json"
LARGEST = 16.0
PRIOR_FACTOR = 2.0  # one std of the prior on s, as a factor
COARSE, FINE = 2.0, 2.0**0.25  # ratio of neighbouring scales while walking downhill, and of the last ones compared


@register_companion
@dataclass(frozen=True)
class PosteriorScale(Companion):
    """The scale of an adapter's posterior, and how it was found.

    Attributes:
        scale: s. A Gaussian posterior is saved with its stds multiplied by it already; samples that are made from the
            weights (dropout masks, Laplace's factors) are scaled when they are drawn.
        held_out: Examples or tokens that it was fitted to, 0 if it was given.
        nll_before, nll_after: Of their predictive before the fit and after it, nats each.
    """

    scale: float
    held_out: int = 0
    nll_before: float | None = None
    nll_after: float | None = None

    slot = "posterior_scale"
    name = "posterior_scale"
    files = (SCALE_FILE,)

    @classmethod
    def load(cls, folder: Path) -> "PosteriorScale | None":
        file = folder / SCALE_FILE
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**found, "scale": float(found["scale"])})
        except (ValueError, KeyError, TypeError) as error:
            raise BlobError(f"{file} is damaged: it has no scale; get it again") from error

    def attach(self, model: BlobModel, folder: Path) -> None:
        for layer in samplable_layers(model):
            if not isinstance(layer, GaussianA):
                layer.scale_noise(self.scale)

    def save(self, model: BlobModel, folder: Path) -> None:
        files.write_text(folder / SCALE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    def settings(self) -> dict[str, object]:
        return {
            "posterior scale": f"{self.scale:.3g}"
            + (f", fitted to {self.held_out} examples or tokens" if self.held_out else "")
        }


def scale_posterior(model: BlobModel, scale: float) -> None:
    """Have the samples of a model lie `scale` times as far from the mean as they do, in place.

    Raises:
        BlobError: scale <= 0, or the model has no samples or those of an ensemble.
    """
    if not scale > 0:
        raise BlobError(f"the scale of a posterior must be > 0, got {scale}; without samples the mean predicts")
    for layer in samplable_layers(model):
        layer.scale_noise(scale)
    before = model.companion(PosteriorScale.slot)
    model.set_companion(PosteriorScale(scale * (before.scale if isinstance(before, PosteriorScale) else 1.0)))


def fit_posterior_scale(model: BlobModel, nll: Callable[[], tuple[float, int]]) -> PosteriorScale:
    """Scale a posterior such that the predictive of held-out rows has the smallest NLL, given the prior, in place.

    Args:
        model: With a trained posterior, or other samples around a mean.
        nll: Of the predictive, summed over these rows, nats, and the number of their examples or tokens; with the same
            random numbers at each call, so that it is continuous.

    Returns:
        What was found; the model has it as its companion.

    Raises:
        BlobError: The model has no samples, or those of an ensemble.
    """
    current = 1.0
    totals: dict[float, float] = {}
    count = 0

    def penalised(scale: float) -> float:
        nonlocal current, count
        scale_posterior(model, scale / current)
        current, (totals[scale], count) = scale, nll()
        return totals[scale] + 0.5 * (math.log(scale) / math.log(PRIOR_FACTOR)) ** 2

    best = smallest(penalised)
    scale_posterior(model, best / current)
    whole = model.companion(PosteriorScale.slot)
    assert isinstance(whole, PosteriorScale)  # an adapter that was scaled before has the product
    found = PosteriorScale(whole.scale, count, totals[1.0] / count, totals[best] / count)
    model.set_companion(found)
    logger.info("posterior scale %.3g: held-out NLL %.4f -> %.4f", best, found.nll_before, found.nll_after)
    return found


def smallest(loss: Callable[[float], float]) -> float:
    """Where a loss is least: downhill from 1 by factors of `COARSE`, at most by `LARGEST`, then between neighbours."""
    tried = {1.0: loss(1.0)}

    def best() -> float:
        return min(tried, key=lambda scale: tried[scale])

    def look(scale: float) -> None:
        if 1 / LARGEST <= scale <= LARGEST and scale not in tried:
            tried[scale] = loss(scale)

    for step in (COARSE, 1 / COARSE):
        while True:
            before = best()
            look(before * step)
            if best() == before:
                break
    ratio = COARSE
    while ratio > FINE * 1.001:
        ratio **= 0.5
        centre = best()
        look(centre * ratio)
        look(centre / ratio)
    return best()
