"""`BlobTrainer`: transformers' trainer with the BLoB objective and posterior evaluation."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
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

from blob_hf.inference.predict import IGNORED_LABEL
from blob_hf.reporting.model_card import write_model_card
from blob_hf.reporting.run_summary import DataSource
from blob_hf.trainer import evaluation
from blob_hf.trainer.callback import BlobCallback
from blob_hf.trainer.checkpoints import CheckpointMixin, newest_complete
from blob_hf.trainer.class_weights import balanced_weights, total_weight
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
from blob_hf.trainer.own_training import with_own_optimizer
from blob_hf.trainer.selection import check_metric, eval_nll
from blob_hf.trainer.summary import last_evaluation, summarize
from blob_hf.trainer.training_args import BlobTrainingArguments, as_blob_arguments
from blob_hf.tuner.model import BlobModel, as_blob_model
from blob_hf.tuner.posterior import gaussian_layers, sampling_of
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError, NonFiniteLossError
from blob_hf.utils.numbers import number_or_word
from blob_hf.utils.sharding import is_sharded

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)

Rows: TypeAlias = Dataset | torch.utils.data.Dataset[Any]
VERDICT_ROWS = 64  # on which a finished training looks at what its samples predict


class BlobTrainerMixin(_Base):
    """Adds to a transformers trainer: NLL + pi_t * KL, the decoupled KL step, and Monte Carlo evaluation.

    Args:
        model: A `BlobModel` with a posterior; with `point_estimate=True` plain LoRA, or any model.
        args: `BlobTrainingArguments` (or the Seq2Seq ones); to transformers' own BLoB's defaults are added.
        model_init: Makes the model, instead of `model`; anew in every training.
        point_estimate: Train a model without a posterior by its NLL alone, with all else equal.
        compute_loss_func: Not used: the objective is the trainer's own.
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
    _step_nll: Tensor | None = None  # of the last micro-batch
    loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole accumulated batch

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
        adopted = None if model is None else _adopt(model)
        own = as_blob_arguments(args, self.arguments_class)
        super().__init__(
            adopted, own, data_collator, train_dataset, eval_dataset, processing_class,
            model_init,  # type: ignore[arg-type]
            compute_loss_func, compute_metrics, callbacks, optimizers, **kwargs,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True  # count the items of a batch, whether or not the model would use them
        # transformers goes by the loss type of the config, which models like GPT-2 do not have
        base = unwrap_peft_model(self.model)
        self._loss_shifts_labels = base.can_generate() and not base.config.is_encoder_decoder
        self.kl: KLState | None = KLState() if gaussian_layers(self.model) else None
        self.add_callback(BlobCallback(self))  # type: ignore[arg-type]
        self._check_model()
        self.class_weights: Tensor | None = None
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

    @property
    def blob_model(self) -> BlobModel:
        """The model without the wrappers of an engine."""
        return self.accelerator.unwrap_model(self.model)

    def set_model(self, model: nn.Module) -> None:
        """Go on with another model, to evaluate and to save."""
        self.model = self.model_wrapped = model.to(self.args.device)

    def call_model_init(self, trial: Any = None) -> Any:
        """transformers' `call_model_init`; sets a trial's arguments first: the prior std is part of the model."""
        if trial is not None:
            self._hp_search_setup(trial)
            self.args.kl_learning_rate = number_or_word(self.args.kl_learning_rate)  # a trial's number came as a word
        model = _adopt(super().call_model_init(trial))
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

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """transformers' batches of an optimizer step and the number of their items; with class weights their sum."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.class_weights is None or count is None:
            return batches, count
        total = total_weight(batches, self.class_weights).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        # like the count, not once for each device that has the same batch
        return batches, total / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """NLL + pi_t * KL of one micro-batch, such that the micro-batches of an optimizer step add up to the step's.

        The NLL is the mean over the examples (or target tokens) of the whole accumulated batch over all processes,
        averaged over `train_samples` posterior samples; with class weights the weighted mean, as of torch's
        `CrossEntropyLoss(weight=...)` on that batch. The KL counts once per optimizer step.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite; no weight has been changed by it.
        """
        nll, outputs = self._nll(model, inputs, num_items_in_batch)
        if not model.training:
            return (nll, outputs) if return_outputs else nll
        for _ in range(self.args.train_samples - 1):
            nll = nll + self._nll(model, inputs, num_items_in_batch)[0]
        nll = nll / self.args.train_samples
        self._step_nll = nll.detach()
        loss = nll if self.kl is None else nll + self._weighted_kl(self.kl, nll)
        if not self._all_finite(loss):
            raise NonFiniteLossError(self._non_finite(loss))
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' step, which returns what the log shows as `loss`: the NLL alone, not the objective.

        Under the published weights pi_t KL is thousands of nats in some steps and 0 in most: nobody could compare it.
        """
        self._step_nll = None
        loss = super().training_step(*args, **kwargs)
        return loss if self._step_nll is None else self._step_nll

    def _nll(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        inputs = dict(inputs)
        labels = self._aligned_labels(inputs)
        outputs = model(**inputs)
        logits = outputs.logits.float().flatten(0, -2)
        weights = self.class_weights if model.training else None
        total = F.cross_entropy(
            logits,
            labels.flatten(),
            weight=weights,
            ignore_index=IGNORED_LABEL,
            label_smoothing=self.args.label_smoothing_factor if model.training else 0.0,
            reduction="sum",
        )
        if num_items is None:
            count = (labels != IGNORED_LABEL).sum().clamp(min=1)
            return total / (count if weights is None else total_weight([{"labels": labels}], weights)), outputs
        if isinstance(num_items, Tensor):
            num_items = num_items.flatten()[0].to(total.device)
        # num_items counts all processes, over which DDP takes the mean of the gradients
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * scale / num_items, outputs

    def _aligned_labels(self, inputs: dict[str, Any]) -> Tensor:
        """Pop the labels, shifted so that they line up with the logits, and give a decoder its inputs.

        The labels are not passed on: models would compute a loss of their own, some ignoring `num_items_in_batch`.
        """
        labels = inputs.pop("labels")
        if labels.is_floating_point():
            raise BlobError(f"labels must be class or token ids, got {labels.dtype}: regression has no NLL here")
        if self._loss_shifts_labels:
            return F.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:].contiguous()
        encoder_decoder = getattr(self.model.config, "is_encoder_decoder", False)
        if encoder_decoder and labels.dim() > 1 and inputs.get("decoder_input_ids") is None:
            base: Any = self.blob_model.get_base_model()
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
        return labels

    def _weighted_kl(self, kl: KLState, nll: Tensor) -> Tensor:
        """This micro-batch's share of pi_t * KL."""
        prior_std, through_loss = self.blob_model.blob_config.prior_std, self.args.kl_gradient == "loss"
        step = self.state.global_step + 1
        weighted = kl.share(self.model, prior_std, nll, step, through_loss, self._mean_over_processes)
        return weighted / getattr(self, "current_gradient_accumulation_steps", 1)

    def _all_finite(self, loss: Tensor) -> bool:
        """Whether the loss is finite on every process: all of them stop together, none waits for one that is gone."""
        bad = (~torch.isfinite(loss.detach())).float()
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        return not bad.item()

    def _non_finite(self, loss: Tensor) -> str:
        if torch.isfinite(loss):
            loss = loss.new_tensor(float("nan"))  # another process has seen it
        checkpoint = newest_complete(str(self.args.output_dir))
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved yet"
        return (
            f"the loss became {loss.item()} at step {self.state.global_step + 1}; "
            f"try a lower learning_rate or kl_learning_rate, a longer warm-up, or bf16 instead of fp16 ({kept})"
        )

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

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="mean")

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
        labelled = (
            batch for batch in self._batches(evaluation.spread(rows, VERDICT_ROWS)) if batch.get("labels") is not None
        )
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


def _adopt(model: nn.Module) -> nn.Module:
    """A PEFT model with our saving and loading; any other model stays as it is."""
    return as_blob_model(model) if isinstance(model, PeftModel) and _is_lora(model) else model


def _is_lora(model: PeftModel) -> bool:
    return str(getattr(model.peft_type, "value", model.peft_type)) == "LORA"


def num_trained(model: nn.Module) -> int:
    """Trainable weights, also where ZeRO-3 has sharded them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


class BlobTrainer(BlobTrainerMixin, CheckpointMixin, Trainer):
    """`transformers.Trainer` for a `BlobModel`; see `BlobTrainerMixin` for its arguments."""
