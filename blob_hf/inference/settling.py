"""As many samples as each input needs: inputs leave the batch when their predictive has settled.

Samples are drawn in rounds. After a round an input is settled if the standard error of its averaged probabilities is
at most `Sampling.tolerance`, for every class. What an input is given depends on the input and the seed alone, not on
the batch it is in (but for rounding).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

LogProbs = NDArray[np.floating]


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
    """Of the average over samples, `(inputs, classes)`.

    Of antithetic pairs the averages are independent, not the samples. Two of them tell little of how they vary, so
    the larger of two estimates counts until there are four pairs: that from the pairs, and half of that from the
    samples taken for independent ones (what is odd in the noise, which is most of it, cancels).

    Args:
        probabilities: `(inputs, samples, classes)`.
        in_pairs: Whether samples 2k and 2k + 1 are a pair.
    """
    count = probabilities.shape[1]
    of_samples = probabilities.std(axis=1, ddof=1) / np.sqrt(count)
    if not in_pairs or count % 2:
        return of_samples
    pairs = (probabilities[:, 0::2] + probabilities[:, 1::2]) / 2
    if count == 2:
        return of_samples
    of_pairs = pairs.std(axis=1, ddof=1) / np.sqrt(count // 2)
    return of_pairs if count >= 8 else np.maximum(of_pairs, of_samples / 2)


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
    for part in rounds(sampling):
        for index, scores in zip(active, draw(active, part), strict=True):
            found[index].append(scores)
        drawn = part.first + part.num_samples - sampling.first
        if drawn < sampling.num_samples:
            probabilities = np.exp(np.stack([np.concatenate(found[index]) for index in active]).astype(np.float64))
            errors = standard_error(probabilities, sampling.in_pairs).max(axis=-1)
            active = [index for index, error in zip(active, errors, strict=True) if error > sampling.tolerance]
        if not active:
            break
    each = [np.concatenate(parts) for parts in found]
    networks = np.array([len(one) for one in each])
    filled = [np.tile(one, (sampling.num_samples // len(one), 1)) for one in each]
    return Settled(np.stack(filled), networks)
