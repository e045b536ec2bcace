"""The posterior predictive, eq. (5) of the paper: probabilities, not logits, averaged over posterior samples."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blob_hf.posterior import posterior_mean, posterior_samples

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
    """

    log_probs: Tensor
    mean_log_probs: Tensor
    sample_log_probs: Tensor


@dataclass(frozen=True)
class TokenUncertainty:
    """How sure the predictive is of each token of given texts, nats, 0 where the label is -100; all `(batch, length)`.

    Attributes:
        log_probs: log mean_s p(y_t | y_<t, x, A_s) of the token itself.
        total: Entropy of the predictive over the next token, H[mean_s p].
        aleatoric: mean_s H[p(. | A_s)]: what every network is unsure of.
        epistemic: total - aleatoric >= 0: the mutual information of token and weights.
    """

    log_probs: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor

    def at(self, positions: slice) -> "TokenUncertainty":
        """The same for some positions alone."""
        return TokenUncertainty(*(getattr(self, item.name)[:, positions] for item in fields(self)))


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
    model: nn.Module, inputs: dict[str, Any], num_samples: int, seed: int = 0, samples_per_forward: int = 1
) -> ClassPrediction:
    """Predict classes with the posterior mean and with `num_samples` posterior samples (0: the mean alone)."""
    mean = _mean_output(model, inputs)
    samples = [
        block
        for output in _sample_outputs(model, inputs, num_samples, seed, samples_per_forward)
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
) -> TokenScores:
    """Score target tokens under the posterior mean and under the predictive of `num_samples` samples.

    Args:
        inputs: Model inputs whose logits line up with `labels`, `(batch, length)`.
        labels: Target ids, -100 where there is none.
    """
    mean = token_log_probs(_mean_output(model, inputs).logits, labels)
    total, sums = None, []
    for output in _sample_outputs(model, inputs, num_samples, seed, samples_per_forward):
        for logits in output.logits.split(len(labels)):
            scores = token_log_probs(logits, labels)
            sums.append(scores.sum(dim=1))
            total = scores if total is None else torch.logaddexp(total, scores)
    if total is None:
        return TokenScores(mean, mean, mean.sum(dim=1, keepdim=True))
    predictive = (total - math.log(num_samples)).masked_fill(labels == IGNORED_LABEL, 0.0)
    return TokenScores(predictive, mean, torch.stack(sums, dim=1))


@torch.no_grad()
def token_uncertainty(
    model: nn.Module,
    inputs: dict[str, Any],
    labels: Tensor,
    num_samples: int,
    seed: int = 0,
    samples_per_forward: int = 1,
) -> TokenUncertainty:
    """Entropies of the predictive of `num_samples` samples at every position of given texts.

    Args:
        inputs, labels: As for `score_targets`.
    """
    mean, entropies = None, torch.zeros(labels.shape, device=labels.device)
    for output in _sample_outputs(model, inputs, num_samples, seed, samples_per_forward):
        for logits in output.logits.split(len(labels)):
            log_probs = logits.float().log_softmax(-1)
            entropies += _entropy(log_probs)
            mean = log_probs if mean is None else torch.logaddexp(mean, log_probs)
    assert mean is not None
    mean = mean - math.log(num_samples)
    total, aleatoric = _entropy(mean), entropies / num_samples
    own = mean.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    values = (own, total, aleatoric, (total - aleatoric).clamp(min=0.0))  # below 0 by rounding alone (Jensen)
    return TokenUncertainty(*(value.masked_fill(labels == IGNORED_LABEL, 0.0) for value in values))


def _entropy(log_probs: Tensor) -> Tensor:
    """Over the last dimension, nats; impossible classes (log p = -inf) count 0."""
    return torch.special.entr(log_probs.exp()).sum(-1)


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
    model: nn.Module, inputs: dict[str, Any], num_samples: int, seed: int, samples_per_forward: int
) -> Iterator[Any]:
    """Outputs for all posterior samples, a few at a time, sample-major."""
    for first in range(0, num_samples, samples_per_forward):
        count = min(samples_per_forward, num_samples - first)
        with posterior_samples(model, count, seed, first):
            yield model(**repeat_rows(inputs, count))
