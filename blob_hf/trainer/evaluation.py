"""What an evaluation measures: predictions with posterior samples and with the mean, and exact losses."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Subset

from blob_hf.inference.predict import (
    IGNORED_LABEL,
    TokenScores,
    predict_classes,
    score_targets,
    token_log_probs,
)
from blob_hf.trainer.predictions import ClassPredictions
from blob_hf.tuner.posterior import posterior_mean, posterior_samples
from blob_hf.tuner.sampling import Sampling


@dataclass(frozen=True)
class Evaluated:
    """Predictions of one batch.

    Attributes:
        loss: NLL of the predictive, nats per example or token; None without labels.
        predictions: `ClassPredictions`, or the fields of `TokenScores`: log-probabilities of the predictive first.
        labels: Those that `predictions` line up with.
    """

    loss: Tensor | None
    predictions: tuple[Tensor, ...]
    labels: Tensor | None


def evaluate_classes(model: nn.Module, inputs: dict[str, Any], labels: Tensor | None, sampling: Sampling) -> Evaluated:
    """Predict the classes of a batch."""
    found = predict_classes(model, inputs, sampling)
    loss = None if labels is None else F.nll_loss(found.log_probs, labels)
    fields_ = (found.log_probs, found.sample_log_probs, found.mean_log_probs)
    predictions = ClassPredictions(fields_ if found.networks is None else (*fields_, found.networks))
    return Evaluated(loss, predictions, labels)


def evaluate_tokens(model: nn.Module, inputs: dict[str, Any], labels: Tensor, sampling: Sampling) -> Evaluated:
    """Score the target tokens of a batch, -100 where there is none."""
    scores = score_targets(model, inputs, labels, sampling)
    loss = -scores.log_probs.sum() / (labels != IGNORED_LABEL).sum().clamp(min=1)
    return Evaluated(loss, tuple(getattr(scores, field.name) for field in fields(TokenScores)), labels)


@dataclass(frozen=True)
class ExactLosses:
    """Sums over all examples or tokens of an evaluation, divided by their number, in nats.

    (transformers' own loss is the mean of batch means, in which a short last batch counts too much.)

    Attributes:
        nll: Of the predictive.
        mean_nll: Of the posterior mean.
        sample_nll: The mean of the samples' own.
        nll_by_samples: Of a language model: of the predictive of the first 1, 2, ... samples.
        nll_sample_std: Of a language model: std over the samples of their own.
    """

    nll: float
    mean_nll: float
    sample_nll: float
    nll_by_samples: np.ndarray | None = None
    nll_sample_std: float | None = None

    def metrics(self, prefix: str) -> dict[str, float]:
        """By the names of a trainer's log; the loss is that of the predictive."""
        found = {"loss": self.nll, "nll": self.nll, "mean_nll": self.mean_nll, "sample_nll": self.sample_nll}
        if self.nll_sample_std is not None:
            found["nll_sample_std"] = self.nll_sample_std
        return {f"{prefix}_{name}": value for name, value in found.items()}


def exact_losses(predictions: tuple[np.ndarray, ...], labels: np.ndarray) -> ExactLosses:
    """Of all predictions of an evaluation (fields of `ClassPrediction` or `TokenScores`) and their labels."""
    count = (labels != IGNORED_LABEL).sum()
    if labels.ndim == 1:
        rows = range(len(labels))
        nll, mean_nll = (-scores[rows, labels].sum() / count for scores in (predictions[0], predictions[2]))
        sample_nll = -predictions[1][rows, :, labels].mean(axis=1).sum() / count
        return ExactLosses(float(nll), float(mean_nll), float(sample_nll))
    kept = labels != IGNORED_LABEL
    nll, mean_nll = (-scores[kept].sum() / count for scores in predictions[:2])
    each = -predictions[2].sum(axis=0) / count
    by_samples = -predictions[3].sum(axis=0) / count
    return ExactLosses(float(nll), float(mean_nll), float(each.mean()), by_samples, float(each.std()))


Aligned = Callable[[dict[str, Any]], Tensor]  # takes the labels out of a batch, lined up with the logits


@torch.no_grad()
def mean_nll(model: nn.Module, batches: Iterable[Mapping[str, Any]], aligned: Aligned, num_samples: int) -> float:
    """NLL of single networks, nats per example or token: the mean over samples, or with 0 that of the mean.

    (Not of the samples' predictive.)
    """
    total, count = 0.0, 0
    for batch in batches:
        inputs = dict(batch)
        labels = aligned(inputs)
        for s in range(max(num_samples, 1)):
            with posterior_samples(model, Sampling(1, first=s)) if num_samples else posterior_mean(model):
                logits = model(**inputs).logits
            total -= token_log_probs(logits, labels).sum().item()
            count += int((labels != IGNORED_LABEL).sum())
    return total / count


@torch.no_grad()
def sample_gap(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], aligned: Aligned, sampling: Sampling
) -> float | None:
    """How far the samples' predictions are apart: mean NLL of single samples over that of their predictive, less 1.

    None where there is nothing to compare.
    """
    own, predictive = 0.0, 0.0
    for batch in batches:
        inputs = dict(batch)
        labels = aligned(inputs)
        log_probs, samples = _scores(model, inputs, labels, sampling)
        predictive -= log_probs.sum().item()
        own -= samples.mean(dim=1).sum().item()
    return own / predictive - 1 if predictive > 0 else None


