"""What is decided beside an answer: which classes cannot be ruled out, and whether to answer at all.

The rules are fitted to held-out rows on higher floors and are companions of the adapter; this floor asks them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from blob_hf.inference.predict import companions_of
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.sampling import Sampling

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ClassDecisions:
    """What is decided on inputs of a classifier.

    Attributes:
        sets: Whether a class is in the input's prediction set, `(inputs, classes)`.
        abstain: Whether the input is better left to somebody else, `(inputs,)`.
    """

    sets: Bools
    abstain: Bools


@runtime_checkable
class ClassRule(Protocol):
    """A companion of an adapter that decides on class probabilities."""

    def decide(self, model: BlobModel, probabilities: Floats, sampling: Sampling) -> ClassDecisions | None:
        """Decide on probabilities `(inputs, classes)` of these samples' predictive; None where it was not fitted so."""


@runtime_checkable
class TextRule(Protocol):
    """A companion of an adapter that decides on written texts."""

    def abstains(
        self, model: BlobModel, uncertainty: Mapping[str, Floats], sampling: Sampling, decoding: Mapping[str, object]
    ) -> Bools | None:
        """Whether texts of these uncertainties `(inputs,)` are withheld, `(inputs,)`; None where it was not fitted so.

        Args:
            decoding: How the texts were written, as `blob_hf.inference.predictor.how_written` says it.
        """


def class_rule(model: BlobModel) -> ClassRule | None:
    """What the active adapter decides on class probabilities by, if anything was fitted."""
    return next((one for one in companions_of(model) if isinstance(one, ClassRule)), None)


def text_rule(model: BlobModel) -> TextRule | None:
    """What the active adapter decides on texts by, if anything was fitted."""
    return next((one for one in companions_of(model) if isinstance(one, TextRule)), None)
