"""The KL term of the BLoB objective: its closed form, its gradient, and the weight pi_t it gets at each step.

Objective at step t (Wang et al., NeurIPS 2024, eq. 6):  NLL(batch; A ~ q) + pi_t * KL(q || p),
with q(A_ij) = N(M_ij, Omega_ij^2) and p(A_ij) = N(0, sigma_p^2).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blob_hf.errors import BlobError


def gaussian_kl(mean: Tensor, std: Tensor, prior_std: float) -> Tensor:
    """KL(N(mean, std^2) || N(0, prior_std^2)), summed over all entries.

    Args:
        mean: Posterior means M, any shape.
        std: Posterior standard deviations Omega > 0, same shape.
        prior_std: sigma_p > 0 (the paper's beta).

    Returns:
        Scalar float32 tensor, nats: sum log(sigma_p / Omega) + (Omega^2 + M^2) / (2 sigma_p^2) - 1/2.
    """
    mean, std = mean.float(), std.float()
    return (math.log(prior_std) - std.log() + (std.square() + mean.square()) / (2 * prior_std**2) - 0.5).sum()


def kl_gradient_mean(mean: Tensor, prior_std: float) -> Tensor:
    """dKL/dM = M / sigma_p^2, elementwise."""
    return mean / prior_std**2


def kl_gradient_rho(rho: Tensor, prior_std: float, parameterization: str) -> Tensor:
    """dKL/drho = (Omega / sigma_p^2 - 1 / Omega) * dOmega/drho, elementwise.

    For `square` rho is G and this is (G^2/sigma_p^2 - 1/G^2) * 2G, with 0 where G is exactly 0: there the
    gradient does not exist, and DeepSpeed pads its flat partitions with zeros.
    """
    if parameterization == "square":
        gradient = 2 * (rho**3 / prior_std**2 - rho.reciprocal())
        return torch.where(rho == 0, torch.zeros_like(rho), gradient)
    std = torch.nn.functional.softplus(rho)
    return (std / prior_std**2 - std.reciprocal()) * torch.sigmoid(rho)


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


LEAST_EXPOSURE = 0.01  # below, the KL has been applied less than a hundredth of once


@dataclass(frozen=True)
class KLDiagnosis:
    """What the KL will do with these settings, known before any training (made by `diagnose`).

    Attributes:
        cycle_steps: M.
        total_steps: Optimizer steps of the run.
        cycles: Cycles completed, total_steps / M.
        total_weight: Sum of pi_t over the run: how often the whole KL is applied; NaN for `target`, it follows the KL.
        exposure: Sum of pi_t * lr_t / lr_0: the same for the decoupled KL step, which follows the learning rate. A
            cycle that ends with the run spends its weight where the learning rate is 0.
        warnings: One line each, empty when nothing is wrong.
    """

    schedule: str
    cycle_steps: int
    total_steps: int
    total_weight: float
    exposure: float
    warnings: list[str] = field(default_factory=list)

    @property
    def cycles(self) -> float:
        return self.total_steps / self.cycle_steps

    def __str__(self) -> str:
        if self.schedule == "target":
            return (
                f"KL schedule target: the KL falls to the target with a time constant of {self.cycle_steps} of "
                f"{self.total_steps} steps; pi_t follows the posterior"
            )
        return (
            f"KL schedule {self.schedule}: cycle M = {self.cycle_steps} steps, {self.total_steps} steps in total "
            f"= {self.cycles:.2f} cycles, sum of pi_t = {self.total_weight:.4g} "
            f"({self.exposure:.4g} times the learning rate's shape)"
        )


def fitting_gamma(num_examples: int, batch_size: int, total_steps: int) -> float | None:
    """The smallest gamma (to one decimal) whose cycle M ends within total_steps; None when there is none."""
    ratio = math.log(num_examples) * math.pi
    room = total_steps * batch_size / 100
    if room <= 1 or ratio <= 0:
        return None
    gamma = math.ceil(10 * ratio / math.log(room)) / 10
    while kl_cycle_length(num_examples, gamma, batch_size) > total_steps:  # rounding at the edge
        gamma = round(gamma + 0.1, 1)
    return gamma


def diagnose(
    schedule: Any, batch_size: int, gamma: float | None = None, lr_scale: Sequence[float] | None = None
) -> KLDiagnosis:
    """Say before training what the KL weight will do over the run.

    Args:
        schedule: The schedule of the run (a `KLSchedule` or `TargetSchedule`), with its total_steps and num_examples.
        batch_size: Global batch size (to name a gamma that fits).
        gamma: The gamma that gave the cycle; None when `kl_cycle_steps` was set by hand.
        lr_scale: lr_t / lr_0 of each step, which the KL's step follows; default 1 throughout.

    Returns:
        The figures and warnings. A cycle longer than the run is the one to heed: with the geometric schedule pi_t
        then underflows to 0 in nearly every step and the KL is never applied, whatever its value.
    """
    total = schedule.total_steps
    if not isinstance(schedule, KLSchedule):
        return KLDiagnosis(schedule.name, schedule.cycle_steps, total, math.nan, math.nan)
    weights = [schedule(step) for step in range(1, total + 1)]
    exposure = math.fsum(w * s for w, s in zip(weights, lr_scale or [1.0] * total, strict=True))
    diagnosis = KLDiagnosis(schedule.name, schedule.cycle_steps, total, math.fsum(weights), exposure)
    if schedule.name == "geometric" and schedule.cycle_steps > total:
        fit = fitting_gamma(schedule.num_examples, batch_size, total)
        cause = "kl_cycle_steps" if gamma is None else f"gamma = {gamma:g}"
        way_on = f"gamma >= {fit:g} fits this run; or set" if fit else "set"
        diagnosis.warnings.append(
            f"the KL will not be applied: {cause} gives a KL cycle of M = {schedule.cycle_steps} steps, but the run "
            f"has only {total}, and nearly all the weight falls on the last steps of a cycle "
            f"(sum of pi_t over the run = {diagnosis.total_weight:.1e}). {way_on} kl_cycle_steps <= {total}"
        )
    elif schedule.name not in ("none", "constant") and exposure < LEAST_EXPOSURE:
        late = " (its weight falls where the learning rate is nearly 0)" if diagnosis.total_weight > 0.1 else ""
        diagnosis.warnings.append(
            f"the KL will hardly be applied: sum of pi_t over {total} steps, times the learning rate's shape = "
            f"{exposure:.1e}{late}; with kl_schedule {schedule.name} a smaller kl_cycle_steps than "
            f"{schedule.cycle_steps}, or a larger gamma, applies more"
        )
    if schedule.name == "constant" and schedule.weight == 0:
        diagnosis.warnings.append("kl_schedule constant with kl_weight 0 applies no KL; give kl_weight > 0")
    return diagnosis
