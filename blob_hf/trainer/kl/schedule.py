"""The weight pi_t that the KL gets at each step of a training."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from blob_hf.utils.errors import BlobError


def kl_cycle_length(num_examples: int, gamma: float, batch_size: int) -> int:
    """Period M, in optimizer steps, of the KL re-weighting cycle: int(100 * n**(pi/gamma) / batch_size), at least 1.

    Larger gamma means a shorter cycle, so *more* KL per step (from the authors' released code).

    Args:
        num_examples: Training examples n.
        gamma: Exponent control, > 0.
        batch_size: *Global* batch size: per device x devices x gradient accumulation.
    """
    if not gamma > 0:
        raise BlobError(f"gamma must be > 0, got {gamma}")
    if num_examples < 1 or batch_size < 1:
        raise BlobError(f"num_examples and batch_size must be >= 1, got {num_examples} and {batch_size}")
    try:
        return max(1, int(100 * num_examples ** (math.pi / gamma) / batch_size))
    except OverflowError:
        raise BlobError(f"gamma {gamma} is too small: the cycle n**(pi/gamma) overflows; try 8") from None


@dataclass(frozen=True)
class KLSchedule:
    """The weight pi_t of the KL at optimizer step t = 1, 2, ... (call it with t).

    Args:
        name: A key of `KL_SCHEDULES`.
        cycle_steps: M, see `kl_cycle_length`.
        num_examples: Training examples n (`elbo`).
        total_steps: Optimizer steps of the run (the warm-up of `linear` and `cosine` ends with it at the latest).
        weight: The user's weight (`constant`).
    """

    name: str
    cycle_steps: int = 1
    num_examples: int = 1
    total_steps: int = 1
    weight: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in KL_SCHEDULES:
            raise BlobError(f"kl_schedule must be one of {', '.join(KL_SCHEDULES)}, got {self.name!r}")
        if self.cycle_steps < 1:
            raise BlobError(f"kl_cycle_steps must be >= 1, got {self.cycle_steps}")
        if self.weight < 0:
            raise BlobError(f"kl_weight must be >= 0, got {self.weight}")

    def __call__(self, step: int) -> float:
        return KL_SCHEDULES[self.name](self, step)

    @property
    def mean_weight(self) -> float:
        """Mean of pi_t over a cycle (for `linear` and `cosine` after their rise)."""
        if self.name == "none":
            return 0.0
        if self.name == "constant":
            return self.weight
        return 1.0 / (self.num_examples if self.name == "elbo" else self.cycle_steps)

    @property
    def warmup_steps(self) -> int:
        """Length of the rise of `linear` and `cosine`: one cycle, or the whole run when that is shorter."""
        return max(1, min(self.cycle_steps, self.total_steps))


def _geometric(schedule: KLSchedule, step: int) -> float:
    """Blundell et al. (2015), section 3.4: pi_i = 2^i / (2^(M+1) - 1) at position i = 1..M of the cycle.

    Written with negative exponents: exact, and no big integers for M in the thousands.
    """
    cycle = schedule.cycle_steps
    position = step % cycle or cycle
    return 2.0 ** (position - cycle - 1) / (1 - 2.0 ** -(cycle + 1))


def _linear(schedule: KLSchedule, step: int) -> float:
    return min(1.0, step / schedule.warmup_steps) / schedule.cycle_steps


def _cosine(schedule: KLSchedule, step: int) -> float:
    progress = min(1.0, step / schedule.warmup_steps)
    return 0.5 * (1 - math.cos(math.pi * progress)) / schedule.cycle_steps


KL_SCHEDULES: dict[str, Callable[[KLSchedule, int], float]] = {
    "geometric": _geometric,  # the paper's
    "uniform": lambda schedule, step: 1.0 / schedule.cycle_steps,
    "elbo": lambda schedule, step: 1.0 / schedule.num_examples,  # NLL is a mean, so this is the exact ELBO / n
    "linear": _linear,  # rises to uniform
    "cosine": _cosine,  # rises to uniform
    "constant": lambda schedule, step: schedule.weight,
    "none": lambda schedule, step: 0.0,
}
