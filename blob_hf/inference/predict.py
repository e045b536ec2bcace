"""The posterior predictive, eq. (5) of the paper: probabilities, not logits, averaged over posterior samples."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from blob_hf.inference.settling import settle
from blob_hf.metrics.uncertainty import predictive_log_probs
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import posterior_mean, posterior_samples, shares_trunk
from blob_hf.tuner.registry import Companion
from blob_hf.tuner.sampling import Sampling

IGNORED_LABEL = -100


@dataclass(frozen=True)
class ClassPrediction:
    """Predictions of a classifier, as log-probabilities in nats, so that argmax and softmax of them are right.

    Attributes:
        log_probs: log mean_s p(y | x, A_s), `(batch, classes)`.
        sample_log_probs: log p(y | x, A_s), `(batch, samples, classes)`; the mean's alone when no samples were asked.
            With a tolerance those of an input that settled early are repeated, as often for each.
        mean_log_probs: log p(y | x, E[A]): the posterior mean's, `(batch, classes)`.
        networks: With a tolerance, how many samples each input took, `(batch,)`.
    """

    log_probs: Tensor
    sample_log_probs: Tensor
    mean_log_probs: Tensor
    networks: Tensor | None = None


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

    def of(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            return value.repeat(times, *[1] * (value.dim() - 1))
        return value * times if isinstance(value, list) else value  # adapter_names

    return {name: of(value) for name, value in inputs.items()}


@runtime_checkable
class OwnPredictive(Protocol):
    """A companion of an adapter whose classes are not predicted by averaging sampled networks."""

    def predict_classes(self, model: nn.Module, inputs: dict[str, Any], sampling: Sampling) -> ClassPrediction | None:
        """Its prediction; None for that of sampled networks after all."""


@runtime_checkable
class Calibration(Protocol):
    """A companion of an adapter that its class probabilities are corrected by."""

    def calibrated(self, log_probs: NDArray[np.float64], sampled: bool) -> NDArray[np.float64]:
        """Log-probabilities `(inputs, classes)`, nats, of the samples' predictive or of the posterior mean."""


def calibration_of(model: BlobModel) -> Calibration | None:
    """What the active adapter's probabilities are corrected by, if anything was fitted."""
    return next((one for one in companions_of(model) if isinstance(one, Calibration)), None)


def class_log_probs(model: BlobModel, samples: NDArray[np.float64], sampled: bool) -> NDArray[np.float64]:
    """Log-probabilities `(inputs, classes)` that the active adapter answers with, nats: averaged, then calibrated.

    Args:
        samples: Of each network, `(inputs, samples, classes)`, nats.
        sampled: Whether they are samples; else the posterior mean's alone.
    """
    log_probs = predictive_log_probs(samples)
    calibration = calibration_of(model)
    return log_probs if calibration is None else calibration.calibrated(log_probs, sampled)


def predict_classes(model: nn.Module, inputs: dict[str, Any], sampling: Sampling) -> ClassPrediction:
    """Predict classes with the posterior mean and with posterior samples (num_samples 0: the mean alone)."""
    own = own_predictive(model) if sampling.num_samples else None
    found = own.predict_classes(model, inputs, sampling) if own is not None else None
    return sampled_prediction(model, inputs, sampling) if found is None else found


@torch.no_grad()
def sampled_prediction(model: nn.Module, inputs: dict[str, Any], sampling: Sampling) -> ClassPrediction:
    """Eq. (5): the average of the probabilities of sampled networks."""
    mean = _log_softmax(_mean_output(model, inputs))
    if not sampling.num_samples:
        return ClassPrediction(mean, mean.unsqueeze(1), mean)
    if sampling.tolerance is None:
        samples, networks = sample_log_probs(model, inputs, sampling), None
    else:
        samples, networks = _settled(model, inputs, sampling, len(mean))
    return ClassPrediction(log_mean_exp(samples, dim=1), samples, mean, networks)


def _settled(model: nn.Module, inputs: dict[str, Any], sampling: Sampling, count: int) -> tuple[Tensor, Tensor]:
    """Samples of each row of a batch until it has settled, and how many it took."""

    def draw(rows: Sequence[int], part: Sampling) -> NDArray[np.float32]:
        return sample_log_probs(model, _rows(inputs, rows, count), part).cpu().numpy()

    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    found = settle(count, sampling, draw)
    return torch.from_numpy(found.log_probs).to(device), torch.from_numpy(found.networks).to(device)


def _rows(inputs: dict[str, Any], rows: Sequence[int], count: int) -> dict[str, Any]:
    def of(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == count:
            return value[list(rows)]
        return [value[row] for row in rows] if isinstance(value, list) and len(value) == count else value

    return {name: of(value) for name, value in inputs.items()}


@torch.no_grad()
def sample_log_probs(model: nn.Module, inputs: dict[str, Any], sampling: Sampling) -> Tensor:
    """log p(y | x, A_s) of each posterior sample, `(batch, samples, classes)`, nats, and nothing of the mean.

    Without samples the mean's alone, `(batch, 1, classes)`.
    """
    if not sampling.num_samples:
        return _log_softmax(_mean_output(model, inputs)).unsqueeze(1)
    parts = []
    for part in parts_of(model, sampling):
        scores = _log_softmax(_outputs(model, inputs, part))
        parts.append(scores.unflatten(0, (part.num_samples, -1)))
    return torch.cat(parts).transpose(0, 1)


def own_predictive(model: Any) -> OwnPredictive | None:
    """What predicts the classes of the active adapter in the place of sampled networks, if anything does."""
    while hasattr(model, "module"):  # DDP, DeepSpeed
        model = model.module
    return next((one for one in companions_of(model) if isinstance(one, OwnPredictive)), None)


def companions_of(model: Any) -> list[Companion]:
    """The companions of a model's active adapter, none of any other model."""
    return list(model.companions.get(str(model.active_adapter), {}).values()) if isinstance(model, BlobModel) else []


@torch.no_grad()
def score_targets(model: nn.Module, inputs: dict[str, Any], labels: Tensor, sampling: Sampling) -> TokenScores:
    """Score target tokens under the posterior mean and under the predictive of posterior samples.

    Args:
        inputs: Model inputs whose logits line up with `labels`, `(batch, length)`.
        labels: Target ids, -100 where there is none.
    """
    sampling = sampling.for_texts()
    mean = token_log_probs(_mean_output(model, inputs).logits, labels)
    total, predictive = None, mean
    sums: list[Tensor] = []
    prefixes: list[Tensor] = []
    for output in sample_outputs(model, inputs, sampling):
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


def sample_outputs(model: nn.Module, inputs: dict[str, Any], sampling: Sampling) -> Iterator[Any]:
    """Outputs of all posterior samples, sample-major: `batch_size` together, default 1, or all if they share layers."""
    for part in parts_of(model, sampling):
        yield _outputs(model, inputs, part)


def parts_of(model: nn.Module, sampling: Sampling) -> Iterator[Sampling]:
    """The samples that share a forward: `batch_size` together, default 1, or all if they share layers."""
    return sampling.batches(default=None if shares_trunk(model, sampling) else 1)


def _outputs(model: nn.Module, inputs: dict[str, Any], part: Sampling) -> Any:
    with posterior_samples(model, part):
        return model(**repeat_rows(inputs, part.num_samples))
