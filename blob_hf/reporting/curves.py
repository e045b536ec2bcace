"""What the plots draw, described by its parts alone: `blob_hf.metrics` computes it, and anybody else may."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Reliability(Protocol):
    """Bins of confidence: `edges` `(bins + 1,)`, and of each bin mean confidence, accuracy and number of examples.

    `ece` is the calibration error of these bins, a fraction.
    """

    @property
    def edges(self) -> NDArray[np.float64]: ...
    @property
    def confidence(self) -> NDArray[np.float64]: ...
    @property
    def accuracy(self) -> NDArray[np.float64]: ...
    @property
    def count(self) -> NDArray[np.int64]: ...
    @property
    def ece(self) -> float: ...


class Confidence(Protocol):
    """Of each prediction its largest probability and whether it is right, both `(examples,)`, among so many classes."""

    @property
    def confidence(self) -> NDArray[np.float64]: ...
    @property
    def correct(self) -> NDArray[np.bool_]: ...
    @property
    def num_classes(self) -> int: ...


class NLLCurve(Protocol):
    """NLL in nats of n samples' average and its spread over choices of n, `(points,)`; `enough` is the n to take."""

    @property
    def samples(self) -> NDArray[np.int64]: ...
    @property
    def nll(self) -> NDArray[np.float64]: ...
    @property
    def spread(self) -> NDArray[np.float64]: ...
    @property
    def enough(self) -> int: ...


class RiskCoverage(Protocol):
    """Mean risk of the most certain inputs over the share that is answered, `(n,)`, and the mean of it."""

    @property
    def coverage(self) -> NDArray[np.float64]: ...
    @property
    def risk(self) -> NDArray[np.float64]: ...
    @property
    def area(self) -> float: ...


class LayerStd(Protocol):
    """The mean posterior std of one layer."""

    @property
    def mean_std(self) -> float: ...
