"""`Sampling`: which networks are drawn from a posterior, in one object from the flag to the layer.

It is here and not beside `predict` and `generate`, which use it, because the layer at the other end reads it, too.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from blob_hf.utils.errors import BlobError


@dataclass(frozen=True)
class Sampling:
    """The posterior samples `first` ... `first + num_samples - 1` of a seed.

    Sample s of a seed is the same weights on every device, rank and batch size, however many are drawn.

    Args:
        num_samples: S; 0 stands for the posterior mean alone.
        seed: Names the sequence of samples. No global random state is read or changed.
        antithetic: Samples in pairs M + Omega eps, M - Omega eps (Hammersley & Morton, 1956): each is a draw of the
            posterior, but what is odd in eps cancels in the average of a pair, so fewer samples are enough.
        batch_size: Samples that share one forward or one `generate`, to bound memory; None leaves it to the task: one
            to score, all to generate.
        first: Index of the first sample, to walk through a sequence in parts.

    Raises:
        BlobError: num_samples < 0 or batch_size < 1.
    """

    num_samples: int = 10
    seed: int = 0
    antithetic: bool = False
    batch_size: int | None = None
    first: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 0:
            raise BlobError(f"num_samples must be >= 0, got {self.num_samples}")
        if self.batch_size is not None and self.batch_size < 1:
            raise BlobError(f"batch_size must be >= 1, got {self.batch_size}")

    @classmethod
    def of(cls, sampling: "Sampling | int", seed: int | None = None) -> "Sampling":
        """A `Sampling` as it is, or so many samples of a seed (0 unless given)."""
        if isinstance(sampling, int):
            return cls(sampling, seed=seed or 0)
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
