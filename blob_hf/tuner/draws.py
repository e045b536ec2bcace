"""The random numbers of posterior samples: independent, in antithetic pairs, or spread evenly.

The numbers of sample s are a function of (seed, s, name of the layer) alone, made on the CPU: the same on every device
and rank, however many samples are drawn. Whatever the draw, a sample by itself is N(0, 1) in every coordinate,
independent of the others; draws differ in how samples depend on one another.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blob_hf.tuner.sampling import Sampling

_LEVELS = 6  # binary digits that are scrambled: 64 strata, then the sequence begins again with other jitter


def sample_generator(name: str, seed: int, index: int) -> torch.Generator:
    """The random numbers of one layer in sample `index` of `seed`, on every device and rank the same."""
    key = hashlib.sha256(f"{seed}/{index}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))


def standard_normal(name: str, sampling: Sampling, shape: Sequence[int]) -> Tensor:
    """eps of every sample, `(num_samples, *shape)`; paired samples 2k and 2k + 1 have eps_k and -eps_k."""
    return torch.stack([_normal(name, sampling, index, tuple(shape)) for index in sampling.indices])


def standard_uniform(name: str, sampling: Sampling, shape: Sequence[int]) -> Tensor:
    """u of every sample on [0, 1), `(num_samples, *shape)`; paired samples 2k and 2k + 1 have u_k and 1 - u_k."""
    return torch.stack([_uniform(name, sampling, index, tuple(shape)) for index in sampling.indices])


def _normal(name: str, sampling: Sampling, index: int, shape: tuple[int, ...]) -> Tensor:
    first = index // 2 if sampling.in_pairs else index
    if sampling.draw == "qmc":
        noise = (math.sqrt(2) * torch.erfinv(_signed(name, sampling.seed, first, shape))).float()
    else:
        noise = torch.randn(shape, generator=sample_generator(name, sampling.seed, first))
    return -noise if sampling.in_pairs and index % 2 else noise


def _uniform(name: str, sampling: Sampling, index: int, shape: tuple[int, ...]) -> Tensor:
    first = index // 2 if sampling.in_pairs else index
    if sampling.draw == "qmc":
        uniform = ((1 + _signed(name, sampling.seed, first, shape)) / 2).float()
    else:
        uniform = torch.rand(shape, generator=sample_generator(name, sampling.seed, first))
    return 1 - uniform if sampling.in_pairs and index % 2 else uniform


def _signed(name: str, seed: int, pair: int, shape: tuple[int, ...]) -> Tensor:
    """Points on (-1, 1), double: random signs, and distances from 0 that the pairs of a seed spread evenly.

    The distances are a van der Corput sequence with nested uniform scrambling (Owen, 1995), of its own in each
    coordinate: any 2^m pairs in a row from a multiple of 2^m on have one distance in each of 2^m equal strata, a Latin
    hypercube (McKay et al., 1979). So an average is exact for what is odd, and nearly so for any sum of functions of
    single coordinates. Sobol points would be no better where it counts: they end at 21,201 dimensions, an adapter has
    more, and among so few points as one can pay for their many coordinates are no more even jointly than these.
    """
    stratum = torch.zeros(shape, dtype=torch.float64)
    for level in range(_LEVELS):
        node = sample_generator(f"{name}/digit {level}", seed, pair % 2**level)  # of the digits before this one
        digit = torch.randint(0, 2, shape, generator=node) ^ (pair >> level & 1)
        stratum += digit * 2.0 ** (_LEVELS - 1 - level)
    generator = sample_generator(name, seed, pair)
    jitter = torch.rand(shape, generator=generator, dtype=torch.float64)
    sign = 2.0 * torch.randint(0, 2, shape, generator=generator) - 1
    # rounding may not reach 1, whose quantile is infinite
    return sign * ((stratum + jitter) / 2**_LEVELS).clamp(max=1 - 2.0**-40)
