"""`BlobTrainer` and `BlobSeq2SeqTrainer`: transformers' trainers with the BLoB objective and posterior evaluation."""

import json
import logging
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import unwrap_peft_model

from blob_hf.inference.generate import generate_mean, generate_predictive, generate_samples, pad_to
from blob_hf.inference.predict import IGNORED_LABEL
from blob_hf.reporting.model_card import write_model_card
from blob_hf.reporting.run_summary import DataSource
from blob_hf.trainer.callback import BlobCallback
from blob_hf.trainer.checkpoints import CheckpointMixin, newest_complete
from blob_hf.trainer.engines import OWN_OPTIMIZER, check_deepspeed, decorrelate_noise, engine_of, require_whole_models
from blob_hf.trainer.evaluation import EvaluationMixin
from blob_hf.trainer.kl.diagnosis import KLDiagnosis
from blob_hf.trainer.kl.history import FILE_NAME, LOGGED, KLHistory
from blob_hf.trainer.kl.schedule import KLSchedule
from blob_hf.trainer.kl.step import DecoupledKLStep
from blob_hf.trainer.kl.target import TargetSchedule
from blob_hf.trainer.kl.verdict import KLFigures, Verdict, initial_stds, judge, measure
from blob_hf.trainer.summary import last_evaluation, summarize
from blob_hf.trainer.training_args import DEFINING
from blob_hf.tuner.model import BlobModel, as_blob_model
from blob_hf.tuner.posterior import gaussian_layers, kl_divergence, mean_posterior_std, sampled_layers
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError, NonFiniteLossError

logger = logging.getLogger(__name__)

LOG_STATE = "log_state.json"
INITIAL_STDS = "initial_stds.safetensors"


