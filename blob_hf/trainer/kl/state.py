"""`KLState`: all that the trainer, its callback and the optimizer's hook share of the KL in one training."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_scheduler

from blob_hf.trainer.kl.adaptive import AdaptiveSchedule
from blob_hf.trainer.kl.diagnosis import KLDiagnosis, RateDiagnosis, diagnose
from blob_hf.trainer.kl.history import FILE_NAME, KLHistory
from blob_hf.trainer.kl.rate import PUBLISHED_RATE, default_pull, pull_of_rate, rate_from_pull
from blob_hf.trainer.kl.schedule import KLSchedule, kl_cycle_length
from blob_hf.trainer.kl.step import DecoupledKLStep
from blob_hf.trainer.kl.target import TargetSchedule
from blob_hf.trainer.kl.verdict import Verdict, initial_stds, judge, measure, std_by_kl_alone
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.posterior import kl_divergence, mean_posterior_std
from blob_hf.utils.errors import BlobError

if TYPE_CHECKING:
    from blob_hf.trainer.training_args import BlobTrainingArguments

logger = logging.getLogger(__name__)

INITIAL_STDS = "initial_stds.safetensors"
Schedule: TypeAlias = KLSchedule | TargetSchedule | AdaptiveSchedule


@dataclass(frozen=True)
class AtStep:
    """The KL at one optimizer step, the same for all its micro-batches.

    Attributes:
        step: 1-based.
        kl: nats.
        std: Mean of Omega over all weights.
        weight: pi_t.
    """

    step: int
    kl: Tensor
    std: Tensor
    weight: float


@dataclass
class KLState:
    """The KL of a training, from its plan to its verdict.

    Attributes:
        schedule: pi_t of each step.
        diagnosis: What the schedule will do, known before the first step; None before a training.
        step: The optimizer's hook, which applies the KL; None before there is an optimizer.
        history: A row for each step.
        initial_stds: Omega by layer name, before the first step.
        verdict: What the KL did; None until the training is over, and fixed from then on.
    """

    schedule: Schedule = field(default_factory=lambda: KLSchedule("none"))
    diagnosis: KLDiagnosis | None = None
    step: DecoupledKLStep | None = None
    history: KLHistory = field(default_factory=KLHistory)
    initial_stds: dict[str, Tensor] = field(default_factory=dict)
    verdict: Verdict | None = None
    _now: AtStep | None = None

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module, config: BlobConfig) -> None:
        """Have every step of an optimizer followed by one on the KL, at the rate that `begin` finds."""
        self.step = DecoupledKLStep(optimizer, model, config.prior_std, config.std_parameterization)

    def begin(
        self, args: "BlobTrainingArguments", config: BlobConfig, model: nn.Module, num_examples: int, batch_size: int,
        total_steps: int, checkpoint: Path | None = None,
    ) -> KLDiagnosis:  # fmt: skip
        """Plan a training, and forget the one before.

        Args:
            checkpoint: That the training is resumed from; its stds are then not those of the start.

        Raises:
            BlobError: A std is 0, so that the KL is infinite.
        """
        self.initial_stds, start = initial_stds(model), mean_posterior_std(model).item()
        if zeros := sum(int((std == 0).sum()) for std in self.initial_stds.values()):
            raise BlobError(
                f"{zeros} stds of the posterior are 0, as one that was fitted may have them, which training cannot "
                "widen (its KL is infinite): continue from the LoRA adapter that it was made of"
            )
        if checkpoint is not None and (checkpoint / INITIAL_STDS).is_file():
            self.initial_stds = load_file(checkpoint / INITIAL_STDS)
            start = torch.cat([std.float().flatten() for std in self.initial_stds.values()]).mean().item()
        self.schedule, self.diagnosis = plan_kl(
            args, num_examples, batch_size, total_steps, model, config,
            args.learning_rate if self.step is None else self.step.learning_rate, start,
        )  # fmt: skip
        if self.step is not None and self.diagnosis.rate is not None:
            self.step.kl_learning_rate = self.diagnosis.rate.value
        self.history, self.verdict, self._now = KLHistory(), None, None
        return self.diagnosis

    def at_step(self, step: int, model: nn.Module, prior_std: float, average: Callable[[Tensor], Tensor]) -> AtStep:
        """The KL and its weight at a coming optimizer step; settled, and told to the optimizer's hook, once a step.

        Args:
            step: 1-based.
            average: Mean over the processes (all of them call this).
        """
        if self._now is None or self._now.step != step:
            if isinstance(self.schedule, AdaptiveSchedule):
                self.history.drain(average)
                self.schedule.observe(self.history.rows)
            with torch.no_grad():
                kl = kl_divergence(model, prior_std)
            self._now = AtStep(step, kl, mean_posterior_std(model), self.schedule(step))
            if self.step is not None:
                self.step.weight = self._now.weight
        return self._now

    def record(self, now: AtStep, nll: Tensor) -> None:
        """Add a micro-batch to the history.

        Args:
            nll: Its part of the step's.
        """
        lr_scale = 1.0 if self.step is None else self.step.lr_scale
        self.history.add(now.step, nll, now.kl, now.weight, now.std, lr_scale)

    def conclude(
        self, model: nn.Module, config: BlobConfig, sample_gap: float | None, gain: Callable[[], float | None]
    ) -> None:
        """Judge the finished training.

        Args:
            sample_gap: How far the samples' predictions are apart (see `KLFigures`).
            gain: What the predictive knows of the task (see `judge`).
        """
        if self.history.rows:
            rate = None if self.diagnosis is None else self.diagnosis.rate
            figures = measure(
                model, config.prior_std, config.std_parameterization, self.schedule, self.history.rows,
                self.initial_stds, None if rate is None else rate.value,
            )  # fmt: skip
            self.verdict = judge(figures, sample_gap, gain)

    def save(self, folder: Path, average: Callable[[Tensor], Tensor], writes: bool, for_resuming: bool = False) -> None:
        """Write kl_history.csv, and for a checkpoint the stds of the start (called on every process).

        Args:
            average: Mean over the processes.
            writes: Whether this process writes files.
        """
        self.history.drain(average)
        if writes:
            self.history.save(folder / FILE_NAME)
            if for_resuming and self.initial_stds:
                save_file(self.initial_stds, folder / INITIAL_STDS)

    def resume(self, folder: Path) -> None:
        """Go on as the checkpoint in a folder left it, with what `begin` has not taken from it."""
        self.history.load(folder / FILE_NAME)
        if isinstance(self.schedule, TargetSchedule) and self.history.rows:
            self.schedule.kl_start = self.history.rows[0]["kl"]
        if isinstance(self.schedule, AdaptiveSchedule):
            self.schedule.observe(self.history.rows)


def plan_kl(
    args: "BlobTrainingArguments",
    num_examples: int,
    batch_size: int,
    total_steps: int,
    model: nn.Module,
    config: BlobConfig,
    learning_rate: float,
    std_start: float,
) -> tuple[Schedule, KLDiagnosis]:
    """The KL schedule that the arguments ask for, and what it will do.

    Args:
        num_examples: Training examples n.
        batch_size: Global batch size.
        total_steps: Optimizer steps of the run.
        model: With a posterior; the `target` schedule looks at it.
        learning_rate: The optimizer's, at its peak.
        std_start: Mean of Omega over all weights before the first step.
    """
    schedule: Schedule
    rate, pull, origin = PUBLISHED_RATE, math.nan, "published"
    if isinstance(args.kl_learning_rate, float):
        rate, origin = args.kl_learning_rate, "given"
    if args.kl_target_nats_per_weight is not None:
        schedule = TargetSchedule(
            model, config.prior_std, config.std_parameterization, args.kl_target_nats_per_weight,
            rate, args.kl_cycle_steps or max(1, total_steps // 10), total_steps,
        )  # fmt: skip
    else:
        cycle = args.kl_cycle_steps or kl_cycle_length(num_examples, args.gamma, batch_size)
        adaptive = args.schedule == "adaptive"
        name = "uniform" if adaptive else args.schedule
        even = KLSchedule(name, cycle, num_examples, total_steps, args.kl_weight)
        # AT_NLL is of labels; a language model seldom knows its tokens that well
        adaptive = adaptive and not (args.kl_schedule == "auto" and _generates(model))
        schedule = AdaptiveSchedule(cycle, total_steps) if adaptive else even
        sizes = (even, learning_rate, config.prior_std)
        if args.rate_from_pull:
            wanted = default_pull(num_examples, args.gamma) if args.kl_pull is None else args.kl_pull
            rate, origin = rate_from_pull(wanted, *sizes), "pull"
        pull = pull_of_rate(rate, *sizes)
    shape = _lr_shape(args, total_steps)
    found = None
    if args.kl_gradient == "decoupled":
        alone = math.nan
        if not isinstance(schedule, TargetSchedule):
            rates = [rate * even(step) * scale for step, scale in enumerate(shape, start=1)]
            alone = std_by_kl_alone(std_start, config.prior_std, config.std_parameterization, rates)
        found = RateDiagnosis(rate, pull, origin, std_start, alone, config.prior_std)
    gamma = None if args.kl_cycle_steps else args.gamma
    return schedule, diagnose(schedule, batch_size, gamma, shape, found)


def _generates(model: nn.Module) -> bool:
    return not getattr(model, "classifies", False) and bool(getattr(model, "can_generate", lambda: False)())


def _lr_shape(args: "BlobTrainingArguments", total_steps: int) -> list[float]:
    """lr_t / lr_0 of each step, from transformers' scheduler of this name; 1 where it depends on the run."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(total_steps), total_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )  # fmt: skip
        shape = []
        for _ in range(total_steps):
            shape.append(float(scheduler.get_last_lr()[0]))
            optimizer.step()
            scheduler.step()
        return shape
    except (TypeError, ValueError):  # reduce_lr_on_plateau, greedy: they follow the metrics
        return [1.0] * total_steps
