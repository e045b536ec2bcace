"""`BlobTrainer`: transformers' trainer with the BLoB objective and posterior evaluation."""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import has_length, unwrap_peft_model

from blob_hf.reporting.model_card import write_model_card
from blob_hf.reporting.run_summary import DataSource
from blob_hf.trainer import evaluation
from blob_hf.trainer.callback import BlobCallback
from blob_hf.trainer.checkpoints import CheckpointMixin
from blob_hf.trainer.class_weights import balanced_weights
from blob_hf.trainer.engines import (
    OWN_OPTIMIZER,
    check_deepspeed,
    check_fsdp_evaluation,
    check_fsdp_training,
    check_not_for_inference,
    decorrelate_noise,
    engine_of,
    plain_evaluation,
)
from blob_hf.trainer.kl.history import LOGGED
from blob_hf.trainer.kl.state import KLState
from blob_hf.trainer.kl.verdict import Verdict
from blob_hf.trainer.log_state import LogState
from blob_hf.trainer.objective import ObjectiveMixin
from blob_hf.trainer.own_training import with_own_optimizer
from blob_hf.trainer.selection import check_metric, eval_nll
from blob_hf.trainer.summary import last_evaluation, summarize
from blob_hf.trainer.training_args import BlobTrainingArguments, as_blob_arguments
from blob_hf.tuner.build import adopted
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import gaussian_layers, sampling_of
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError
from blob_hf.utils.numbers import number_or_word
from blob_hf.utils.sharding import is_sharded

logger = logging.getLogger(__name__)

Rows: TypeAlias = Dataset | torch.utils.data.Dataset[Any]
VERDICT_ROWS = 64  # on which a finished training looks at what its samples predict


