"""How sure the posterior predictive is of each token that it chose, and of a whole text."""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from blob_hf.inference.predict import IGNORED_LABEL, log_mean_exp, sample_outputs
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import posterior_mean
from blob_hf.tuner.sampling import Sampling

# Of a whole text: its negative length-normalised log predictive, and the means of its tokens' uncertainties.
SEQUENCE_SCORES = ("token_nll", "token_entropy", "token_aleatoric", "mutual_information")


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


@dataclass(frozen=True)
class TopTokens:
    """The likeliest next tokens of the predictive at each place of given texts, the likeliest first.

    Attributes:
        tokens: Their ids, `(batch, length, count)`.
        log_probs: log mean_s p(token | y_<t, x, A_s), nats, of the same shape.
    """

    tokens: Tensor
    log_probs: Tensor


class PredictiveProcessor(LogitsProcessor):
    """Gives every block the predictive log mean_s p(y_t | y_<t, x, A_s), so that all blocks choose the same token.

    It also keeps what `uncertainty` needs of each step: entropies, and the log-probabilities of the tokens that may be
    chosen.

    Args:
        num_samples: Blocks S of the batch.
        normalized: Whether the scores that arrive are log-probabilities (beam search) or logits (greedy).
        candidates: How many of a row's likeliest tokens decoding may choose from.
    """

    def __init__(self, num_samples: int, normalized: bool, candidates: int = 1) -> None:
        self.num_samples, self.normalized, self.candidates = num_samples, normalized, candidates
        self._steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = scores if self.normalized else scores.log_softmax(-1)
        blocks = log_probs.view(self.num_samples, -1, scores.shape[-1])
        probs = blocks.exp()
        mean = probs.mean(0)
        # where a probability underflows, its logarithm is still known
        predictive = torch.where(mean > 0, mean.log(), log_mean_exp(blocks, dim=0) if (mean == 0).any() else mean)
        aleatoric = -torch.where(probs > 0, probs * blocks, 0.0).sum(-1).mean(0)
        top, token = likeliest(predictive, self.candidates)
        self._steps.append((torch.special.entr(mean).sum(-1), aleatoric, top, token))
        return predictive.repeat(self.num_samples, 1)

    def top_tokens(self, tokens: Tensor, rows: Tensor, count: int) -> TopTokens:
        """The likeliest at each place, as many of `candidates` as asked; arguments as of `uncertainty`."""
        rows = rows.masked_fill(tokens == IGNORED_LABEL, 0)
        steps = self._steps[: tokens.shape[1]]
        likely = [(step[3][rows[:, t], :count], step[2][rows[:, t], :count]) for t, step in enumerate(steps)]
        ids, log_probs = zip(*likely, strict=True)
        return TopTokens(torch.stack(ids, dim=1), torch.stack(log_probs, dim=1))

    def uncertainty(self, tokens: Tensor, rows: Tensor) -> TokenUncertainty:
        """Of the tokens that were chosen.

        Args:
            tokens: `(batch, length)`, -100 behind the end.
            rows: `(batch, length)`: the row of the first block that each token was chosen from.
        """
        kept = tokens != IGNORED_LABEL
        steps = range(tokens.shape[1])
        rows = rows.masked_fill(~kept, 0)
        at = [self._steps[t] for t in steps]
        total = torch.stack([at[t][0][rows[:, t]] for t in steps], dim=1)
        aleatoric = torch.stack([at[t][1][rows[:, t]] for t in steps], dim=1)
        own = chosen_log_probs([step[2:] for step in at], tokens, rows)
        epistemic = (total - aleatoric).clamp(min=0.0)  # below 0 by rounding alone (Jensen)
        return TokenUncertainty(*(value.masked_fill(~kept, 0.0) for value in (own, total, aleatoric, epistemic)))


def likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their tokens, `(rows, count)`; of equal ones the one that argmax takes."""
    return scores.max(dim=-1, keepdim=True) if count == 1 else scores.topk(min(count, scores.shape[-1]), dim=-1)


def chosen_log_probs(steps: Sequence[tuple[Tensor, Tensor]], tokens: Tensor, rows: Tensor) -> Tensor:
    """Log-probabilities of the tokens that were chosen, `(batch, length)`, 0 where the token is -100.

    Args:
        steps: For each step the log-probabilities of the tokens that could be chosen, and the tokens.
        tokens, rows: As of `PredictiveProcessor.uncertainty`.
    """
    rows = rows.masked_fill(tokens == IGNORED_LABEL, 0)
    own = []
    for t in range(tokens.shape[1]):
        log_probs, candidates = (value[rows[:, t]] for value in steps[t])
        own.append(torch.where(candidates == tokens[:, t : t + 1], log_probs, 0.0).sum(-1))
    return torch.stack(own, dim=1)


@dataclass(frozen=True)
class PredictiveText:
    """A text per input decoded from the posterior predictive.

    Attributes:
        sequences: `(batch, length)` token ids as `generate` returns them.
        tokens: `(batch, new tokens)`: the generated ones, -100 behind the end.
        uncertainty: Of each generated token, nats.
        top: The likeliest tokens at each place, where they were asked for.
    """

    sequences: Tensor
    tokens: Tensor
    uncertainty: TokenUncertainty
    top: TopTokens | None = None

    @property
    def scores(self) -> Tensor:
        """`SEQUENCE_SCORES` of each text, means over its tokens in nats, `(batch, 4)`: higher is less certain."""
        count = (self.tokens != IGNORED_LABEL).sum(-1).clamp(min=1)
        parts = self.uncertainty
        values = (-parts.log_probs, parts.total, parts.aleatoric, parts.epistemic)
        return torch.stack([value.sum(-1) / count for value in values], dim=-1)


@torch.no_grad()
def read_back(
    model: BlobModel,
    inputs: dict[str, Any],
    sequences: Tensor,
    tokens: Tensor,
    sampling: Sampling,
    top_tokens: int = 0,
) -> PredictiveText:
    """How sure the predictive is of each token of texts that something else chose, read back by all networks.

    (Of the networks themselves: what `generate` ruled out, or forced, plays no part.)

    Args:
        inputs: What the texts answer.
        sequences: `(batch, length)` token ids as `generate` returns them.
        tokens: The new ones among them, `(batch, new tokens)`, -100 behind the end.
        sampling: 0 samples: how sure the posterior mean is, which has no epistemic part.
        top_tokens: How many of the likeliest tokens to keep at each place.
    """
    forward, new = _forward_inputs(model, inputs, sequences), tokens.shape[1]
    kept = tokens != IGNORED_LABEL
    total, aleatoric, count = None, torch.zeros(tokens.shape, device=tokens.device), 0
    for logits in _next_logits(model, forward, sampling):
        for block in logits.split(len(tokens)):
            log_probs = block[:, -new:].float().log_softmax(-1)
            total = log_probs if total is None else torch.logaddexp(total, log_probs)
            aleatoric = aleatoric + torch.special.entr(log_probs.exp()).sum(-1)
            count += 1
    assert total is not None  # at least the mean has read them
    predictive, aleatoric = total - math.log(count), aleatoric / count
    own = predictive.gather(-1, tokens.masked_fill(~kept, 0).unsqueeze(-1)).squeeze(-1)
    entropy = torch.special.entr(predictive.exp()).sum(-1)
    parts = (own, entropy, aleatoric, (entropy - aleatoric).clamp(min=0.0))
    unsure = TokenUncertainty(*(value.masked_fill(~kept, 0.0) for value in parts))
    likely = predictive.topk(min(top_tokens, predictive.shape[-1]), dim=-1) if top_tokens else None
    top = None if likely is None else TopTokens(likely.indices, likely.values)
    return PredictiveText(sequences, tokens, unsure, top)


def _forward_inputs(model: Any, inputs: dict[str, Any], sequences: Tensor) -> dict[str, Any]:
    """Inputs of a forward whose last logits are those that the new tokens were chosen from."""
    if model.config.is_encoder_decoder:
        return {**inputs, "decoder_input_ids": sequences[:, :-1]}
    given = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    mask = torch.nn.functional.pad(given, (0, sequences.shape[1] - 1 - given.shape[1]), value=1)
    forward = {"input_ids": sequences[:, :-1], "attention_mask": mask}
    if "position_ids" in inspect.signature(model.get_base_model().forward).parameters:
        forward["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return forward


def _next_logits(model: BlobModel, forward: dict[str, Any], sampling: Sampling) -> Iterator[Tensor]:
    if not sampling.num_samples:
        with posterior_mean(model):
            yield model(**forward).logits
        return
    for output in sample_outputs(model, forward, sampling):
        yield output.logits
