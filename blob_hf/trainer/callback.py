"""What `BlobTrainer` does at the events of training: plan the KL, weigh it, keep its history, judge it, push."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from blob_hf.trainer.dropout import no_base_dropout
from blob_hf.trainer.selection import ALWAYS_MEASURED, check_metric
from blob_hf.trainer.training_args import BlobTrainingArguments

if TYPE_CHECKING:
    from blob_hf.trainer.trainer import BlobTrainer

logger = logging.getLogger(__name__)


class BlobCallback(TrainerCallback):
    """Sets up the KL before training, and keeps kl_history.csv next to the checkpoints."""

    def __init__(self, trainer: "BlobTrainer") -> None:
        self.trainer = trainer
        self._dropout = ExitStack()

    def on_train_begin(  # type: ignore[override]
        self, args: BlobTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        metric = args.metric_for_best_model
        if metric and trainer.compute_metrics is None and not isinstance(trainer.eval_dataset, dict):
            check_metric(metric, [*ALWAYS_MEASURED, *(["nll_sample_std"] if trainer.model.can_generate() else [])])
        if not args.base_dropout:
            self._dropout.enter_context(no_base_dropout(trainer.model))
        if trainer.kl is not None:
            batch_size = trainer.get_total_train_batch_size(args)
            rows = trainer.train_dataset
            # of a stream without a size, the examples that the run will see
            num_examples = len(rows) if has_length(rows) else state.max_steps * batch_size
            config = trainer.blob_model.blob_config
            resumed_from = getattr(trainer, "resumed_from", None)
            checkpoint = None if resumed_from is None else Path(resumed_from)
            diagnosis = trainer.kl.begin(
                args, config, trainer.model, num_examples, batch_size, state.max_steps, checkpoint
            )
            if state.is_world_process_zero:
                logger.info("%s", diagnosis)
                for warning in diagnosis.warnings:
                    logger.warning("%s", warning)
        trainer.resume_own_state()

    def on_step_begin(  # type: ignore[override]
        self, args: BlobTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin_step()

    def on_pre_optimizer_step(  # type: ignore[override]
        self, args: BlobTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.end_step()

    def on_save(  # type: ignore[override]
        self, args: BlobTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.save_history(Path(str(args.output_dir)))

    def on_push_begin(  # type: ignore[override]
        self, args: BlobTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.complete_push()

    def on_train_end(  # type: ignore[override]
        self, args: BlobTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._dropout.close()
        self.on_save(args, state, control)
        verdict = self.trainer.judge_kl()
        if verdict is not None and state.is_world_process_zero:
            log = logger.info if verdict.name == "healthy" else logger.warning
            log("%s", verdict)
            logger.info("KL figures: %s", verdict.figures)
