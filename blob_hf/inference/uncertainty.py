"""How sure the posterior predictive is of each token that it chose, and of a whole text."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from blob_hf.inference.predict import IGNORED_LABEL, log_mean_exp

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
        top, token = predictive.topk(min(self.candidates, scores.shape[-1]), dim=-1)
        self._steps.append((torch.special.entr(mean).sum(-1), aleatoric, top, token))
        return predictive.repeat(self.num_samples, 1)

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
        chosen = [at[t][3][rows[:, t]] == tokens[:, t : t + 1] for t in steps]
        own = torch.stack([torch.where(chosen[t], at[t][2][rows[:, t]], 0.0).sum(-1) for t in steps], dim=1)
        epistemic = (total - aleatoric).clamp(min=0.0)  # below 0 by rounding alone (Jensen)
        return TokenUncertainty(*(value.masked_fill(~kept, 0.0) for value in (own, total, aleatoric, epistemic)))


@dataclass(frozen=True)
class PredictiveText:
    """A text per input decoded from the posterior predictive.

    Attributes:
        sequences: `(batch, length)` token ids as `generate` returns them.
        tokens: `(batch, new tokens)`: the generated ones, -100 behind the end.
        uncertainty: Of each generated token, nats.
    """

    sequences: Tensor
    tokens: Tensor
    uncertainty: TokenUncertainty

    @property
    def scores(self) -> Tensor:
        """`SEQUENCE_SCORES` of each text, means over its tokens in nats, `(batch, 4)`: higher is less certain."""
        count = (self.tokens != IGNORED_LABEL).sum(-1).clamp(min=1)
        parts = self.uncertainty
        values = (-parts.log_probs, parts.total, parts.aleatoric, parts.epistemic)
        return torch.stack([value.sum(-1) / count for value in values], dim=-1)