class BlobTrainerMixin(EvaluationMixin, CheckpointMixin):
    """Adds to a transformers trainer: NLL + pi_t * KL, the decoupled KL step, and Monte Carlo evaluation.

    Needs `BlobArguments` among its training arguments and, for `method="blob"`, a `BlobModel`.

    Attributes:
        calibration_dataset: Rows held out of the training ones, for methods that choose something on them.
        trained_parameters: Of all trainings so far.
    """

    args: Any
    model: Any
    calibration_dataset: Any = None
    trained_parameters = 0
    card_from_run = False  # whether a script writes the model card
    loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole accumulated batch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._kl_step: DecoupledKLStep | None = None
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # count the items of a batch, whether or not the model would use them
        # transformers goes by the loss type of the config, which models like GPT-2 do not have
        base = unwrap_peft_model(self.model)
        self._loss_shifts_labels = base.can_generate() and not base.config.is_encoder_decoder
        self.kl_history = KLHistory()
        self.kl_schedule: KLSchedule | TargetSchedule = KLSchedule("none")
        self.kl_diagnosis: KLDiagnosis | None = None
        self.kl_figures: KLFigures | None = None
        self._initial_stds: dict[str, Tensor] = {}
        self._kl_of_step: tuple[int, Tensor, Tensor, float] | None = None
        self.add_callback(BlobCallback(self))
        self._check_model()

    def _adopt(self, model: nn.Module) -> nn.Module:
        """Make a plain LoRA model one of this method, with our saving; any other model stays as it is."""
        if isinstance(model, PeftModel) and (self.method.sampled or isinstance(model, BlobModel)):
            model = as_blob_model(model)
            if not self.method.variational and not sampled_layers(model):
                self.method.attach(model, {})
        return model

    def _check_model(self) -> None:
        self._adopt(self.model)
        has_posterior = bool(gaussian_layers(self.model))
        if self.args.n_gpu > 1:
            raise BlobError(
                "several GPUs in one process (DataParallel) cannot hold posterior samples; use accelerate launch"
            )
        saved = getattr(self.model, "method", None)  # of an adapter that is finished
        if self.method.variational and not has_posterior:
            raise BlobError(
                "method='blob' needs a model with a posterior (get_blob_model), or train with method='lora'"
            )
        if not self.method.variational and sampled_layers(self.model) and saved != self.args.method:
            raise BlobError(
                f"method={self.args.method!r} needs plain LoRA, but this model has a posterior (method {saved!r})"
            )
        if self.method.variational and self.args.beta not in (None, self._posterior.blob_config.prior_std):
            raise BlobError(
                f"beta is the prior std: got {self.args.beta}, but the model was made with "
                f"prior_std={self._posterior.blob_config.prior_std}; set one of them"
            )
        check_deepspeed(self.args)
        if self.method.variational and self.args.kl_gradient == "loss" and is_deepspeed_zero3_enabled():
            raise BlobError("kl_gradient='loss' cannot reach sharded parameters under ZeRO-3; use 'decoupled'")

    @property
    def _posterior(self) -> BlobModel:
        return self.accelerator.unwrap_model(self.model)

    # ----- training ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or fit, as the method does; see `CheckpointMixin.train` for resuming."""
        if self.method.post_hoc or self.method.retrains:
            require_whole_models(self.accelerator, self.method.name)
        fit = super().train
        return self.method.train(self, lambda resume: fit(resume, *args, **kwargs), resume_from_checkpoint)

    def take_model(self, model: nn.Module) -> None:
        """Go on with another model, to evaluate and to save."""
        self.model = self.model_wrapped = model.to(self.args.device)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """transformers' `call_model_init`; sets a trial's arguments first: the prior std is part of the model."""
        if trial is not None:
            self._hp_search_setup(trial)
        return self._adopt(super().call_model_init(trial))

    def defining_settings(self) -> dict[str, Any]:
        """The training arguments that make two runs different runs."""
        return {name: getattr(self.args, name) for name in DEFINING}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        given, self.args.weight_decay = self.args.weight_decay, self.method.weight_decay(self)
        try:
            optimizer = super().create_optimizer(model)
        finally:
            self.args.weight_decay = given
        bare = getattr(optimizer, "optimizer", optimizer)  # of a second call to train()
        if not self.method.variational or (self._kl_step is not None and self._kl_step.optimizer is bare):
            return optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise BlobError(OWN_OPTIMIZER)  # a config that the launcher brought
        config = self._posterior.blob_config
        rate = self.args.kl_learning_rate if self.args.kl_gradient == "decoupled" else 0.0
        self._kl_step = DecoupledKLStep(optimizer, self.model, config.prior_std, config.std_parameterization, rate)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """NLL + pi_t * KL of one micro-batch, such that the micro-batches of an optimizer step add up to the step's.

        The NLL is the mean over the examples (or target tokens) of the whole accumulated batch over all processes,
        averaged over `train_samples` posterior samples. The KL counts once per optimizer step.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite; no weight has been changed by it.
        """
        nll, outputs = self._nll(model, inputs, num_items_in_batch)
        if not model.training:
            return (nll, outputs) if return_outputs else nll
        for _ in range(self.args.train_samples - 1):
            nll = nll + self._nll(model, inputs, num_items_in_batch)[0]
        nll = nll / self.args.train_samples
        loss = nll + self._weighted_kl(nll) if self.method.variational else nll
        if not self._all_finite(loss):
            raise NonFiniteLossError(self._non_finite(loss))
        return (loss, outputs) if return_outputs else loss

    def _nll(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        inputs = dict(inputs)
        labels = self._aligned_labels(inputs)
        outputs = model(**inputs)
        logits = outputs.logits.float().flatten(0, -2)
        total = F.cross_entropy(
            logits,
            labels.flatten(),
            ignore_index=IGNORED_LABEL,
            label_smoothing=self.args.label_smoothing_factor if model.training else 0.0,
            reduction="sum",
        )
        if num_items is None:
            return total / (labels != IGNORED_LABEL).sum().clamp(min=1), outputs
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
            base: Any = self._posterior.get_base_model()
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
        return labels

    def _weighted_kl(self, nll: Tensor) -> Tensor:
        """This micro-batch's share of pi_t * KL; tells the KL step its weight and the history what happened."""
        step = self.state.global_step + 1
        through_loss = self.args.kl_gradient == "loss"
        if through_loss or self._kl_of_step is None or self._kl_of_step[0] != step:
            with torch.set_grad_enabled(through_loss):
                kl = kl_divergence(self.model, self._posterior.blob_config.prior_std)
            self._kl_of_step = (step, kl, mean_posterior_std(self.model), self.kl_schedule(step))
        _, kl, std, weight = self._kl_of_step
        lr_scale = 1.0
        if self._kl_step is not None:
            self._kl_step.weight = weight
            lr_scale = self._kl_step.lr_scale
        self.kl_history.add(step, nll, kl, weight, std, lr_scale)
        return weight * kl / getattr(self, "current_gradient_accumulation_steps", 1)

    def _all_finite(self, loss: Tensor) -> bool:
        """Whether the loss is finite on every process: all of them stop together, none waits for one that is gone."""
        bad = (~torch.isfinite(loss.detach())).float()
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        return not bad.item()

    def _non_finite(self, loss: Tensor) -> str:
        if torch.isfinite(loss):
            loss = loss.new_tensor(float("nan"))  # another process has seen it
        checkpoint = newest_complete(self.args.output_dir)
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved yet"
        return (
            f"the loss became {loss.item()} at step {self.state.global_step + 1}; "
            f"try a lower learning_rate or kl_learning_rate, a longer warm-up, or bf16 instead of fp16 ({kept})"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of `LOGGED` over the steps since the last log, evaluation or save."""
        rows = self.kl_history.drain(self._mean_over_processes)
        if rows and "loss" in logs:
            logs.update({name: fmean(row[name] for row in rows) for name in LOGGED})
        super().log(logs, start_time)

    def save_extra(self, folder: Path) -> None:
        """Add to a checkpoint the KL history, the stds of the start and the loss that is not logged yet."""
        self.save_history(folder)
        loss = self._mean_over_processes(self._tr_loss).item()
        if self.args.should_save:
            if self._initial_stds:
                save_file(self._initial_stds, folder / INITIAL_STDS)
            state: dict[str, Any] = {"loss_since_last_log": loss, "last_logged_step": self._globalstep_last_logged}
            state["engine"] = engine_of(self.accelerator)
            files.write_text(folder / LOG_STATE, json.dumps(state) + "\n")

    def check_resumable(self, folder: Path) -> None:
        """Refuse a checkpoint whose optimizer state this engine cannot read."""
        if not (folder / LOG_STATE).is_file():
            return
        saved = json.loads((folder / LOG_STATE).read_text(encoding="utf-8")).get("engine")
        engine = engine_of(self.accelerator)
        if saved not in (None, engine):
            raise BlobError(
                f"{folder} was saved under {saved}, but this run is {engine}: optimizer states are not exchangeable; "
                f"resume under {saved}, or continue from its adapter with --adapter_name_or_path {folder}"
            )

    def resume_extra(self) -> None:
        """Take over what `save_extra` added to the checkpoint that is resumed from."""
        self.kl_history = KLHistory()
        self.kl_figures = self.sample_gap = None
        self._initial_stds = initial_stds(self.model)
        if self.resumed_from is None:
            decorrelate_noise(self.args.seed, self.accelerator, self.model)
            return
        folder = Path(self.resumed_from)
        if (folder / INITIAL_STDS).is_file():
            self._initial_stds = load_file(folder / INITIAL_STDS)
        self.kl_history.load(folder / FILE_NAME)
        if isinstance(self.kl_schedule, TargetSchedule) and self.kl_history.rows:
            self.kl_schedule.kl_start = self.kl_history.rows[0]["kl"]
        if (folder / LOG_STATE).is_file():
            state = json.loads((folder / LOG_STATE).read_text(encoding="utf-8"))
            self._tr_loss += state["loss_since_last_log"]
            self._total_loss_scalar -= state["loss_since_last_log"]  # train_loss is that of this call's steps
            self._globalstep_last_logged = state["last_logged_step"]

    def save_history(self, folder: Path) -> None:
        """Write kl_history.csv into a folder (called on every process)."""
        self.kl_history.drain(self._mean_over_processes)
        if self.method.variational and self.args.should_save:
            self.kl_history.save(folder / FILE_NAME)

    def measure_kl(self) -> None:
        """Take the figures of the finished training, from which `kl_verdict` comes (called on every process)."""
        self.kl_history.drain(self._mean_over_processes)
        if self.method.variational and self.kl_history.rows:
            config = self._posterior.blob_config
            rate = self.args.kl_learning_rate if self.args.kl_gradient == "decoupled" else None
            self.kl_figures = measure(
                self.model, config.prior_std, config.std_parameterization, self.kl_schedule, self.kl_history.rows,
                self._initial_stds, rate,
            )  # fmt: skip

    @property
    def kl_verdict(self) -> Verdict | None:
        """What the KL did in the last training, None before it and for plain LoRA."""
        return None if self.kl_figures is None else judge(self.kl_figures, self.sample_gap)

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="mean")

    def create_model_card(  # type: ignore[override]
        self, license: str | None = None, dataset: str | None = None, tasks: str | None = None, **kwargs: Any
    ) -> None:
        """Write the model card of a push, unless a script writes one from its run.

        Args:
            license, dataset, tasks: Passed on by `push_to_hub`: the adapter's licence, the data's Hub id, the task's
                tag on the Hub (for example "text-classification").
        """
        if self.is_world_process_zero() and not self.card_from_run:
            summary = summarize(self, DataSource(dataset, dataset) if dataset else None, tasks, license=license)
            summary.results = last_evaluation(self)
            write_model_card(Path(self.args.output_dir), summary)


class BlobTrainer(BlobTrainerMixin, Trainer):
    """`transformers.Trainer` for a `BlobModel`."""


class BlobSeq2SeqTrainer(BlobTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` for a `BlobModel`.

    Rows with labels are scored; rows without labels are generated from; with `predict_with_generate` rows with labels
    get both. Generation gives `(batch, length)` token ids of the posterior mean and `(batch, samples, length)` of
    the posterior samples, appended to the predictions in this order and padded with the pad token; with
    `decoding="predictive"` also `(batch, length)` of the posterior predictive and its `PredictiveText.scores`.
    """

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Tensor | None]:
        loss, predictions, labels = None, (), None
        if inputs.get("labels") is not None:
            loss, predictions, labels = super().prediction_step(model, inputs, False, ignore_keys)
        if prediction_loss_only or (labels is not None and not self.args.predict_with_generate):
            return loss, predictions, labels
        return loss, (*predictions, *self._generate(inputs, gen_kwargs)), labels

    def score(self, dataset: Any, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of teacher-forced scoring alone: exact NLLs, without generation or compute_metrics."""
        kept = self.args.predict_with_generate, self.compute_metrics
        self.args.predict_with_generate, self.compute_metrics = False, None
        try:
            return self.predict(dataset, metric_key_prefix=metric_key_prefix).metrics or {}
        finally:
            self.args.predict_with_generate, self.compute_metrics = kept

    def _generate(self, inputs: dict[str, Any], gen_kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        inputs = self._prepare_inputs(dict(inputs))
        inputs = {
            name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask", "inputs_embeds")
        }
        gen_kwargs = {**getattr(self, "_gen_kwargs", {}), **gen_kwargs}
        gen_kwargs = {name: value for name, value in gen_kwargs.items() if value is not None}
        gen_kwargs.setdefault("synced_gpus", is_deepspeed_zero3_enabled())
        num_samples, seed, together = self.num_eval_samples, self.args.eval_seed, self.args.posterior_batch_size
        antithetic = self.args.antithetic
        model, pad = self._posterior, self.model.config.pad_token_id or 0
        # every batch of every process must come back with the same length to be concatenated
        longest = gen_kwargs["max_new_tokens"] + 1 if "max_new_tokens" in gen_kwargs else gen_kwargs.get("max_length")
        longest = longest or self.model.generation_config.max_length or 20
        mean = generate_mean(model, inputs, **gen_kwargs)
        samples = mean.unsqueeze(1)
        if num_samples and self.args.decoding != "mean":
            samples = generate_samples(model, inputs, num_samples, seed, together, antithetic, **gen_kwargs)
        texts = [mean, samples]
        if self.args.decoding != "predictive":
            return tuple(_padded(text, longest, pad) for text in texts)
        predictive = generate_predictive(model, inputs, num_samples, seed, antithetic, **gen_kwargs)
        texts.append(predictive.sequences)
        return (*(_padded(text, longest, pad) for text in texts), predictive.scores)


def _padded(tokens: Tensor, length: int, pad: int) -> Tensor:
    return pad_to(tokens, max(length, tokens.shape[-1]), pad)
