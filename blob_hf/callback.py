"""What `BlobTrainer` does at the events of training: plan the KL, keep its history, complete a push."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from blob_hf.dropout import no_base_dropout
from blob_hf.kl import KLDiagnosis, KLSchedule, diagnose, kl_cycle_length

logger = logging.getLogger(__name__)


class BlobCallback(TrainerCallback):
    """Sets up the KL schedule before training, and keeps kl_history.csv next to the checkpoints."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._dropout = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.base_dropout:
            self._dropout.enter_context(no_base_dropout(self.trainer.model))
        if args.method == "blob":
            batch_size = self.trainer.get_total_train_batch_size(args)
            self.trainer.kl_schedule, self.trainer.kl_diagnosis = plan_kl(
                args,
                num_examples=_num_examples(self.trainer.train_dataset, state.max_steps * batch_size),
                batch_size=batch_size,
                total_steps=state.max_steps,
            )
            _announce(self.trainer.kl_diagnosis, state.is_world_process_zero)
        self.trainer.resume_extra()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_history(Path(args.output_dir))

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.complete_push()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._dropout.close()
        self.on_save(args, state, control)


def plan_kl(args: Any, num_examples: int, batch_size: int, total_steps: int) -> tuple[KLSchedule, KLDiagnosis]:
    """The KL schedule that `BlobArguments` ask for, and what it will do.

    Args:
        num_examples: Training examples n.
        batch_size: Global batch size.
        total_steps: Optimizer steps of the run.
    """
    cycle = args.kl_cycle_steps or kl_cycle_length(num_examples, args.gamma, batch_size)
    schedule = KLSchedule(args.kl_schedule, cycle, num_examples, total_steps, args.kl_weight)
    return schedule, diagnose(schedule, batch_size, None if args.kl_cycle_steps else args.gamma)


def _num_examples(dataset: Any, seen_in_run: int) -> int:
    """Size of the training set; of a stream without a size, the examples that the run will see."""
    return len(dataset) if has_length(dataset) else seen_in_run


def _announce(diagnosis: KLDiagnosis, is_main_process: bool) -> None:
    if is_main_process:
        logger.info("%s", diagnosis)
        for warning in diagnosis.warnings:
            logger.warning("%s", warning)
