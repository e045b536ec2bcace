"""`Sampling`: which networks are drawn from a posterior, in one object from the flag to the layer.

It is here and not beside `predict` and `generate`, which use it, because the layer at the other end reads it, too.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from blob_hf.utils.errors import BlobError

DRAWS = ("iid", "antithetic", "qmc")
AUTO = "auto"  # in the place of a number: as many samples as each input needs
AUTO_SAMPLES, AUTO_TOLERANCE = 24, 0.1  # docs/predictive_cost.md has what others cost and lose


@dataclass(frozen=True)
class Sampling:
    """The posterior samples `first` ... `first + num_samples - 1` of a seed.

    Sample s of a seed is the same weights on every device, rank and batch size, however many are drawn.

    Args:
        num_samples: S; 0 stands for the posterior mean alone.
        seed: Names the sequence of samples. No global random state is read or changed.
        draw: How samples depend on one another; each is a draw of the posterior whatever this is. "iid": not at all.
            "antithetic": in pairs M + Omega eps, M - Omega eps (Hammersley & Morton, 1956): what is odd in eps cancels
            in the average of a pair, so fewer samples are enough. "qmc": such pairs, whose distances from the mean are
            spread evenly in each weight (`draws`).
        batch_size: Samples that share one forward or one `generate`, to bound memory; None leaves it to the task: one
            to score, all to generate.
        first: Index of the first sample, to walk through a sequence in parts.
        layers: k: the samples differ in the last k layers (and the head), all below is at the posterior mean and
            computed once for all samples (`trunk`). None: they differ everywhere.
        tolerance: Classes are predicted with as many of the samples as each input needs: until the standard error of
            its averaged probabilities is surely at most this (`blob_hf.inference.settling`). None: with all of them.

    Raises:
        BlobError: num_samples < 0, batch_size or layers < 1, tolerance not > 0, or another draw.
    """

    num_samples: int = 10
    seed: int = 0
    draw: str = "iid"
    batch_size: int | None = None
    first: int = 0
    layers: int | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num_samples, str):
            raise BlobError(f"num_samples must be a number, got {self.num_samples!r}; Sampling.auto() for as needed")
        if self.num_samples < 0:
            raise BlobError(f"num_samples must be >= 0, got {self.num_samples}")
        if self.draw not in DRAWS:
            raise BlobError(f"draw must be one of {', '.join(DRAWS)}, got {self.draw!r}")
        for name in ("batch_size", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BlobError(f"{name} must be >= 1, got {value}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise BlobError(f"tolerance must be > 0, got {self.tolerance:g}; None takes all samples")

    @classmethod
    def auto(
        cls,
        tolerance: float = AUTO_TOLERANCE,
        num_samples: int = AUTO_SAMPLES,
        seed: int = 0,
        draw: str = "antithetic",
        **options: Any,
    ) -> "Sampling":
        """As many samples as each input needs, `num_samples` at most: what the word "auto" stands for."""
        return cls(num_samples, seed, draw, tolerance=tolerance, **options)

    @property
    def in_pairs(self) -> bool:
        """Whether samples 2k and 2k + 1 are eps and -eps."""
        return self.draw != "iid"

    @classmethod
    def of(cls, sampling: "Sampling | int | str", seed: int | None = None) -> "Sampling":
        """A `Sampling` as it is, or so many samples of a seed (0 unless given), or those of "auto"."""
        if isinstance(sampling, int):
            return cls(sampling, seed=seed or 0)
        if isinstance(sampling, str):
            return as_sampling(sampling, seed=seed or 0)
        if seed is not None:
            raise BlobError("the seed is part of Sampling: give Sampling(num_samples, seed=...) alone")
        return sampling

    def required(self) -> "Sampling":
        """This, if it has any samples.

        Raises:
            BlobError: num_samples is 0.
        """
        if self.num_samples < 1:
            raise BlobError(f"num_samples must be >= 1, got {self.num_samples}; for no samples use posterior_mean()")
        return self

    def for_texts(self) -> "Sampling":
        """This, if it has the same samples for every input, as writing and scoring texts needs.

        Raises:
            BlobError: It has a tolerance.
        """
        if self.tolerance is not None:
            raise BlobError(
                "as many samples as needed (auto, a tolerance) is for classes and choices: a text has no one averaged "
                "probability that settles; give a number of samples"
            )
        return self

    def of_adapter(self, position: int) -> "Sampling":
        """What an adapter draws that comes so many places after the first active one: for the first, this."""
        if position == 0:
            return self
        digest = hashlib.sha256(f"{self.seed}/adapter {position}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:8], "little", signed=True))

    @property
    def indices(self) -> range:
        """Of the samples in their sequence."""
        return range(self.first, self.first + self.num_samples)

    def batches(self, default: int | None = None) -> Iterator["Sampling"]:
        """The samples in parts of `batch_size`, of `default` where that is None (all at once if both are)."""
        step = self.batch_size or default or self.num_samples
        for first in self.indices[:: max(step, 1)]:
            yield replace(self, num_samples=min(step, self.indices.stop - first), first=first)


def as_sampling(
    num_samples: float | str, tolerance: float | None = None, draw: str | None = None, **options: Any
) -> Sampling:
    """What a user has asked for: a number of samples or "auto", and what to do otherwise than by default.

    Raises:
        BlobError: A word that is not "auto", or a number that `Sampling` refuses.
    """
    if isinstance(num_samples, str) and num_samples != AUTO:
        raise BlobError(f"the samples are a whole number or {AUTO!r}, got {num_samples!r}")
    if isinstance(num_samples, str):
        return Sampling.auto(AUTO_TOLERANCE if tolerance is None else tolerance, draw=draw or "antithetic", **options)
    return Sampling(int(num_samples), draw=draw or "iid", tolerance=tolerance, **options)
