"""As many samples as each input needs: inputs leave the batch when their predictive has settled.

Samples are drawn in rounds. After a round an input is settled if the standard error of its averaged probabilities,
estimated with caution, is at most `Sampling.tolerance` for every class. What an input is given depends on the input and
the seed alone, not on the batch it is in (but for rounding).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import chi2

from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

LogProbs = NDArray[np.floating]

_CONFIDENCE = 0.95
_LEAST = 1e-9  # log-odds of probabilities that are 0 or 1 in floating point
_NODES, _WEIGHTS = hermegauss(21)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def rounds(sampling: Sampling) -> Iterator[Sampling]:
    """The samples in the rounds after which inputs may leave.

    A round ends at a divisor of `num_samples`, after whole pairs: so all that was drawn for an input that left can be
    repeated to `num_samples` without changing an average.
    """
    total, step = sampling.num_samples, 2
    ends = [end for end in range(step, total, step) if total % end == 0]
    start = 0
    for end in [*ends, total]:
        yield replace(sampling, num_samples=end - start, first=sampling.first + start)
        start = end


def standard_error(probabilities: LogProbs, in_pairs: bool) -> LogProbs:
    """An upper bound of the standard error of the average over samples, `(inputs, classes)`.

    The spread of a few probabilities is no measure: two networks that are sure of the same may be so by chance, and who
    leaves whenever they are, is too sure of the wrong (stopping looks at what it averages). Their log-odds still differ
    where probabilities no longer do. So the noise is taken for Gaussian there, its standard deviation is bounded from
    above (95 %, by chi-square), and carried back through the sigmoid to an average over samples, or over pairs in which
    what is odd cancels.

    Args:
        probabilities: `(inputs, samples, classes)`, at least two samples.
        in_pairs: Whether samples 2k and 2k + 1 are a pair.
    """
    count = probabilities.shape[1]
    in_pairs = in_pairs and count % 2 == 0
    odds = logit(probabilities.clip(_LEAST, 1 - _LEAST))
    independent, freedom = (count // 2, count // 2) if in_pairs else (count, count - 1)
    bound = odds.std(axis=1, ddof=1) * np.sqrt(freedom / chi2.ppf(1 - _CONFIDENCE, freedom))
    centre, away = odds.mean(axis=1)[..., None], bound[..., None] * _NODES
    values = expit(centre + away)
    if in_pairs:
        values = (values + expit(centre - away)) / 2
    spread = np.sqrt(((values - (values * _WEIGHTS).sum(-1, keepdims=True)) ** 2 * _WEIGHTS).sum(-1))
    return spread / np.sqrt(independent)


@dataclass(frozen=True)
class Settled:
    """What every input was given.

    Attributes:
        log_probs: log p(y | x, A_s), `(inputs, num_samples, classes)`, nats; the samples of an input that left early
            are repeated, as often for each, so that averages over them are those of what was drawn.
        networks: How many samples each input took, `(inputs,)`.
    """

    log_probs: LogProbs
    networks: NDArray[np.int64]


def settle(count: int, sampling: Sampling, draw: Callable[[Sequence[int], Sampling], LogProbs]) -> Settled:
    """Draw samples for each input until its predictive has settled.

    Args:
        count: Inputs.
        draw: log p(y | x, A_s), `(inputs, samples, classes)`, of some inputs (their indices) and samples.
    """
    if sampling.tolerance is None:
        raise BlobError("drawing until the predictive has settled needs a tolerance: Sampling.auto()")
    found: list[list[LogProbs]] = [[] for _ in range(count)]
    active = list(range(count))
    in_pairs = sampling.in_pairs and sampling.first % 2 == 0  # else rounds hold the ends of two pairs
    for part in rounds(sampling):
        for index, scores in zip(active, draw(active, part), strict=True):
            found[index].append(scores)
        drawn = part.first + part.num_samples - sampling.first
        if drawn < sampling.num_samples:
            probabilities = np.exp(np.stack([np.concatenate(found[index]) for index in active]).astype(np.float64))
            errors = standard_error(probabilities, in_pairs).max(axis=-1)
            active = [index for index, error in zip(active, errors, strict=True) if error > sampling.tolerance]
        if not active:
            break
    each = [np.concatenate(parts) for parts in found]
    networks = np.array([len(one) for one in each])
    filled = [np.tile(one, (sampling.num_samples // len(one), 1)) for one in each]
    return Settled(np.stack(filled), networks)
