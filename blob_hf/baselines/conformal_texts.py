"""Abstention of a model that writes, with a guarantee: conformal risk control (Angelopoulos et al., ICLR 2024).

A text is bad if its loss, 1 - ROUGE-L of the best reference, is above max_loss, and it is written where its uncertainty
u is below a threshold t. The loss of an input is 1 where a bad text is written, else 0: it never falls as t grows. So
the largest t for which (sum of the losses of the n held-out rows + 1) / (n + 1) <= alpha makes the probability that the
next input, exchangeable with them, gets a bad text at most alpha.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blob_hf.baselines.fitted_rules import FittedRule, check_finite, check_level, check_rows, fitted_to, still_holds
from blob_hf.inference.decisions import Bools, Floats
from blob_hf.metrics.summarization import rouge_per_example
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.registry import register_companion
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

TEXTS_FILE = "conformal_texts.json"
SCORE = "token_entropy"  # which every method has, with samples and without


@dataclass(frozen=True)
class TextThreshold:
    """Of one way to write, with samples or with the posterior mean.

    Attributes:
        below: Texts of a smaller uncertainty are written; None: all of them are.
    """

    below: float | None

    def __post_init__(self) -> None:
        if self.below is not None:
            check_finite(self.below)


@register_companion
@dataclass(frozen=True)
class TextAbstention(FittedRule):
    """When an adapter that writes abstains, and what that was fitted to.

    Attributes:
        alpha: Share of inputs that may get a bad text.
        max_loss: Largest loss, 1 - ROUGE-L, of a text that is not bad.
        score: Name of the uncertainty.
        rows: Held-out rows.
        mean, predictive: Thresholds of the posterior mean, and of the samples (None for a point).
        fitted_to: See `conformal.fitted_to`, with how the texts were written.
    """

    alpha: float
    max_loss: float
    score: str
    rows: int
    mean: TextThreshold
    predictive: TextThreshold | None
    fitted_to: Mapping[str, object]

    slot = "conformal_texts"
    name = "abstention"
    files = (TEXTS_FILE,)
    thresholds = TextThreshold
    what = "threshold to abstain by"

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha)
        check_level("max_loss", self.max_loss)
        if not isinstance(self.score, str):
            raise TypeError("no name of an uncertainty")

    def settings(self) -> dict[str, object]:
        return {
            "abstention": f"by {self.score}, alpha {self.alpha:g}, bad is a ROUGE-L below {1 - self.max_loss:g}, "
            f"fitted to {self.rows} held-out rows"
        }

    def abstains(
        self, model: BlobModel, uncertainty: Mapping[str, Floats], sampling: Sampling, decoding: Mapping[str, object]
    ) -> Bools | None:
        still_holds(self.fitted_to, {**fitted_to(model, sampling), **decoding})
        own = self.of(sampled=sampling.num_samples > 0)
        if own is None:
            return None
        scores = uncertainty[self.score]
        return np.zeros(len(scores), dtype=bool) if own.below is None else scores >= own.below


def fit_text_threshold(uncertainty: Floats, bad: NDArray[np.bool_], alpha: float) -> TextThreshold:
    """The largest threshold that conformal risk control allows.

    Args:
        uncertainty: Of the texts of held-out rows, `(rows,)`.
        bad: Whether they are, `(rows,)`.

    Raises:
        BlobError: There are too few rows, or an uncertainty is not finite.
    """
    check_level("alpha", alpha)
    check_rows(len(bad), alpha)
    if not np.isfinite(uncertainty).all():
        raise BlobError("the uncertainties of the held-out texts must be finite")
    allowed = math.floor(alpha * (len(bad) + 1) + 1e-9) - 1  # bad texts among the held-out ones that are written
    ordered = np.sort(uncertainty[bad])
    return TextThreshold(float(ordered[allowed]) if allowed < len(ordered) else None)


def is_bad(texts: Sequence[str], references: Sequence[Sequence[str]], max_loss: float) -> NDArray[np.bool_]:
    """Whether the loss 1 - ROUGE-L of each text, against the best of its references, is above `max_loss`."""
    return 1 - rouge_per_example(texts, references)["rougeL"] > max_loss
