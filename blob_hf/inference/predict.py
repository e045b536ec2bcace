"""The posterior predictive, eq. (5) of the paper: probabilities, not logits, averaged over posterior samples."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blob_hf.tuner.posterior import posterior_mean, posterior_samples

IGNORED_LABEL = -100


@dataclass(frozen=True)
class ClassPrediction:
    """Predictions of a classifier, as log-probabilities in nats, so that argmax and softmax of them are right.

    Attributes:
        log_probs: log mean_s p(y | x, A_s), `(batch, classes)`.
        sample_log_probs: log p(y | x, A_s), `(batch, samples, classes)`; the mean's alone when no samples were asked.
        mean_log_probs: log p(y | x, E[A]): the posterior mean's, `(batch, classes)`.
    """

    log_probs: Tensor
    sample_log_probs: Tensor
    mean_log_probs: Tensor


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of given target tokens in nats, 0 where the label is -100.

    Attributes:
        log_probs: log mean_s p(y_t | y_<t, x, A_s), `(batch, length)`.
        mean_log_probs: The posterior mean's, `(batch, length)`.
        sample_log_probs: Sum over t of log p(y_t | y_<t, x, A_s), `(batch, samples)`.
        prefix_log_probs: Sum over t of the log predictive of the first 1, 2, ... samples, `(batch, samples)`.
    """

    log_probs: Tensor
    mean_log_probs: Tensor
    sample_log_probs: Tensor
    prefix_log_probs: Tensor


def repeat_rows(inputs: dict[str, Any], times: int) -> dict[str, Any]:
    """Sample-major copies of a batch: `times` blocks of its rows."""
    if times == 1:
        return inputs
    return {
        name: value.repeat(times, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value
        for name, value in inputs.items()
    }


@torch.no_grad()
def predict_classes(
    model: nn.Module,
    inputs: dict[str, Any],
    num_samples: int,
    seed: int = 0,
    samples_per_forward: int = 1,
    antithetic: bool = False,
) -> ClassPrediction:
    """Predict classes with the posterior mean and with `num_samples` posterior samples (0: the mean alone)."""
    mean = _mean_output(model, inputs)
    samples = [
        block
        for output in _sample_outputs(model, inputs, num_samples, seed, samples_per_forward, antithetic)
        for block in _log_softmax(output).split(len(mean.logits))
    ]
    mean_log_probs = _log_softmax(mean)
    if not samples:
        return ClassPrediction(mean_log_probs, mean_log_probs.unsqueeze(1), mean_log_probs)
    stacked = torch.stack(samples, dim=1)
    return ClassPrediction(log_mean_exp(stacked, dim=1), stacked, mean_log_probs)


@torch.no_grad()
def score_targets(
    model: nn.Module,
    inputs: dict[str, Any],
    labels: Tensor,
    num_samples: int,
    seed: int = 0,
    samples_per_forward: int = 1,
    antithetic: bool = False,
) -> TokenScores:
    """Score target tokens under the posterior mean and under the predictive of `num_samples` samples.

    Args:
        inputs: Model inputs whose logits line up with `labels`, `(batch, length)`.
        labels: Target ids, -100 where there is none.
    """
    mean = token_log_probs(_mean_output(model, inputs).logits, labels)
    total, predictive = None, mean
    sums: list[Tensor] = []
    prefixes: list[Tensor] = []
    for output in _sample_outputs(model, inputs, num_samples, seed, samples_per_forward, antithetic):
        for logits in output.logits.split(len(labels)):
            scores = token_log_probs(logits, labels)
            total = scores if total is None else torch.logaddexp(total, scores)
            predictive = (total - math.log(len(sums) + 1)).masked_fill(labels == IGNORED_LABEL, 0.0)
            sums.append(scores.sum(dim=1))
            prefixes.append(predictive.sum(dim=1))
    if total is None:
        only = mean.sum(dim=1, keepdim=True)
        return TokenScores(mean, mean, only, only)
    return TokenScores(predictive, mean, torch.stack(sums, dim=1), torch.stack(prefixes, dim=1))


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) at each position `(batch, length)`, nats, 0 where the label is -100."""
    nll = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return -nll.view(labels.shape)


def log_mean_exp(log_values: Tensor, dim: int) -> Tensor:
    """Log of the mean of exponentials over one dimension."""
    return log_values.logsumexp(dim) - math.log(log_values.shape[dim])


def _log_softmax(output: Any) -> Tensor:
    return F.log_softmax(output.logits.float(), dim=-1)


def _mean_output(model: nn.Module, inputs: dict[str, Any]) -> Any:
    with posterior_mean(model):
        return model(**inputs)


def _sample_outputs(
    model: nn.Module, inputs: dict[str, Any], num_samples: int, seed: int, samples_per_forward: int, antithetic: bool
) -> Iterator[Any]:
    """Outputs for all posterior samples, a few at a time, sample-major."""
    for first in range(0, num_samples, samples_per_forward):
        count = min(samples_per_forward, num_samples - first)
        with posterior_samples(model, count, seed, first, antithetic):
            yield model(**repeat_rows(inputs, count))
