"""What the KL will do with these settings, known before any training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blob_hf.trainer.kl.adaptive import AT_NLL, PER_FACTOR
from blob_hf.trainer.kl.schedule import KLSchedule, kl_cycle_length

LEAST_EXPOSURE = 0.01  # below, the KL has been applied less than a hundredth of once
HEARD = 0.1  # stds that the KL alone would leave below this share of the prior's


@dataclass(frozen=True)
class RateDiagnosis:
    """The decoupled KL step of a run, known before any training.

    Attributes:
        value: kl_learning_rate at the peak of the learning rate.
        pull: See `kl/rate.py`; of `adaptive` at its AT_NLL; NaN for `target`, whose rate is the schedule's.
        origin: Where the value is from: "pull", "published" (with nothing said of the rate) or "given".
        std_start: Mean of the stds before training.
        std_by_kl_alone: Where the KL steps alone, without any NLL, would take such a std.
        prior_std: sigma_p.
    """

    value: float
    pull: float
    origin: str
    std_start: float
    std_by_kl_alone: float
    prior_std: float

    def __str__(self) -> str:
        origin = (
            f"from the pull {self.pull:.3g}" if self.origin == "pull" else f"{self.origin}; a pull of {self.pull:.2g}"
        )
        return (
            f"KL rate {self.value:.3g} ({origin}): alone it would take a typical std from {self.std_start:.2g} to "
            f"{self.std_by_kl_alone:.2g} (prior {self.prior_std:g})"
        )


@dataclass(frozen=True)
class KLDiagnosis:
    """What the KL will do with these settings, known before any training (made by `diagnose`).

    Attributes:
        cycle_steps: M.
        total_steps: Optimizer steps of the run.
        cycles: Cycles completed, total_steps / M.
        total_weight: Sum of pi_t over the run: how often the whole KL is applied; NaN for `target` and `adaptive`,
            which follow the run.
        exposure: Sum of pi_t * lr_t / lr_0: the same for the decoupled KL step, which follows the learning rate. A
            cycle that ends with the run spends its weight where the learning rate is 0.
        rate: Of the decoupled KL step, and what it comes to: its pull (`kl/rate.py`), and where it would take the stds
            alone; None where the KL goes through the loss.
        warnings: One line each, empty when nothing is wrong.
    """

    schedule: str
    cycle_steps: int
    total_steps: int
    total_weight: float
    exposure: float
    rate: "RateDiagnosis | None" = None
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
        if self.schedule == "adaptive":
            rate = "" if self.rate is None else f"; at that NLL {self.rate}"
            return (
                f"KL follows the training NLL over {self.total_steps} steps: {math.exp(AT_NLL / PER_FACTOR):.0f} times "
                f"as strong at 0 nats as at {AT_NLL:g}, next to nothing above 1{rate}"
            )
        if self.schedule == "uniform" and self.rate is not None and self.rate.origin == "pull":
            return f"KL spread evenly over {self.total_steps} steps; {self.rate}"
        schedule = (
            f"KL schedule {self.schedule}: cycle M = {self.cycle_steps} steps, {self.total_steps} steps in total "
            f"= {self.cycles:.2f} cycles, sum of pi_t = {self.total_weight:.4g} "
            f"({self.exposure:.4g} times the learning rate's shape)"
        )
        return schedule if self.rate is None else f"{schedule}; {self.rate}"


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
    schedule: Any,
    batch_size: int,
    gamma: float | None = None,
    lr_scale: Sequence[float] | None = None,
    rate: RateDiagnosis | None = None,
) -> KLDiagnosis:
    """Say before training what the KL weight will do over the run.

    Args:
        schedule: The schedule of the run, with its total_steps and num_examples.
        batch_size: Global batch size (to name a gamma that fits).
        gamma: The gamma that gave the cycle; None when `kl_cycle_steps` was set by hand.
        lr_scale: lr_t / lr_0 of each step, which the KL's step follows; default 1 throughout.
        rate: Of the decoupled KL step.

    Returns:
        The figures and warnings. A cycle longer than the run is the one to heed: with the geometric schedule pi_t
        then underflows to 0 in nearly every step and the KL is never applied, whatever its value.
    """
    total = schedule.total_steps
    from_pull = rate is not None and rate.origin == "pull"  # then the rate makes good for a small weight
    if not isinstance(schedule, KLSchedule):
        return KLDiagnosis(schedule.name, schedule.cycle_steps, total, math.nan, math.nan, rate, _hardly_heard(rate))
    weights = [schedule(step) for step in range(1, total + 1)]
    exposure = math.fsum(w * s for w, s in zip(weights, lr_scale or [1.0] * total, strict=True))
    diagnosis = KLDiagnosis(schedule.name, schedule.cycle_steps, total, math.fsum(weights), exposure, rate)
    if schedule.name == "geometric" and schedule.cycle_steps > total:
        fit = fitting_gamma(schedule.num_examples, batch_size, total)
        cause = "kl_cycle_steps" if gamma is None else f"gamma = {gamma:g}"
        way_on = f"gamma >= {fit:g} fits this run; or set" if fit else "set"
        diagnosis.warnings.append(
            f"the KL will not be applied: {cause} gives a KL cycle of M = {schedule.cycle_steps} steps, but the run "
            f"has only {total}, and nearly all the weight falls on the last steps of a cycle "
            f"(sum of pi_t over the run = {diagnosis.total_weight:.1e}). {way_on} kl_cycle_steps <= {total}"
        )
    elif schedule.name not in ("none", "constant") and exposure < LEAST_EXPOSURE and not from_pull:
        late = " (its weight falls where the learning rate is nearly 0)" if diagnosis.total_weight > 0.1 else ""
        diagnosis.warnings.append(
            f"the KL will hardly be applied: sum of pi_t over {total} steps, times the learning rate's shape = "
            f"{exposure:.1e}{late}; with kl_schedule {schedule.name} a smaller kl_cycle_steps than "
            f"{schedule.cycle_steps}, or a larger gamma, applies more"
        )
    else:
        diagnosis.warnings.extend(_hardly_heard(rate))
    if schedule.name == "constant" and schedule.weight == 0:
        diagnosis.warnings.append("kl_schedule constant with kl_weight 0 applies no KL; give kl_weight > 0")
    return diagnosis


def _hardly_heard(rate: RateDiagnosis | None) -> list[str]:
    if rate is None or not rate.std_start < rate.std_by_kl_alone < HEARD * rate.prior_std:
        return []
    return [
        f"the KL will move the stds little: alone it would take them to {rate.std_by_kl_alone:.2g}, "
        f"{rate.std_by_kl_alone / rate.prior_std:.0%} of the prior's, so the samples may predict what the mean "
        "does. More steps, a larger learning_rate or a larger kl_pull widen them"
    ]
