"""`ObjectiveMixin`: NLL + pi_t * KL, micro-batch by micro-batch, however the loss of a batch is computed."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from blob_hf.inference.choices import NO_CHOICE
from blob_hf.inference.predict import IGNORED_LABEL
from blob_hf.trainer.checkpoints import newest_complete
from blob_hf.trainer.class_weights import total_weight
from blob_hf.trainer.kl.state import AtStep, KLState
from blob_hf.trainer.training_args import BlobTrainingArguments
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import kl_divergence
from blob_hf.utils.errors import BlobError, NonFiniteLossError

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ObjectiveMixin(_Base):
    """What a transformers trainer minimises: the KL belongs to the steps, and any loss may stand for the NLL.

    Attributes:
        kl: The KL of the last training; None without a posterior to train.
        class_weights: Of the NLL in training, `(classes,)`.
    """

    args: BlobTrainingArguments
    model: Any
    kl: KLState | None = None
    class_weights: Tensor | None = None
    _loss_shifts_labels: bool
    _step_nll: Tensor | None = None  # of the last micro-batch
    _is_scaled: bool | None = None
    _kl_in_loss = False  # whether the KL's gradient came through the loss of this step
    _loss_before: Tensor | None = None  # of the steps since the last log, before this one

    @property
    def blob_model(self) -> BlobModel:
        """The model without the wrappers of an engine."""
        return self.accelerator.unwrap_model(self.model)

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
        loss = nll if self.kl is None else nll + self._weighted_kl(self.kl)
        self._require_finite(loss)
        return (loss, outputs) if return_outputs else loss

    @property
    def loss_is_scaled_for_ga(self) -> bool | None:
        """Whether the last loss is a share of the whole accumulated batch's, or the mean of its own micro-batch.

        Ours is a share. That of another `compute_loss` is taken for a mean, unless its class says otherwise by setting
        this, as for transformers' trainer.
        """
        return self._step_nll is not None if self._is_scaled is None else self._is_scaled

    @loss_is_scaled_for_ga.setter
    def loss_is_scaled_for_ga(self, value: bool | None) -> None:
        self._is_scaled = value

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' step, which returns what the log shows as `loss`: the NLL alone, not the objective.

        Under the published weights pi_t KL is thousands of nats in some steps and 0 in most: nobody could compare it.
        The loss of another `compute_loss` stands for the NLL.
        """
        self._step_nll = None
        loss = super().training_step(*args, **kwargs)
        if self._step_nll is None:
            self._require_finite(loss)
        nll = loss if self._step_nll is None else self._step_nll
        if self.kl is not None:
            self.kl.record(self._kl_now(self.kl), nll)
        return nll

    def begin_step(self) -> None:
        """Before the batches of an optimizer step: set its pi_t, whatever will compute its loss."""
        if self.kl is not None:
            self._kl_now(self.kl)
            self._kl_in_loss, self._loss_before = False, self._tr_loss.clone()

    def end_step(self) -> None:
        """Before the optimizer's step: its loss must have had the KL in it, and the history an NLL.

        Raises:
            BlobError: `kl_gradient="loss"`, and a `compute_loss` of a subclass has left the KL out.
        """
        if self.kl is None:
            return
        if self.args.kl_gradient == "loss" and not self._kl_in_loss:
            raise BlobError(
                f"kl_gradient='loss' needs the KL in the loss, but compute_loss of {type(self).__name__} leaves it "
                "out: add to what super().compute_loss returns, or use kl_gradient='decoupled'"
            )
        now = self._kl_now(self.kl)
        if not self.kl.history.has(now.step) and self._loss_before is not None:  # of another training_step
            self.kl.record(now, self._tr_loss - self._loss_before)

    def _nll(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        if self.compute_loss_func is not None and model.training:
            return self._users_loss(self.compute_loss_func, model, inputs, num_items)
        inputs = dict(inputs)
        labels = self._aligned_labels(inputs)
        outputs = model(**inputs)
        logits = outputs.logits.float().flatten(0, -2)
        weights = self.class_weights if model.training else None
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        targets = labels.flatten()
        if smoothing and labels.dim() == 1 and (logits <= NO_CHOICE).any():
            targets, smoothing = _smoothed_choices(logits, labels, smoothing), 0.0
        total = F.cross_entropy(
            logits,
            targets,
            weight=weights,
            ignore_index=IGNORED_LABEL,
            label_smoothing=smoothing,
            reduction="sum",
        )
        if num_items is None:
            count = (labels != IGNORED_LABEL).sum().clamp(min=1)
            return total / (count if weights is None else total_weight([{"labels": labels}], weights)), outputs
        if isinstance(num_items, Tensor):
            num_items = num_items.flatten()[0].to(total.device)
            num_items = num_items.masked_fill(num_items == 0, 1)  # texts cut before their targets have no loss
        return total * self._loss_scale(num_items) / num_items, outputs

    def _users_loss(
        self, loss: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """`compute_loss_func` as transformers calls it: on the labels of the batch, which the model does not see."""
        inputs = dict(inputs)
        labels = inputs.get("labels")
        if labels is not None:
            self._aligned_labels(inputs)
        outputs = model(**inputs)
        return loss(outputs, labels, num_items_in_batch=num_items) * self._loss_scale(num_items), outputs

    def _loss_scale(self, num_items: Tensor | int | None) -> int:
        """`num_items` counts all processes, over which DDP takes the mean of the gradients."""
        averaged = num_items is not None and self.args.average_tokens_across_devices
        return self.accelerator.num_processes // self.get_tp_size() if averaged else 1

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

    def _kl_now(self, kl: KLState) -> AtStep:
        step, prior_std = self.state.global_step + 1, self.blob_model.blob_config.prior_std
        return kl.at_step(step, self.model, prior_std, self._mean_over_processes)

    def _weighted_kl(self, kl: KLState) -> Tensor:
        """This micro-batch's share of pi_t * KL; with a gradient if that goes through the loss."""
        now = self._kl_now(kl)
        value = now.kl
        if self.args.kl_gradient == "loss":
            value = kl_divergence(self.model, self.blob_model.blob_config.prior_std)
            if value.requires_grad:
                value.register_hook(self._note_kl_gradient)
        return now.weight * value / getattr(self, "current_gradient_accumulation_steps", 1)

    def _note_kl_gradient(self, gradient: Tensor) -> None:
        self._kl_in_loss = True

    def _require_finite(self, loss: Tensor) -> None:
        if not self._all_finite(loss):
            raise NonFiniteLossError(self._non_finite(loss))

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

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="mean")


def _smoothed_choices(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """Target probabilities `(rows, choices)`: the label's, of which a share is spread over the choices of the row.

    (On one that a row does not have it would cost 1e9 nats.)
    """
    possible = (logits > NO_CHOICE).to(logits.dtype)
    label = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    return torch.lerp(label, possible / possible.sum(-1, keepdim=True), share)