@torch.no_grad()
def predictive_nll(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], aligned: Aligned, sampling: Sampling
) -> tuple[float, int]:
    """NLL of the predictive summed over all examples or tokens, nats, and their number."""
    total, count = 0.0, 0
    for batch in batches:
        inputs = dict(batch)
        labels = aligned(inputs)
        total -= _scores(model, inputs, labels, sampling)[0].sum().item()
        count += int((labels != IGNORED_LABEL).sum())
    return total, count


@torch.no_grad()
def information_gain(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], aligned: Aligned, sampling: Sampling
) -> float | None:
    """What the predictive knows of the task: how much smaller its NLL is than that of something that learned nothing.

    For classes that is the rates of these rows' labels, whatever the input; for tokens the base model without the
    adapter. None where there is nothing to predict.

    Returns:
        Nats per example or token.
    """
    predictive, reference, seen = 0.0, 0.0, []
    for batch in batches:
        inputs = dict(batch)
        labels = aligned(inputs)
        seen.append(labels[labels != IGNORED_LABEL].flatten())
        predictive -= _scores(model, inputs, labels, sampling)[0].sum().item()
        if labels.dim() > 1:
            with _bare(model).disable_adapter():
                reference -= token_log_probs(model(**inputs).logits, labels).sum().item()
    all_labels = torch.cat(seen) if seen else torch.empty(0)
    if not len(all_labels):
        return None
    if reference == 0.0:
        counts = all_labels.bincount().double()
        reference = -torch.special.xlogy(counts, counts / len(all_labels)).sum().item()
    return (reference - predictive) / len(all_labels)


def spread(rows: Any, count: int) -> Any:
    """At most `count` rows of a data set, spread over it: a file may be sorted by class."""
    taken = min(count, len(rows))
    chosen = [place * len(rows) // taken for place in range(taken)]
    return rows.select(chosen) if isinstance(rows, Dataset) else Subset(rows, chosen)


def _scores(model: nn.Module, inputs: dict[str, Any], labels: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels under the predictive (any shape), and under each sample `(batch, samples)`."""
    if labels.dim() > 1:
        scores = score_targets(model, inputs, labels, sampling)
        return scores.log_probs, scores.sample_log_probs
    rows = torch.arange(len(labels), device=labels.device)
    found = predict_classes(model, inputs, sampling)
    return found.log_probs[rows, labels], found.sample_log_probs[rows, :, labels]


def _bare(model: nn.Module) -> Any:
    while hasattr(model, "module"):  # DDP, DeepSpeed
        model = model.module  # type: ignore[assignment]
    return model
