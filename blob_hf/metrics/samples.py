"""How many posterior samples are enough: the NLL of the predictive of n of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from blob_hf.utils.errors import BlobError

NEAR = 0.01  # "enough": within 1 % of the NLL of all samples
_SUBSETS = 100


@dataclass(frozen=True)
class NLLCurve:
    """NLL of the predictive of n samples.

    Attributes:
        samples: n, `(points,)`, the last is all of them.
        nll: Mean over the inputs, nats, `(points,)`; where there are more subsets than one, averaged over them.
        spread: Its std over the subsets, `(points,)`.
    """

    samples: NDArray[np.int64]
    nll: NDArray[np.float64]
    spread: NDArray[np.float64]

    @property
    def enough(self) -> int:
        """The smallest n from which on the NLL is within 1 % of that of all samples."""
        far = np.flatnonzero(np.abs(self.nll - self.nll[-1]) > NEAR * abs(self.nll[-1]))
        return int(self.samples[far[-1] + 1 if len(far) else 0])


def nll_curve(sample_log_probs: ArrayLike, labels: ArrayLike, antithetic: bool = False, seed: int = 0) -> NLLCurve:
    """NLL of the average probability of n samples, n = 1 ... S, averaged over 100 random choices of n among them.

    Args:
        sample_log_probs: `(batch, samples, classes)`, nats.
        labels: Class ids `(batch,)`.
        antithetic: Samples 2k and 2k + 1 are a pair and stay together; n counts in twos.
        seed: Of the choices.

    Raises:
        BlobError: Nothing to measure, or other shapes.
    """
    scores, targets = np.asarray(sample_log_probs, dtype=float), np.asarray(labels)
    if scores.ndim != 3 or scores.size == 0 or targets.shape != scores.shape[:1]:
        raise BlobError(f"expected (batch, samples, classes) and (batch,), got {scores.shape} and {targets.shape}")
    own = scores[np.arange(len(targets)), :, targets]  # the labels' log-probabilities, (batch, samples)
    if antithetic and own.shape[1] > 1:
        pairs = [own[:, first : first + 2] for first in range(0, own.shape[1] - 1, 2)]
        own = np.stack([logsumexp(pair, axis=1) - np.log(2) for pair in pairs], axis=1)
    count = own.shape[1]
    rng = np.random.default_rng(seed)
    values = []
    for size in range(1, count + 1):
        chosen = [rng.choice(count, size, replace=False) for _ in range(_SUBSETS if size < count else 1)]
        values.append([-(logsumexp(own[:, subset], axis=1) - np.log(size)).mean() for subset in chosen])
    sizes = np.arange(1, count + 1) * (2 if antithetic and scores.shape[1] > 1 else 1)
    return NLLCurve(sizes, np.array([np.mean(one) for one in values]), np.array([np.std(one) for one in values]))
