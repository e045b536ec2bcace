"""What the page shows of a text that a model has written, from its `TextPrediction`; plain values, without HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blob_hf.app.promises import Promise
from blob_hf.baselines.conformal_texts import TextAbstention
from blob_hf.inference.answers import TextPrediction
from blob_hf.inference.predict import IGNORED_LABEL
from blob_hf.metrics.agreement import word_agreement
from blob_hf.metrics.similarity import minimum_bayes_risk, pairwise, rouge_utility

# Nats of epistemic uncertainty from which on a token is of level 1, 2, 3. (Two groups of networks that are each sure
# of another token have ln 2 = 0.69 when they are of the same size, and 0.33 when one network of ten is alone.)
LEVELS = (0.02, 0.1, 0.3)
LEVEL_NAMES = ("the networks agree", "slight disagreement", "clear disagreement", "strong disagreement")


@dataclass(frozen=True)
class TokenView:
    """A token, with `TokenUncertainty` of it in nats.

    Attributes:
        text: As it stands in the text; "" of one that ends it.
        name: What it is called where it stands alone.
        level: Of `epistemic`, 0 to 3.
        runners_up: The other likeliest tokens here, with their probabilities.
    """

    text: str
    name: str
    level: int
    probability: float
    total: float
    aleatoric: float
    epistemic: float
    runners_up: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class SampleView:
    """What one network writes.

    Attributes:
        agreement: Mean ROUGE-L with the other samples, the expected utility that minimum Bayes risk looks at.
        meaning: Number of its set of one meaning from 1 on; None where that was not asked.
        is_mbr: Whether minimum Bayes risk chooses it.
    """

    text: str
    agreement: float
    log_prob: float
    meaning: int | None
    is_mbr: bool


@dataclass(frozen=True)
class FittedAbstention:
    """Whether the rule that was fitted to the adapter withholds a text.

    Attributes:
        promise: What is promised of that for this answer.
        made: Whether it says anything: one of the posterior mean alone says nothing of samples.
        abstains: Whether it does.
        score, value: The uncertainty that it looks at, and what that is of this text.
        below: Texts are given below this value; None: all of them.
    """

    promise: Promise
    made: bool
    abstains: bool = False
    score: str = ""
    value: float = 0.0
    below: float | None = None


@dataclass(frozen=True)
class TextView:
    """A text, its tokens, the samples, and how they agree.

    Attributes:
        words: The text's words, and the share of the samples that have each at its place.
        scores: `TextPrediction.uncertainty` of it.
        mbr: What minimum Bayes risk chooses of the samples; "" without samples.
        fitted: Whether a fitted rule withholds the text; None where none was fitted.
    """

    text: str
    tokens: tuple[TokenView, ...]
    words: tuple[tuple[str, float], ...]
    samples: tuple[SampleView, ...]
    scores: dict[str, float]
    mbr: str
    fitted: FittedAbstention | None = None


def level_of(epistemic: float) -> int:
    """Which of the four levels an epistemic uncertainty in nats is of."""
    return sum(epistemic >= least for least in LEVELS)


def fitted_abstention(
    found: TextPrediction, rule: TextAbstention | None, promise: Promise | None, sampled: bool
) -> FittedAbstention | None:
    """What was decided on one input by the rule that was fitted to the adapter; None where none was.

    Args:
        found: Of `BlobModel.predict`, which has asked the rule.
        sampled: Whether it is of samples, or of the posterior mean.
    """
    if rule is None or promise is None:
        return None
    threshold = rule.predictive if sampled else rule.mean
    if found.abstain is None or threshold is None:
        return FittedAbstention(promise, made=False)
    value = float(found.uncertainty[rule.score][0])
    return FittedAbstention(promise, True, bool(found.abstain[0]), rule.score, value, threshold.below)


def text_view(
    found: TextPrediction, tokenizer: PreTrainedTokenizerBase, fitted: FittedAbstention | None = None
) -> TextView:
    """The view of one input.

    Args:
        found: Of one input.
        tokenizer: That its tokens are of.
        fitted: `fitted_abstention` of it.
    """
    samples = found.samples[0]
    choice = minimum_bayes_risk(pairwise(samples, rouge_utility())) if samples else None
    sets = found.sample_sets[0] if found.sample_sets else []
    views = tuple(
        SampleView(
            text, float(choice.expected_utility[index]), float(found.sample_log_probs[0][index]),
            sets[index] + 1 if sets else None, index == choice.index,
        )
        for index, text in enumerate(samples)
        if choice is not None
    )  # fmt: skip
    words: list[tuple[str, float]] = []
    if samples:
        split, shares = word_agreement(found.texts[0], samples)
        words = list(zip(split, map(float, shares), strict=True))
    scores = {name: float(values[0]) for name, values in found.uncertainty.items()}
    mbr = samples[choice.index] if choice is not None else ""
    return TextView(found.texts[0], _tokens(found, tokenizer), tuple(words), views, scores, mbr, fitted)


def _tokens(found: TextPrediction, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenView, ...]:
    ids = [int(one) for one in found.tokens[0] if one != IGNORED_LABEL]
    unsure, top = found.token_uncertainty, found.top_tokens
    views = []
    for at, (token, text) in enumerate(zip(ids, pieces(ids, tokenizer), strict=True)):
        epistemic = float(unsure.epistemic[0, at])
        others = [] if top is None else _others(top.tokens[0, at], top.log_probs[0, at], token, tokenizer)
        views.append(
            TokenView(
                text, token_name(token, tokenizer), level_of(epistemic), math.exp(float(unsure.log_probs[0, at])),
                float(unsure.total[0, at]), float(unsure.aleatoric[0, at]), epistemic, tuple(others),
            )
        )  # fmt: skip
    return tuple(views)


def _others(ids: Tensor, log_probs: Tensor, own: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, float]]:
    pairs = zip(ids.tolist(), log_probs.exp().tolist(), strict=True)
    return [(token_name(token, tokenizer), value) for token, value in pairs if token != own]


def pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text, so that all together are the text; "" of special tokens.

    (A character of several tokens stands at the last of them.)
    """
    found, before = [], ""
    for count in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:count]), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or count == len(ids)
        found.append(text[len(before) :] if whole else "")
        before = text if whole else before
    return found


def token_name(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token as it is written where it stands alone: without blanks around it, a special one by its name."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return text.strip() or {"\n": "line break", "": "nothing"}.get(text.replace(" ", ""), "blank")
