"""From texts to answers: `BlobModel.predict`, over everything that predicts and generates on this floor."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.special import entr, log_softmax
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blob_hf.inference.answers import Prediction, TextPrediction
from blob_hf.inference.choices import ChoiceRows, ChoiceScoring, choice_rows, is_questions
from blob_hf.inference.evaluating import evaluating
from blob_hf.inference.generate import generate_mean, generate_predictive, generate_samples, generated_tokens, pad_to
from blob_hf.inference.inputs import Inputs, Rows, find_tokenizer, rows_of
from blob_hf.inference.predict import (
    IGNORED_LABEL,
    calibration_of,
    own_predictive,
    predict_classes,
    sample_log_probs,
)
from blob_hf.inference.settling import settle
from blob_hf.inference.uncertainty import SEQUENCE_SCORES, PredictiveText, TokenUncertainty, token_uncertainty
from blob_hf.metrics.similarity import (
    Utility,
    cluster_entropy,
    dissimilarity,
    minimum_bayes_risk,
    pairwise,
    rouge_utility,
)
from blob_hf.metrics.uncertainty import expected_entropy, mutual_information, predictive_log_probs
from blob_hf.tuner.base_model import is_sequence_classifier
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import sampling_of
from blob_hf.tuner.registry import VERBS
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

DECODINGS = ("predictive", "mbr")
Part = TypeVar("Part")


def predict(
    model: BlobModel,
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sampling: Sampling | int | str = Sampling(),  # noqa: B008
    *,
    batch_size: int = 32,
    text_columns: Sequence[str] | None = None,
    max_length: int | None = None,
    **options: Any,
) -> Prediction | TextPrediction:
    """What `model.predict(...)` does: labels or texts for new inputs, with their uncertainty.

    The model works where it is, in eval mode, and is left in the mode it was in; no global random state is read or
    changed. Rows of similar length share a batch; the answers come in the order of the inputs.

    Args:
        model: A sequence classifier, an encoder-decoder or a causal model, with an adapter of any method.
        inputs: A text, a list of texts or of pairs; a tokenized batch; a `datasets.Dataset` of either.
        tokenizer: Default the one saved with the adapter, else the base model's.
        sampling: S samples, or their number; 0 is the posterior mean; "auto": as many as each input needs
            (`Sampling.auto`, classes and choices). An adapter that is a point has no samples; one
            that is several networks has all of them.
        batch_size: Inputs that share a forward (`Sampling.batch_size`: samples that do).
        text_columns: Of a dataset, one or two; default those that can only be meant (`find_text_columns`).
        max_length: Longest input in tokens, what is longer is cut; default what tokenizer and model allow.
        options: For models that write: see `write_texts`.

    Raises:
        BlobError: Inputs, tokenizer or options do not fit, or the model has another task.
    """
    if batch_size < 1:
        raise BlobError(f"batch_size must be >= 1, got {batch_size}")
    drawn = sampling_of(model, Sampling.of(sampling))
    base: Any = model.get_base_model()
    scoring = model.companion(ChoiceScoring.slot)
    if isinstance(scoring, ChoiceScoring) and is_questions(inputs):
        if options:
            raise BlobError(f"{', '.join(options)}: not for multiple choice")
        asked = choice_rows(inputs, scoring, tokenizer or find_tokenizer(model), max_length)
        with evaluating(model):
            return _classify(model, asked, drawn, batch_size)
    classifies, writes = is_sequence_classifier(base), _writes(base)
    if classifies and options:
        raise BlobError(f"{', '.join(options)}: not for a classifier")
    if not classifies and not writes:
        raise BlobError(f"predict is for sequence classifiers and models that write, not for {type(base).__name__}")
    if classifies:
        _require_classes(base)
        rows = rows_of(model, inputs, tokenizer, text_columns, None, max_length)
        with evaluating(model):
            return _classify(model, rows, drawn, batch_size)
    drawn = drawn.for_texts()
    tokenizer = tokenizer or find_tokenizer(model)
    room = 0 if base.config.is_encoder_decoder else options.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    rows = rows_of(model, inputs, tokenizer, text_columns, options.pop("prompt", None), max_length, room)
    with evaluating(model):
        return write_texts(model, rows, tokenizer, drawn, batch_size, **options)


VERBS.predict = predict


def _writes(base: Any) -> bool:
    return bool(getattr(base, "can_generate", bool)())


def _require_classes(base: Any) -> None:
    kind = getattr(base.config, "problem_type", None)
    if base.config.num_labels < 2 or kind in ("regression", "multi_label_classification"):
        raise BlobError(f"predict needs one of two or more classes; this model has {base.config.num_labels} ({kind})")


def _in_batches(
    model: BlobModel,
    rows: Rows | ChoiceRows,
    batch_size: int,
    make: Callable[[dict[str, Tensor]], Sequence[Part]],
    only: Sequence[int] | None = None,
) -> list[Part]:
    """What `make` gives for each row, in the order of the rows.

    Args:
        only: Indices of the rows that are asked for, in their order.
    """
    wanted = range(len(rows)) if only is None else only
    chosen = set(wanted)
    order = [index for batch in rows.batches(len(rows)) for index in batch if index in chosen]
    found: dict[int, Part] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        found |= zip(indices, make(rows.batch(indices, model.device)), strict=True)
    return [found[index] for index in wanted]


# ----- classes ---------------------------------------------------------------------------------------------------


def _classify(model: BlobModel, rows: Rows | ChoiceRows, sampling: Sampling, batch_size: int) -> Prediction:
    averaged = own_predictive(model) is None  # else it is not sampled networks that are averaged

    def scores(inputs: dict[str, Tensor], part: Sampling) -> list[np.ndarray]:
        found = (
            sample_log_probs(model, inputs, part) if averaged else predict_classes(model, inputs, part).sample_log_probs
        )
        return list(found.cpu().numpy())

    def draw(only: Sequence[int], part: Sampling) -> np.ndarray:
        return np.stack(_in_batches(model, rows, batch_size, partial(scores, part=part), only))

    if sampling.tolerance is None or not sampling.num_samples or not averaged:
        drawn, networks = draw(range(len(rows)), sampling), None
    else:
        settled = settle(len(rows), sampling, draw)
        drawn, networks = settled.log_probs, settled.networks
    config: Any = model.get_base_model().config
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    # float32 log-probabilities sum to 1 only nearly
    samples = log_softmax(drawn.astype(np.float64), axis=-1)
    log_probs = predictive_log_probs(samples)
    calibration = calibration_of(model)
    if calibration is not None:
        log_probs = calibration.calibrated(log_probs, sampled=sampling.num_samples > 0)
    probabilities = np.exp(log_probs)
    return Prediction(
        names, probabilities, np.exp(samples), entr(probabilities).sum(axis=-1), expected_entropy(samples),
        mutual_information(samples), networks,
    )  # fmt: skip


# ----- texts -----------------------------------------------------------------------------------------------------

DEFAULT_NEW_TOKENS = 128
_OneText = tuple[Tensor, TokenUncertainty, list[str]]  # tokens, how unsure of each, and the texts of the samples


def write_texts(
    model: BlobModel,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    batch_size: int,
    decoding: str = "predictive",
    utility: Utility | None = None,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    **generation: Any,
) -> TextPrediction:
    """A text for each row.

    Args:
        decoding: "predictive": decoded from the averaged probabilities of the samples; "mbr": of the samples' texts
            that with the least Bayes risk, which is like the others. Without samples the posterior mean's.
        utility: How like two texts are for "mbr", default ROUGE-L.
        max_new_tokens: Longest answer, tokens.
        generation: For `generate`: `num_beams`, `length_penalty`, `no_repeat_ngram_size` ... (deterministic decoding).

    Raises:
        BlobError: Another decoding, or token sampling was asked for.
    """
    if decoding not in DECODINGS:
        raise BlobError(f"decoding must be one of {', '.join(DECODINGS)}, got {decoding!r}")
    config: Any = generation.get("generation_config") or model.generation_config
    if generation.get("do_sample"):
        raise BlobError("predict decodes greedily or with beams; to sample tokens use model.generate(sampling=...)")
    generation = {"max_new_tokens": max_new_tokens, **generation, "do_sample": False}
    if config.pad_token_id is None and generation.get("pad_token_id") is None:
        generation["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else _end(config)

    def decoded(tokens: Tensor) -> list[str]:
        pad = generation.get("pad_token_id", config.pad_token_id) or 0
        kept = tokens.masked_fill(tokens == IGNORED_LABEL, pad)
        return [text.strip() for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]

    def write(inputs: dict[str, Tensor]) -> list[_OneText]:
        samples: list[list[str]] = [[] for _ in range(len(next(iter(inputs.values()))))]
        if sampling.num_samples:
            drawn = generate_samples(model, inputs, sampling, **generation)
            samples = [decoded(generated_tokens(model, inputs, one, generation)) for one in drawn.unbind(1)]
            samples = [list(texts) for texts in zip(*samples, strict=True)]
        if sampling.num_samples and decoding == "predictive":
            found = generate_predictive(model, inputs, sampling, **generation)
            tokens, unsure = found.tokens, found.uncertainty
        else:
            if sampling.num_samples:
                alike = [pairwise(texts, utility or rouge_utility()) for texts in samples]
                chosen = torch.tensor([minimum_bayes_risk(one).index for one in alike], device=drawn.device)
                sequences = drawn[torch.arange(len(drawn), device=drawn.device), chosen]
            else:
                sequences = generate_mean(model, inputs, **generation)
            tokens = generated_tokens(model, inputs, sequences, generation)
            unsure = token_uncertainty(model, inputs, sequences, tokens, sampling)
        parts = zip(*(value.cpu() for value in vars(unsure).values()), strict=True)
        return [(own, TokenUncertainty(*part), texts)
                for own, part, texts in zip(tokens.cpu(), parts, samples, strict=True)]  # fmt: skip

    return _together(_in_batches(model, rows, batch_size, write), decoded)


def _end(config: Any) -> int:
    end = config.eos_token_id
    return int(end[0] if isinstance(end, (list, tuple)) else end or 0)


def _together(answers: list[_OneText], decoded: Callable[[Tensor], list[str]]) -> TextPrediction:
    """The answers of all rows as one object, padded to the longest."""
    length = max(len(tokens) for tokens, *_ in answers)
    tokens = torch.stack([pad_to(own, length, IGNORED_LABEL) for own, *_ in answers])
    fields = zip(*(vars(unsure).values() for _, unsure, _ in answers), strict=True)
    unsure = TokenUncertainty(*(torch.stack([pad_to(value, length, 0) for value in values]) for values in fields))
    samples = [texts for *_, texts in answers]
    scores = PredictiveText(tokens, tokens, unsure).scores.double().numpy()
    named = {name: scores[:, i] for i, name in enumerate(SEQUENCE_SCORES)}
    if samples[0]:
        alike = [pairwise(texts, rouge_utility()) for texts in samples]
        named["dissimilarity"] = np.array([dissimilarity(one) for one in alike])
        named["cluster_entropy"] = np.array([cluster_entropy(one) for one in alike])
    return TextPrediction(decoded(tokens), samples, tokens.numpy(), unsure, named)
