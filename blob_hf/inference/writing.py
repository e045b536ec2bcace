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
from blob_hf.inference.uncertainty import SEQUENCE_SCORES, PredictiveText, TokenUncertainty, token_uncertainty
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
    """

    tokens: Tensor
    unsure: TokenUncertainty
    samples: list[str]
    log_probs: Tensor
    lengths: Tensor


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
        generation: For `generate`: `num_beams`, `length_penalty`, `no_repeat_ngram_size` ... (deterministic decoding).

    Raises:
        BlobError: Another decoding, or token sampling was asked for; an equivalence, and fewer than two samples.
    """
    if decoding not in DECODINGS:
        raise BlobError(f"decoding must be one of {', '.join(DECODINGS)}, got {decoding!r}")
    if generation.get("do_sample"):
        raise BlobError("predict decodes greedily or with beams; to sample tokens use model.generate(sampling=...)")
    if equivalence is not None and sampling.num_samples < 2:
        raise BlobError(f"an equivalence compares two or more sampled answers; there are {sampling.num_samples}")
    settings = _settings(model, rows, tokenizer, {"max_new_tokens": max_new_tokens, **generation, "do_sample": False})
    settings |= {} if stop_strings is None else {"stop_strings": stop_strings, "tokenizer": tokenizer}
    stops = stop_strings_of(with_stop_strings(settings, 0))

    def decoded(tokens: Tensor) -> list[str]:
        return _decoded(tokens, tokenizer, stops)

    def write(inputs: dict[str, Tensor]) -> list[_Answer]:
        return _write(model, inputs, sampling, decoding, utility, settings, decoded)

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
    sampling: Sampling,
    decoding: str,
    utility: Utility | None,
    settings: dict[str, Any],
    decoded: Callable[[Tensor], list[str]],
) -> list[_Answer]:
    """The answers of a batch."""
    generation = with_stop_strings(settings, prompt_length(model, inputs))
    count = len(next(iter(inputs.values())))
    samples: list[list[str]] = [[] for _ in range(count)]
    log_probs = lengths = torch.zeros(count, 0)
    if sampling.num_samples:
        drawn = sampled_texts(model, inputs, sampling, **generation)
        texts = decoded(drawn.tokens.flatten(0, 1))
        samples = [texts[first : first + sampling.num_samples] for first in range(0, len(texts), sampling.num_samples)]
        log_probs, lengths = drawn.log_probs.cpu(), (drawn.tokens != IGNORED_LABEL).sum(-1).cpu()
    if sampling.num_samples and decoding == "predictive":
        found = generate_predictive(model, inputs, sampling, **generation)
        tokens, unsure = found.tokens, found.uncertainty
    else:
        if sampling.num_samples:
            alike = [pairwise(texts, utility or rouge_utility()) for texts in samples]
            chosen = [minimum_bayes_risk(one).index for one in alike]
            sequences, tokens = (value[range(count), chosen] for value in (drawn.sequences, drawn.tokens))
        else:
            sequences = generate_mean(model, inputs, **generation)
            tokens = generated_tokens(model, inputs, sequences, generation)
        unsure = token_uncertainty(model, inputs, sequences, tokens, sampling)
    parts = zip(*(value.cpu() for value in vars(unsure).values()), strict=True)
    columns = (tokens.cpu(), (TokenUncertainty(*part) for part in parts), samples, log_probs, lengths)
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
    return TextPrediction(texts, samples, tokens.numpy(), unsure, named, log_probs, sets)