class BlobTrainerMixin(ObjectiveMixin):
    """Adds to a transformers trainer: NLL + pi_t * KL, the decoupled KL step, and Monte Carlo evaluation.

    Args:
        model: A `BlobModel` with a posterior; with `point_estimate=True` plain LoRA, or any model.
        args: `BlobTrainingArguments` (or the Seq2Seq ones); to transformers' own BLoB's defaults are added.
        model_init: Makes the model, instead of `model`; anew in every training.
        point_estimate: Train a model without a posterior by its NLL alone, with all else equal.
        compute_loss_func: Of transformers' trainer: the loss of a training batch in place of the NLL (and of
            `label_smoothing_factor`); the KL goes on top. Evaluation keeps the NLL of the predictive.
        kwargs: These and all others: as of transformers' trainer.

    Attributes:
        kl: The KL of the last training; None without a posterior to train.
        nll_by_samples: Of the last evaluation of a language model: NLL of the predictive of the first 1, 2, ...
            samples, nats per token.

    Raises:
        BlobError: Model and arguments do not fit.
    """

    args: BlobTrainingArguments
    model: Any
    nll_by_samples: np.ndarray | None = None
    arguments_class: type[BlobTrainingArguments] = BlobTrainingArguments
    card_from_run = False  # whether a script writes the model card
    own_optimizer: torch.optim.Optimizer | None = None  # of a method with a training of its own

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., PreTrainedModel | nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        *,
        point_estimate: bool = False,
        **kwargs: Any,
    ) -> None:
        self.point_estimate = point_estimate
        taken = None if model is None else adopted(model)
        own = as_blob_arguments(args, self.arguments_class)
        super().__init__(
            taken, own, data_collator, train_dataset, eval_dataset, processing_class,
            model_init,  # type: ignore[arg-type]
            compute_loss_func, compute_metrics, callbacks, optimizers, **kwargs,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True  # count the items of a batch, whether or not the model would use them
        # transformers goes by the loss type of the config, which models like GPT-2 do not have
        base = unwrap_peft_model(self.model)
        writes = base.can_generate() and not getattr(self.model, "classifies", False)
        self._loss_shifts_labels = writes and not base.config.is_encoder_decoder
        self.kl = KLState() if gaussian_layers(self.model) else None
        self.add_callback(BlobCallback(self))  # type: ignore[arg-type]
        self._check_model()
        if self.args.class_weights is not None and compute_loss_func is not None:
            raise BlobError(
                "class_weights weighs the trainer's own NLL, which compute_loss_func replaces; leave one of them out"
            )
        if self.args.class_weights is not None and train_dataset is not None:
            self.class_weights = balanced_weights(train_dataset, base.config.num_labels).to(self.args.device)

    def _check_model(self) -> None:
        if self.args.n_gpu > 1:
            raise BlobError(
                "several GPUs in one process (DataParallel) cannot hold posterior samples; use accelerate launch"
            )
        if self.kl is None and not self.point_estimate:
            raise BlobError(
                "the trainer needs a model with a posterior (get_blob_model, bayesianize); to train a model without "
                "one pass point_estimate=True"
            )
        if self.kl is not None and not isinstance(self.blob_model, BlobModel):
            raise BlobError(
                f"the posterior is inside a plain {type(self.model).__name__} (its own add_adapter): make the model "
                "with get_blob_model, or load what you saved with BlobModel.from_pretrained"
            )
        if self.kl is not None and self.point_estimate:
            raise BlobError("point_estimate=True needs plain LoRA, but this model has a posterior")
        if self.kl is not None and self.args.beta not in (None, self.blob_model.blob_config.prior_std):
            raise BlobError(
                f"beta is the prior std: got {self.args.beta}, but the model was made with "
                f"prior_std={self.blob_model.blob_config.prior_std}; set one of them"
            )
        check_deepspeed(self.args)
        if self.kl is not None and self.args.kl_gradient == "loss" and is_deepspeed_zero3_enabled():
            raise BlobError("kl_gradient='loss' cannot reach sharded parameters under ZeRO-3; use 'decoupled'")

    def set_model(self, model: nn.Module) -> None:
        """Go on with another model, to evaluate and to save."""
        self.model = self.model_wrapped = model.to(self.args.device)

    def call_model_init(self, trial: Any = None) -> Any:
        """transformers' `call_model_init`; sets a trial's arguments first: the prior std is part of the model."""
        if trial is not None:
            self._hp_search_setup(trial)
            self.args.kl_learning_rate = number_or_word(self.args.kl_learning_rate)  # a trial's number came as a word
        model = adopted(super().call_model_init(trial))
        if trial is not None and self.args.beta is not None and isinstance(model, BlobModel) and model.has_posterior:
            model.blob_config.prior_std = self.args.beta  # the trial's: `model_init` need not know of trials
        return model

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' search; the objective is by default the NLL of the predictive, not the sum of all metrics."""
        if compute_objective is None:
            if direction != "minimize":
                raise BlobError(
                    f"the default objective is the NLL, which direction minimize is for, got {direction!r}; "
                    "give compute_objective"
                )
            compute_objective = eval_nll
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, *args, **kwargs)

    # ----- training ----------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        check_fsdp_training(self.accelerator, self.model)
        check_not_for_inference(self)
        optimizer = with_own_optimizer(self, super().create_optimizer(model))
        bare = getattr(optimizer, "optimizer", optimizer)  # of a second call to train()
        if self.kl is None or (self.kl.step is not None and self.kl.step.optimizer is bare):
            return optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise BlobError(OWN_OPTIMIZER)  # a config that the launcher brought
        self.kl.attach(optimizer, self.model, self.blob_model.blob_config)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of `LOGGED` over the steps since the last log of a loss."""
        if self.kl is not None and "loss" in logs:
            self.kl.history.drain(self._mean_over_processes)
            if rows := self.kl.history.unlogged():
                logs.update({name: fmean(row[name] for row in rows) for name in LOGGED})
        super().log(logs, start_time)

    # ----- what a checkpoint holds besides -----------------------------------------------------------------------

    def save_extra(self, folder: Path) -> None:
        """Add to a checkpoint the KL's state and the NLL that is not logged yet."""
        if self.kl is not None:
            self.kl.save(folder, self._mean_over_processes, self.args.should_save, for_resuming=True)
        loss = self._mean_over_processes(self._tr_loss).item()
        if self.args.should_save:
            LogState(loss, self._globalstep_last_logged, engine_of(self.accelerator)).save(folder)

    def check_resumable(self, folder: Path) -> None:
        """Refuse a checkpoint whose optimizer state this engine cannot read."""
        saved, engine = LogState.load(folder), engine_of(self.accelerator)
        if saved is not None and saved.engine not in (None, engine):
            raise BlobError(
                f"{folder} was saved under {saved.engine}, but this run is {engine}: optimizer states are not "
                f"exchangeable; resume under {saved.engine}, or continue from its adapter ({folder}) in a new run"
            )

    def resume_own_state(self) -> None:
        """Take over what `save_extra` added to the checkpoint that is resumed from."""
        resumed_from = getattr(self, "resumed_from", None)
        if resumed_from is None:
            decorrelate_noise(self.args.seed, self.accelerator, self.model)
            return
        folder = Path(resumed_from)
        if self.kl is not None:
            self.kl.resume(folder)
        state = LogState.load(folder, None if self.kl is None else self.kl.history.rows)
        if state is not None:
            self._globalstep_last_logged = state.last_logged_step
            if self.kl is not None:
                self.kl.history.last_logged = state.last_logged_step
            self._tr_loss += state.nll_since_last_log
            self._total_loss_scalar -= state.nll_since_last_log  # train_loss is that of this call's steps

    def save_history(self, folder: Path) -> None:
        """Write kl_history.csv into a folder (called on every process)."""
        if self.kl is not None:
            self.kl.save(folder, self._mean_over_processes, self.args.should_save)

    # ----- the verdict -------------------------------------------------------------------------------------------

    def judge_kl(self) -> Verdict | None:
        """Judge the finished training, once (called on every process); evaluations do not change it."""
        if self.kl is None:
            return None
        self.kl.history.drain(self._mean_over_processes)
        looking = self.eval_sampling.num_samples > 1 and engine_of(self.accelerator) != "fsdp"
        gap = self._look(evaluation.sample_gap, self.eval_dataset, self.train_dataset) if looking else None
        gain = partial(self._look, evaluation.information_gain, self.train_dataset)
        self.kl.conclude(self.model, self.blob_model.blob_config, gap, gain if looking else lambda: None)
        return self.kl.verdict

    def _look(self, measure: Callable[..., float | None], *choices: Any) -> float | None:
        """Measure predictions on rows spread over the first dataset that has a size; None if none has."""
        rows: Any = next((one for one in choices if has_length(one) and not isinstance(one, dict) and len(one)), None)
        if rows is None:
            return None
        batches = self._batches(evaluation.spread(rows, VERDICT_ROWS))
        labelled = (batch for batch in batches if _has_classes(batch.get("labels")))
        network: Any = self.model_wrapped if self.is_deepspeed_enabled else self.model  # which gathers its shards
        training = network.training
        network.eval()
        try:
            return measure(network, labelled, self._aligned_labels, self.eval_sampling)
        finally:
            network.train(training)
            if self.is_deepspeed_enabled:
                network.empty_partition_cache()  # what ZeRO-3 would keep gathered for another forward

    @property
    def kl_verdict(self) -> Verdict | None:
        """What the KL did in the last training; None before it and without a posterior."""
        return None if self.kl is None else self.kl.verdict

    # ----- evaluation --------------------------------------------------------------------------------------------

    @property
    def eval_sampling(self) -> Sampling:
        """The samples of an evaluation: those of the arguments, as far as the model has any."""
        return sampling_of(self.model, self.args.sampling)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Tensor | None]:
        """Predict with posterior samples and with the posterior mean.

        Returns:
            (loss, predictions, labels). The predictions of a classifier are `ClassPredictions`, those of a language
            model the fields of `TokenScores`, as a tuple: log-probabilities of the predictive first.
        """
        inputs = self._prepare_inputs(dict(inputs))
        labels = inputs.get("labels")
        with self.compute_loss_context_manager():
            if labels is None or labels.dim() == 1:
                inputs.pop("labels", None)
                found = evaluation.evaluate_classes(model, inputs, labels, self.eval_sampling)
            else:
                aligned = self._aligned_labels(inputs)
                found = evaluation.evaluate_tokens(model, inputs, aligned, self.eval_sampling)
        return found.loss, None if prediction_loss_only else found.predictions, found.labels

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop with exact losses, see `evaluation.ExactLosses`."""
        check_fsdp_evaluation(self.accelerator, untrained=not is_sharded(self.model))
        kwargs["prediction_loss_only"] = False  # the predictions are small, and the exact loss needs them
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer would keep the padding rows
        with plain_evaluation(self):
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        predictions: Any = output.predictions
        labels: Any = output.label_ids
        if labels is not None and predictions is not None and output.metrics is not None:
            losses = evaluation.exact_losses(predictions, labels)
            output.metrics.update(losses.metrics(kwargs.get("metric_key_prefix", "eval")))
            self.nll_by_samples = losses.nll_by_samples
        if (networks := getattr(predictions, "networks", None)) is not None and output.metrics is not None:
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_networks"] = float(networks.mean())
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """transformers' `evaluate`; in a training it must measure what says which checkpoint is the best.

        Raises:
            BlobError: It does not.
        """
        metrics = super().evaluate(*args, **kwargs)
        wanted = self.args.metric_for_best_model
        if self.is_in_train and wanted and not args and "eval_dataset" not in kwargs:
            check_metric(wanted, metrics)
        return metrics

    def mean_nll(self, rows: Any, num_samples: int) -> float:
        """NLL of single networks on all rows, see `evaluation.mean_nll`; every process finds the same."""
        self.model.eval()
        return evaluation.mean_nll(self.model, self._batches(rows), self._aligned_labels, num_samples)

    def predictive_nll(self, rows: Any) -> tuple[float, int]:
        """NLL of the predictive summed over all rows, nats, and their examples or tokens; on every process the same."""
        self.model.eval()
        return evaluation.predictive_nll(self.model, self._batches(rows), self._aligned_labels, self.eval_sampling)

    def plain_loader(self, rows: Any) -> DataLoader:
        """Batches of all rows in their order, for every process the same ones."""
        collate = self.data_collator
        if isinstance(rows, Dataset):
            rows = self._remove_unused_columns(rows, description="fitting")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="fitting")
        # a generator of its own: the global random state stays as it is
        return DataLoader(rows, self.args.eval_batch_size, collate_fn=collate, generator=torch.Generator())

    def _batches(self, rows: Any) -> Iterable[Mapping[str, Any]]:
        return (self._prepare_inputs(dict(batch)) for batch in self.plain_loader(rows))

    # ----- the card ----------------------------------------------------------------------------------------------

    def create_model_card(  # type: ignore[override]
        self, license: str | None = None, dataset: str | None = None, tasks: str | None = None, **kwargs: Any
    ) -> None:
        """Write the model card of a push, unless a script writes one from its run.

        Args:
            license, dataset, tasks: Passed on by `push_to_hub`: the adapter's licence, the data's Hub id, the task's
                tag on the Hub (for example "text-classification").
        """
        if self.is_world_process_zero() and not self.card_from_run:
            trainer: Any = self
            summary = summarize(trainer, DataSource(dataset, dataset) if dataset else None, tasks, license=license)
            summary.results = last_evaluation(trainer)
            write_model_card(Path(str(self.args.output_dir)), summary)


def _has_classes(labels: Tensor | None) -> bool:
    return labels is not None and not labels.is_floating_point()  # a loss of the user's own may have other labels


class BlobTrainer(BlobTrainerMixin, CheckpointMixin, Trainer):
    """`transformers.Trainer` for a `BlobModel`; see `BlobTrainerMixin` for its arguments."""
