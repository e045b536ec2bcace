"""A text of each posterior sample, and how likely the network that wrote it holds it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from blob_hf.inference.generate import (
    batch_size_of,
    candidates_of,
    chosen_rows,
    generated_tokens,
    pad_to,
    pad_token_of,
    refuse_one_network,
)
from blob_hf.inference.predict import IGNORED_LABEL, repeat_rows
from blob_hf.inference.uncertainty import chosen_log_probs, likeliest
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import posterior_samples
from blob_hf.tuner.sampling import Sampling


@dataclass(frozen=True)
class SampledTexts:
    """Texts of S sampled networks.

    Attributes:
        sequences: As of `generate_samples`, `(batch, samples, length)`.
        tokens: The new ones, -100 behind the end, `(batch, samples, new tokens)`.
        log_probs: Sum over the tokens of log p(y_t | y_<t, x, A_s) of the network that wrote them, nats,
            `(batch, samples)`; where other processors rule tokens out, that of what remains.
    """

    sequences: Tensor
    tokens: Tensor
    log_probs: Tensor


class ChosenLogProbs(LogitsProcessor):
    """Keeps the log-probabilities of the tokens that may be chosen, and changes nothing."""

    def __init__(self, normalized: bool, candidates: int) -> None:
        self.normalized, self.candidates = normalized, candidates
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        top, tokens = likeliest(scores, self.candidates)
        self.steps.append((top if self.normalized else top - scores.logsumexp(-1, keepdim=True), tokens))
        return scores


class DrawnLogProbs(LogitsProcessor):
    """Keeps the log-probabilities of tokens that are drawn, before the temperature, and changes nothing."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._keep(input_ids)
        self._last = scores.log_softmax(-1)
        return scores

    def _keep(self, sequences: Tensor) -> None:
        """Of the token that has been drawn since the last step."""
        if self._last is not None:
            self._steps.append(self._last.gather(-1, sequences[:, -1:]))

    def total(self, sequences: Tensor, tokens: Tensor) -> Tensor:
        """Sum over the tokens `(rows, new tokens)` of each text, nats, `(rows,)`."""
        self._keep(sequences)
        return torch.cat(self._steps, dim=1).masked_fill(tokens == IGNORED_LABEL, 0.0).sum(-1)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from torch's global random state as it is after this seed, and put it back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        yield


@torch.no_grad()
def sampled_texts(
    model: BlobModel, inputs: dict[str, Any], sampling: Sampling, *, temperature: float = 0.0, **gen_kwargs: Any
) -> SampledTexts:
    """What `generate_samples` writes, greedily or with beams, with its log-probabilities; at no further forward.

    Args:
        temperature: Above 0 each network draws its tokens at it (without beams), by the seed of `sampling`.

    Raises:
        BlobError: As `generate_posterior`.
    """
    refuse_one_network(model, gen_kwargs)
    if temperature:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "num_beams": 1}
        gen_kwargs = gen_kwargs | drawing
        with _seeded(sampling.seed, model.device):
            return _sampled_texts(model, inputs, sampling, gen_kwargs)
    return _sampled_texts(model, inputs, sampling, gen_kwargs)


def _sampled_texts(
    model: BlobModel, inputs: dict[str, Any], sampling: Sampling, gen_kwargs: dict[str, Any]
) -> SampledTexts:
    beams, candidates = candidates_of(model, gen_kwargs)
    batch = batch_size_of(inputs)
    parts: list[list[Tensor]] = []
    for part in sampling.required().for_texts().batches():
        draws = bool(gen_kwargs.get("do_sample"))
        keeper = DrawnLogProbs() if draws else ChosenLogProbs(normalized=beams > 1, candidates=candidates)
        own = LogitsProcessorList([*(gen_kwargs.get("logits_processor") or []), keeper])
        with posterior_samples(model, part):
            output: Any = model.generate(
                **repeat_rows(inputs, part.num_samples),
                **{**gen_kwargs, "logits_processor": own, "return_dict_in_generate": True},
            )
        tokens = generated_tokens(model, inputs, output.sequences, gen_kwargs)
        if isinstance(keeper, DrawnLogProbs):
            log_probs = keeper.total(output.sequences, tokens)
        else:
            log_probs = chosen_log_probs(keeper.steps, tokens, chosen_rows(output, tokens)).sum(-1)
        found = (output.sequences, tokens, log_probs)
        parts.append([value.view(part.num_samples, batch, *value.shape[1:]) for value in found])
    sequences, written, scores = ([part[which] for part in parts] for which in range(3))
    return SampledTexts(
        _joined(sequences, pad_token_of(model, gen_kwargs)), _joined(written, IGNORED_LABEL),
        torch.cat(scores).transpose(0, 1),
    )  # fmt: skip


def _joined(parts: list[Tensor], pad: int) -> Tensor:
    """Sample-major parts `(samples, batch, length)` as one `(batch, all samples, length)`."""
    length = max(part.shape[-1] for part in parts)
    return torch.cat([pad_to(part, length, pad) for part in parts]).transpose(0, 1)
