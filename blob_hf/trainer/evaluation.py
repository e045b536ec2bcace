"""The trainers' evaluation: predictions with posterior samples and with the posterior mean, and exact losses."""

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from blob_hf.baselines import Method, find_method
from blob_hf.inference.predict import IGNORED_LABEL, TokenScores, score_targets, token_log_probs
from blob_hf.trainer.engines import fsdp_limits
from blob_hf.tuner.posterior import posterior_mean, posterior_samples

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class EvaluationMixin(_Base):
    """Adds Monte Carlo evaluation to a transformers trainer.

    Attributes:
        sample_gap: Of the last evaluation: mean NLL of single samples over that of their predictive, less 1.
        nll_by_samples: Of the last evaluation of a language model: NLL of the predictive of the first 1, 2, ...
            samples, nats per token.
    """

    args: Any
    model: Any
    sample_gap: float | None = None
    nll_by_samples: np.ndarray | None = None

    _aligned_labels: Callable[[dict[str, Any]], Tensor]  # of the trainer

    @property
    def method(self) -> Method:
        """The method of this training."""
        return find_method(self.args.method)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Tensor | None]:
        """Predict with `eval_samples` posterior samples and with the posterior mean.

        Returns:
            (loss, predictions, labels). The predictions of a classifier are the fields of `ClassPrediction`, those
            of a language model the fields of `TokenScores`, as a tuple: log-probabilities of the predictive first.
        """
        inputs = self._prepare_inputs(dict(inputs))
        labels = inputs.get("labels")
        with self.compute_loss_context_manager():
            if labels is None or labels.dim() == 1:
                inputs.pop("labels", None)
                classes = self.method.predict_classes(model, inputs, self.args)
                predictions = (classes.log_probs, classes.sample_log_probs, classes.mean_log_probs)
                loss = None if labels is None else F.nll_loss(classes.log_probs, labels)
            else:
                targets = self._aligned_labels(inputs)
                scores = score_targets(
                    model, inputs, targets, self.num_eval_samples, self.args.eval_seed,
                    self.args.posterior_batch_size or 1, self.args.antithetic,
                )  # fmt: skip
                predictions = tuple(getattr(scores, field.name) for field in fields(TokenScores))
                labels = targets
                loss = -scores.log_probs.sum() / (targets != IGNORED_LABEL).sum().clamp(min=1)
        return loss, None if prediction_loss_only else predictions, labels

    @property
    def num_eval_samples(self) -> int:
        """Networks that an evaluation draws: `eval_samples`, or what the method has; 0 for a point estimate."""
        return self.method.num_samples(self.model, self.args)

    def plain_loader(self, rows: Any) -> DataLoader:
        """Batches of all rows in their order, for every process the same ones."""
        collate = self.data_collator
        if isinstance(rows, Dataset):
            rows = self._remove_unused_columns(rows, description="fitting")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="fitting")
        return DataLoader(rows, self.args.eval_batch_size, collate_fn=collate)

    @torch.no_grad()
    def mean_nll(self, rows: Any, num_samples: int) -> float:
        """NLL of single networks, nats per example or token: the mean over samples, or with 0 that of the mean.

        (Not of the samples' predictive.) Every process goes through all rows and finds the same.
        """
        self.model.eval()
        total, count = 0.0, 0
        for batch in self.plain_loader(rows):
            inputs = self._prepare_inputs(dict(batch))
            labels = self._aligned_labels(inputs)
            for s in range(max(num_samples, 1)):
                with posterior_samples(self.model, 1, 0, s) if num_samples else posterior_mean(self.model):
                    logits = self.model(**inputs).logits
                total -= token_log_probs(logits, labels).sum().item()
                count += int((labels != IGNORED_LABEL).sum())
        return total / count

    def predictive_nll(self, rows: Any) -> float:
        """NLL of a classifier's predictive, nats per example; every process goes through all rows."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in self.plain_loader(rows):
            inputs = self._prepare_inputs(dict(batch))
            labels = inputs.pop("labels")
            total += F.nll_loss(
                self.method.predict_classes(self.model, inputs, self.args).log_probs, labels, reduction="sum"
            ).item()
            count += len(labels)
        return total / count

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop, with an exact loss: a sum over examples or tokens, divided by their number.

        (The loop's own loss is the mean of batch means, in which a short last batch counts too much.) Adds `nll` of
        the predictive, `mean_nll` of the posterior mean, and `sample_nll`, the mean of the samples' own, in nats.
        """
        metric_key_prefix = kwargs.get("metric_key_prefix", "eval")
        kwargs["prediction_loss_only"] = False  # the predictions are small, and the exact loss needs them
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer would keep the padding rows
        with fsdp_limits():
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        predictions: Any = output.predictions
        labels: Any = output.label_ids
        if labels is None or predictions is None or output.metrics is None:
            return output
        count = (labels != IGNORED_LABEL).sum()
        if labels.ndim == 1:
            rows = range(len(labels))
            nll, mean_nll = (-scores[rows, labels].sum() / count for scores in (predictions[0], predictions[2]))
            sample_nll = -predictions[1][rows, :, labels].mean(axis=1).sum() / count
        else:
            kept = labels != IGNORED_LABEL
            nll, mean_nll = (-scores[kept].sum() / count for scores in predictions[:2])
            each = -predictions[2].sum(axis=0) / count
            sample_nll = each.mean()
            output.metrics[f"{metric_key_prefix}_nll_sample_std"] = float(each.std())
            self.nll_by_samples = -predictions[3].sum(axis=0) / count
        for name, value in (("loss", nll), ("nll", nll), ("mean_nll", mean_nll), ("sample_nll", sample_nll)):
            output.metrics[f"{metric_key_prefix}_{name}"] = float(value)
        if self.num_eval_samples > 1 and nll > 0 and (metric_key_prefix == "eval" or self.sample_gap is None):
            self.sample_gap = float(sample_nll / nll - 1)
        return output
