"""What `BlobTrainer` does at the events of training: plan the KL, keep its history, complete a push."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, get_scheduler
from transformers.trainer_utils import has_length

from blob_hf.trainer.dropout import no_base_dropout
from blob_hf.trainer.kl.diagnosis import KLDiagnosis, diagnose
from blob_hf.trainer.kl.schedule import KLSchedule, kl_cycle_length
from blob_hf.trainer.kl.target import TargetSchedule

logger = logging.getLogger(__name__)


class BlobCallback(TrainerCallback):
    """Sets up the KL schedule before training, and keeps kl_history.csv next to the checkpoints."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._dropout = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.base_dropout:
            self._dropout.enter_context(no_base_dropout(self.trainer.model))
        if self.trainer.method.variational:
            batch_size = self.trainer.get_total_train_batch_size(args)
            self.trainer.kl_schedule, self.trainer.kl_diagnosis = plan_kl(
                args,
                num_examples=_num_examples(self.trainer.train_dataset, state.max_steps * batch_size),
                batch_size=batch_size,
                total_steps=state.max_steps,
                model=self.trainer.model,
            )
            _announce(self.trainer.kl_diagnosis, state.is_world_process_zero)
        self.trainer.trained_parameters += _num_trained(self.trainer.model)
        self.trainer.resume_extra()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_history(Path(args.output_dir))

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.complete_push()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._dropout.close()
        self.on_save(args, state, control)
        self.trainer.measure_kl()
        if self.trainer.kl_verdict is not None and state.is_world_process_zero:
            log = logger.info if self.trainer.kl_verdict.name == "healthy" else logger.warning
            log("%s", self.trainer.kl_verdict)


def _num_trained(model: Any) -> int:
    """Trainable weights, also where ZeRO-3 has sharded them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def plan_kl(
    args: Any, num_examples: int, batch_size: int, total_steps: int, model: Any
) -> tuple[KLSchedule | TargetSchedule, KLDiagnosis]:
    """The KL schedule that `BlobArguments` ask for, and what it will do.

    Args:
        num_examples: Training examples n.
        batch_size: Global batch size.
        total_steps: Optimizer steps of the run.
        model: With a posterior; the `target` schedule looks at it.
    """
    schedule: KLSchedule | TargetSchedule
    if args.kl_schedule == "target":
        config = model.active_peft_config
        schedule = TargetSchedule(
            model, config.prior_std, config.std_parameterization, args.kl_target_nats_per_weight,
            args.kl_learning_rate, args.kl_cycle_steps or max(1, total_steps // 10), total_steps,
        )  # fmt: skip
    else:
        cycle = args.kl_cycle_steps or kl_cycle_length(num_examples, args.gamma, batch_size)
        schedule = KLSchedule(args.kl_schedule, cycle, num_examples, total_steps, args.kl_weight)
    gamma = None if args.kl_cycle_steps else args.gamma
    return schedule, diagnose(schedule, batch_size, gamma, _lr_shape(args, total_steps))


def _lr_shape(args: Any, total_steps: int) -> list[float]:
    """lr_t / lr_0 of each step, from transformers' scheduler of this name; 1 where it depends on the run."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(total_steps), total_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )  # fmt: skip
        shape = []
        for _ in range(total_steps):
            shape.append(float(scheduler.get_last_lr()[0]))
            optimizer.step()
            scheduler.step()
        return shape
    except (TypeError, ValueError):  # reduce_lr_on_plateau, greedy: they follow the metrics
        return [1.0] * total_steps


def _num_examples(dataset: Any, seen_in_run: int) -> int:
    """Size of the training set; of a stream without a size, the examples that the run will see."""
    return len(dataset) if has_length(dataset) else seen_in_run


def _announce(diagnosis: KLDiagnosis, is_main_process: bool) -> None:
    if is_main_process:
        logger.info("%s", diagnosis)
        for warning in diagnosis.warnings:
            logger.warning("%s", warning)
