"""Texts of models that write, for `BlobModel.predict`: the answers, those of the samples, and how sure they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blob_hf.inference.answers import TextPrediction
from blob_hf.inference.generate import generate_mean, generate_predictive, generated_tokens, pad_to, prompt_length
from blob_hf.inference.inputs import Rows, in_batches, is_decoder
from blob_hf.inference.predict import IGNORED_LABEL
from blob_hf.inference.sampled import sampled_texts
from blob_hf.inference.stopping import StopStrings, end_tokens, stop_strings_of, with_stop_strings
from blob_hf.inference.uncertainty import SEQUENCE_SCORES, PredictiveText, TokenUncertainty, TopTokens, read_back
from blob_hf.metrics.entailment import EntailmentEquivalence
from blob_hf.metrics.semantics import Equivalence, LexicalEquivalence, semantic_scores
from blob_hf.metrics.similarity import (
    Utility,
    cluster_entropy,
    dissimilarity,
    minimum_bayes_risk,
    pairwise,
    rouge_utility,
)
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

DECODINGS = ("predictive", "mbr")
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class _Answer:
    """Of one row: the tokens of its text and how unsure of each; the texts of the samples and their log-likelihoods.

    Attributes:
        log_probs, lengths: Of the samples, `(samples,)`: nats, and tokens.
        top: `(length, count)` each, or None.
    """

    tokens: Tensor
    unsure: TokenUncertainty
    samples: list[str]
    log_probs: Tensor
    lengths: Tensor
    top: TopTokens | None


@dataclass(frozen=True)
class _How:
    """How texts are written, beyond the settings of `generate`: as of `write_texts`."""

    sampling: Sampling
    decoding: str
    utility: Utility | None
    temperature: float
    top_tokens: int


def write_texts(
    model: BlobModel,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    batch_size: int,
    decoding: str = "predictive",
    utility: Utility | None = None,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    stop_strings: str | Sequence[str] | None = None,
    equivalence: Equivalence | str | None = None,
    temperature: float = 0.0,
    top_tokens: int = 0,
    **generation: Any,
) -> TextPrediction:
    """A text for each row.

    Args:
        decoding: "predictive": decoded from the averaged probabilities of the samples; "mbr": of the samples' texts
            that with the least Bayes risk, which is like the others. Without samples the posterior mean's.
        utility: How like two texts are for "mbr", default ROUGE-L.
        max_new_tokens: Longest answer, tokens.
        stop_strings: A text ends before the first of these.
        equivalence: What says that two sampled answers mean the same: default `LexicalEquivalence` for causal models,
            and for others nothing; the name or folder of an NLI model (`EntailmentEquivalence`); or a function.
        temperature: Above 0 the samples draw their tokens at it, repeatably by the seed of `sampling` (while no other
            thread draws from torch's random state); the predictive's text stays the decoded one.
        top_tokens: How many of the likeliest tokens to keep at each place of the texts.
        generation: For `generate`: `num_beams`, `length_penalty`, `no_repeat_ngram_size` ... (deterministic decoding).

    Raises:
        BlobError: Another decoding, or token sampling was asked for; an equivalence, and fewer than two samples.
    """
    if decoding not in DECODINGS:
        raise BlobError(f"decoding must be one of {', '.join(DECODINGS)}, got {decoding!r}")
    if generation.get("do_sample"):
        raise BlobError("predict decodes greedily or with beams; for samples that draw their tokens give temperature=")
    if not 0 <= temperature < float("inf") or top_tokens < 0:
        raise BlobError(f"temperature and top_tokens must be >= 0, got {temperature:g} and {top_tokens}")
    if equivalence is not None and sampling.num_samples < 2:
        raise BlobError(f"an equivalence compares two or more sampled answers; there are {sampling.num_samples}")
    settings = _settings(model, rows, tokenizer, {"max_new_tokens": max_new_tokens, **generation, "do_sample": False})
    settings |= {} if stop_strings is None else {"stop_strings": stop_strings, "tokenizer": tokenizer}
    stops = stop_strings_of(with_stop_strings(settings, 0))
    how = _How(sampling, decoding, utility, temperature, top_tokens)

    def decoded(tokens: Tensor) -> list[str]:
        return _decoded(tokens, tokenizer, stops)

    def write(inputs: dict[str, Tensor]) -> list[_Answer]:
        return _write(model, inputs, how, settings, decoded)

    if equivalence is None and is_decoder(model):
        equivalence = LexicalEquivalence()
    if isinstance(equivalence, str):  # before the work is done
        equivalence = EntailmentEquivalence(equivalence, device=model.device)
    answers = in_batches(model, rows, batch_size, write)
    return _together(answers, decoded, rows.questions, equivalence)


def _settings(
    model: BlobModel, rows: Rows, tokenizer: PreTrainedTokenizerBase, generation: dict[str, Any]
) -> dict[str, Any]:
    """What `generate` is given: with end tokens, and a token to fill up with."""
    config: Any = generation.get("generation_config") or model.generation_config
    if is_decoder(model) and not {"eos_token_id", "generation_config"} & set(generation):
        ends = end_tokens(model, tokenizer, rows.has_conversations)
        generation = generation | ({"eos_token_id": ends} if ends else {})
    if config.pad_token_id is None and generation.get("pad_token_id") is None:
        end = generation.get("eos_token_id", config.eos_token_id)
        end = int(end[0] if isinstance(end, (list, tuple)) else end or 0)
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        generation = generation | {"pad_token_id": pad}
    return generation


def _decoded(tokens: Tensor, tokenizer: PreTrainedTokenizerBase, stops: StopStrings | None) -> list[str]:
    # a stop string is looked for in what the model wrote, without the tokenizer's tidying of blanks
    tidy = {} if stops is None else {"clean_up_tokenization_spaces": False}
    texts = [str(tokenizer.decode(row[row != IGNORED_LABEL], skip_special_tokens=True, **tidy)) for row in tokens]
    return [(text if stops is None else stops.cut(text)).strip() for text in texts]


def _write(
    model: BlobModel,
    inputs: dict[str, Tensor],
    how: _How,
    settings: dict[str, Any],
    decoded: Callable[[Tensor], list[str]],
) -> list[_Answer]:
    """The answers of a batch."""
    sampling = how.sampling
    generation = with_stop_strings(settings, prompt_length(model, inputs))
    count = len(next(iter(inputs.values())))
    samples: list[list[str]] = [[] for _ in range(count)]
    log_probs = lengths = torch.zeros(count, 0)
    if sampling.num_samples:
        drawn = sampled_texts(model, inputs, sampling, temperature=how.temperature, **generation)
        texts = decoded(drawn.tokens.flatten(0, 1))
        samples = [texts[first : first + sampling.num_samples] for first in range(0, len(texts), sampling.num_samples)]
        log_probs, lengths = drawn.log_probs.cpu(), (drawn.tokens != IGNORED_LABEL).sum(-1).cpu()
    if sampling.num_samples and how.decoding == "predictive":
        found = generate_predictive(model, inputs, sampling, top_tokens=how.top_tokens, **generation)
    else:
        if sampling.num_samples:
            alike = [pairwise(texts, how.utility or rouge_utility()) for texts in samples]
            chosen = [minimum_bayes_risk(one).index for one in alike]
            sequences, tokens = (value[range(count), chosen] for value in (drawn.sequences, drawn.tokens))
        else:
            sequences = generate_mean(model, inputs, **generation)
            tokens = generated_tokens(model, inputs, sequences, generation)
        found = read_back(model, inputs, sequences, tokens, sampling, how.top_tokens)
    parts = zip(*(value.cpu() for value in vars(found.uncertainty).values()), strict=True)
    tops: list[TopTokens | None] = [None] * count
    if found.top is not None:
        tops = [TopTokens(*one) for one in zip(found.top.tokens.cpu(), found.top.log_probs.cpu(), strict=True)]
    columns = (found.tokens.cpu(), (TokenUncertainty(*part) for part in parts), samples, log_probs, lengths, tops)
    return [_Answer(*values) for values in zip(*columns, strict=True)]


def _together(
    answers: list[_Answer],
    decoded: Callable[[Tensor], list[str]],
    questions: Sequence[str],
    equivalence: Equivalence | None,
) -> TextPrediction:
    """The answers of all rows as one object, padded to the longest."""
    length = max(len(one.tokens) for one in answers)
    tokens = torch.stack([pad_to(one.tokens, length, IGNORED_LABEL) for one in answers])
    fields = zip(*(vars(one.unsure).values() for one in answers), strict=True)
    unsure = TokenUncertainty(*(torch.stack([pad_to(value, length, 0) for value in values]) for values in fields))
    top = _top_tokens([one.top for one in answers], length)
    texts, samples = decoded(tokens), [one.samples for one in answers]
    scores = PredictiveText(tokens, tokens, unsure).scores.double().numpy()
    named = {name: scores[:, i] for i, name in enumerate(SEQUENCE_SCORES)}
    sets: list[list[int]] = [[] for _ in answers]
    if len(samples[0]) > 1:  # fewer neither agree nor disagree
        alike = [pairwise(one, rouge_utility()) for one in samples]
        named["dissimilarity"] = np.array([dissimilarity(one) for one in alike])
        named["cluster_entropy"] = np.array([cluster_entropy(one) for one in alike])
        if equivalence is not None:
            found = [
                semantic_scores(text, one.samples, (one.log_probs / one.lengths).numpy(), question, equivalence)
                for text, one, question in zip(texts, answers, questions, strict=True)
            ]
            named |= {name: np.array([of_row[name] for of_row, _ in found]) for name in found[0][0]}
            sets = [own for _, own in found]
    log_probs = torch.stack([one.log_probs for one in answers]).double().numpy()
    return TextPrediction(texts, samples, tokens.numpy(), unsure, named, log_probs, sets, top_tokens=top)


def _top_tokens(parts: Sequence[TopTokens | None], length: int) -> TopTokens | None:
    """Those of all rows, padded to this length."""
    kept = [part for part in parts if part is not None]
    if not kept:
        return None
    values = ([value.transpose(0, 1) for value in vars(part).values()] for part in kept)
    ids, log_probs = zip(*values, strict=True)
    padded = (torch.stack([pad_to(one, length, 0) for one in field]).transpose(1, 2) for field in (ids, log_probs))
    return TopTokens(*padded)
