"""`BlobSeq2SeqTrainer`: scoring and generating with an encoder-decoder."""

from typing import Any

from torch import Tensor, nn
from transformers import Seq2SeqTrainer
from transformers.integrations import is_deepspeed_zero3_enabled

from blob_hf.inference.generate import generate_mean, generate_predictive, generate_samples, pad_to
from blob_hf.trainer.checkpoints import CheckpointMixin
from blob_hf.trainer.trainer import BlobTrainerMixin
from blob_hf.trainer.training_args import BlobSeq2SeqTrainingArguments


class BlobSeq2SeqTrainer(BlobTrainerMixin, CheckpointMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` for a `BlobModel`.

    Rows with labels are scored; rows without labels are generated from; with `predict_with_generate` rows with labels
    get both. Generation gives `(batch, length)` token ids of the posterior mean and `(batch, samples, length)` of
    the posterior samples, appended to the predictions in this order and padded with the pad token; with
    `decoding="predictive"` also `(batch, length)` of the posterior predictive and its `PredictiveText.scores`.
    """

    args: BlobSeq2SeqTrainingArguments  # type: ignore[assignment]
    arguments_class = BlobSeq2SeqTrainingArguments
    _scores_alone = False  # whether rows with labels are scored, whatever `predict_with_generate` says

    def prediction_step(  # type: ignore[override]
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
        generates = labels is None or (self.args.predict_with_generate and not self._scores_alone)
        if prediction_loss_only or not generates:
            return loss, predictions, labels
        return loss, (*predictions, *self._generate(inputs, gen_kwargs)), labels

    def score(self, dataset: Any, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of teacher-forced scoring alone: exact NLLs, without generation or compute_metrics."""
        self._scores_alone, kept, self.compute_metrics = True, self.compute_metrics, None
        try:
            return self.predict(dataset, metric_key_prefix=metric_key_prefix).metrics or {}
        finally:
            self._scores_alone, self.compute_metrics = False, kept

    def _generate(self, inputs: dict[str, Any], gen_kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        inputs = self._prepare_inputs(dict(inputs))
        inputs = {
            name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask", "inputs_embeds")
        }
        gen_kwargs = {**getattr(self, "_gen_kwargs", {}), **gen_kwargs}
        gen_kwargs = {name: value for name, value in gen_kwargs.items() if value is not None}
        gen_kwargs.setdefault("synced_gpus", is_deepspeed_zero3_enabled())
        model, sampling, pad = self.blob_model, self.eval_sampling, self.model.config.pad_token_id or 0
        # every batch of every process must come back with the same length to be concatenated
        longest = gen_kwargs["max_new_tokens"] + 1 if "max_new_tokens" in gen_kwargs else gen_kwargs.get("max_length")
        longest = longest or self.model.generation_config.max_length or 20
        mean = generate_mean(model, inputs, **gen_kwargs)
        samples = mean.unsqueeze(1)
        if sampling.num_samples and self.args.decoding != "mean":
            samples = generate_samples(model, inputs, sampling, **gen_kwargs)
        texts = [mean, samples]
        if self.args.decoding != "predictive":
            return tuple(_padded(text, longest, pad) for text in texts)
        predictive = generate_predictive(model, inputs, sampling, **gen_kwargs)
        texts.append(predictive.sequences)
        return (*(_padded(text, longest, pad) for text in texts), predictive.scores)


def _padded(tokens: Tensor, length: int, pad: int) -> Tensor:
    return pad_to(tokens, max(length, tokens.shape[-1]), pad)
