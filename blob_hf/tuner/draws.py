"""The random numbers of posterior samples: independent, in antithetic pairs, or spread evenly.

The numbers of sample s are a function of (seed, s, name of the layer) alone, made on the CPU: the same on every device
and rank, however many samples are drawn. Whatever the draw, a sample by itself is N(0, 1) in every coordinate,
independent of the others; draws differ in how samples depend on one another.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from blob_hf.tuner.sampling import Sampling

_CPU = torch.device("cpu")  # whatever torch's default device is
_LEVELS = 6  # binary digits that are scrambled: 64 strata, then the sequence begins again with other jitter
Noise = tuple[str, Sampling, tuple[int, ...]]  # what standard_normal is asked for
_AHEAD: ContextVar[dict[Noise, "Future[Tensor]"] | None] = ContextVar("blob_hf_ahead", default=None)


def sample_generator(name: str, seed: int, index: int) -> torch.Generator:
    """The random numbers of one layer in sample `index` of `seed`, on every device and rank the same."""
    key = hashlib.sha256(f"{seed}/{index}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))


def standard_normal(name: str, sampling: Sampling, shape: Sequence[int]) -> Tensor:
    """eps of every sample, `(num_samples, *shape)`; paired samples 2k and 2k + 1 have eps_k and -eps_k."""
    wanted = (name, sampling, tuple(shape))
    ahead = (_AHEAD.get() or {}).pop(wanted, None)  # for one layer alone: it may change them in place
    noise = _drawn(*wanted) if ahead is None else ahead.result()
    for place, index in enumerate(sampling.indices):
        if sampling.in_pairs and index % 2:
            torch.neg(noise[max(place - 1, 0)], out=noise[place])
    return noise


@contextmanager
def drawn_ahead(wanted: Iterable[Noise]) -> Iterator[None]:
    """Inside the block and in this context, what `standard_normal` is going to be asked for is drawn in threads.

    Each layer has random numbers of its own, so that their order is nobody's business. As many threads as torch's.
    """
    workers = torch.get_num_threads()
    if workers == 1:
        yield
        return
    with ThreadPoolExecutor(workers) as pool:
        before = _AHEAD.set({noise: pool.submit(_drawn, *noise) for noise in wanted})
        try:
            yield
        finally:
            _AHEAD.reset(before)
            pool.shutdown(cancel_futures=True)


def _drawn(name: str, sampling: Sampling, shape: tuple[int, ...]) -> Tensor:
    """eps of every sample, of pairs the first; the second is left open if the first is there."""
    noise = torch.empty(sampling.num_samples, *shape, device=_CPU)
    for place, index in enumerate(sampling.indices):
        if sampling.in_pairs and index % 2 and place:
            continue
        first = index // 2 if sampling.in_pairs else index
        if sampling.draw == "qmc":
            noise[place] = math.sqrt(2) * torch.erfinv(_signed(name, sampling.seed, first, shape))
        else:
            noise[place].normal_(generator=sample_generator(name, sampling.seed, first))
    return noise


def standard_uniform(name: str, sampling: Sampling, shape: Sequence[int]) -> Tensor:
    """u of every sample on [0, 1), `(num_samples, *shape)`; paired samples 2k and 2k + 1 have u_k and 1 - u_k."""
    return torch.stack([_uniform(name, sampling, index, tuple(shape)) for index in sampling.indices])


def _uniform(name: str, sampling: Sampling, index: int, shape: tuple[int, ...]) -> Tensor:
    first = index // 2 if sampling.in_pairs else index
    if sampling.draw == "qmc":
        uniform = ((1 + _signed(name, sampling.seed, first, shape)) / 2).float()
    else:
        uniform = torch.rand(shape, generator=sample_generator(name, sampling.seed, first), device=_CPU)
    return 1 - uniform if sampling.in_pairs and index % 2 else uniform


def _signed(name: str, seed: int, pair: int, shape: tuple[int, ...]) -> Tensor:
    """Points on (-1, 1), double: random signs, and distances from 0 that the pairs of a seed spread evenly.

    The distances are a van der Corput sequence with nested uniform scrambling (Owen, 1995), of its own in each
    coordinate: any 2^m pairs in a row from a multiple of 2^m on have one distance in each of 2^m equal strata, a Latin
    hypercube (McKay et al., 1979). So an average is exact for what is odd, and nearly so for any sum of functions of
    single coordinates. Sobol points would be no better where it counts: they end at 21,201 dimensions, an adapter has
    more, and among so few points as one can pay for their many coordinates are no more even jointly than these.
    """
    stratum = torch.zeros(shape, dtype=torch.float64, device=_CPU)
    for level in range(_LEVELS):
        node = sample_generator(f"{name}/digit {level}", seed, pair % 2**level)  # of the digits before this one
        digit = torch.randint(0, 2, shape, generator=node, device=_CPU) ^ (pair >> level & 1)
        stratum += digit * 2.0 ** (_LEVELS - 1 - level)
    generator = sample_generator(name, seed, pair)
    jitter = torch.rand(shape, generator=generator, dtype=torch.float64, device=_CPU)
    sign = 2.0 * torch.randint(0, 2, shape, generator=generator, device=_CPU) - 1
    # rounding may not reach 1, whose quantile is infinite
    return sign * ((stratum + jitter) / 2**_LEVELS).clamp(max=1 - 2.0**-40)
