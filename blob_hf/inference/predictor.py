"""From texts to answers: `BlobModel.predict`, over everything that predicts and generates on this floor."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.special import entr, log_softmax
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blob_hf.inference.answers import Prediction, TextPrediction
from blob_hf.inference.choices import ChoiceRows, ChoiceScoring, choice_rows, is_questions
from blob_hf.inference.decisions import class_rule, text_rule
from blob_hf.inference.evaluating import evaluating
from blob_hf.inference.inputs import Rows, find_tokenizer, in_batches, rows_of
from blob_hf.inference.predict import class_log_probs, own_predictive, predict_classes, sample_log_probs
from blob_hf.inference.settling import settle
from blob_hf.inference.texts import Inputs
from blob_hf.inference.writing import DECODINGS, DEFAULT_NEW_TOKENS, write_texts
from blob_hf.metrics.similarity import DEFAULT_UTILITY, utility_name
from blob_hf.metrics.uncertainty import expected_entropy, mutual_information
from blob_hf.tuner.base_model import is_sequence_classifier
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import sampling_of
from blob_hf.tuner.registry import VERBS
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

__all__ = ["DECODINGS", "predict"]


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
        inputs: A text, a list of texts or of pairs; a tokenized batch; a `datasets.Dataset` of either. For causal
            models also conversations, lists of messages `{"role": ..., "content": ...}`, or rows that have them in a
            column (`blob_hf.data.conversations`); the answer goes on from the chat template's generation prompt.
        tokenizer: Default the one saved with the adapter, else the base model's.
        sampling: S samples, or their number; 0 is the posterior mean; "auto": as many as each input needs
            (`Sampling.auto`, classes and choices). An adapter that is a point has no samples; one
            that is several networks has all of them.
        batch_size: Inputs that share a forward (`Sampling.batch_size`: samples that do).
        text_columns: Of a dataset, one or two; default those that can only be meant (`find_text_columns`).
        max_length: Longest input in tokens; default what tokenizer and model allow. What is longer loses its end, a
            causal model's its beginning.
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
    prompt = options.pop("prompt", None)
    rows = rows_of(model, inputs, tokenizer, text_columns, prompt, max_length, room)
    with evaluating(model):
        found = write_texts(model, rows, tokenizer, drawn, batch_size, **options)
    rule = text_rule(model)
    if rule is None:
        return found
    return dataclasses.replace(
        found, abstain=rule.abstains(model, found.uncertainty, drawn, how_written(model, prompt, options))
    )


VERBS.predict = predict


def how_written(model: BlobModel, prompt: str | None, options: Mapping[str, Any]) -> dict[str, object]:
    """How texts are written, as far as a rule that was fitted to texts depends on it.

    Args:
        options: Of `predict`, for models that write; what is not among them is as by default.

    Returns:
        prompt, decoding, num_beams and max_new_tokens; and only where they change a text and are not as by default
        length_penalty, stop_strings, and of a sample's text temperature and the name of the utility.
    """
    config: Any = options.get("generation_config") or model.generation_config
    decoding = options.get("decoding", DECODINGS[0])
    beams = options.get("num_beams", config.num_beams) or 1
    penalty = options.get("length_penalty", config.length_penalty)
    found = {
        "prompt": prompt, "decoding": decoding, "num_beams": beams,
        "max_new_tokens": options.get("max_new_tokens", DEFAULT_NEW_TOKENS),
    }  # fmt: skip
    if beams > 1 and penalty not in (None, 1.0):
        found["length_penalty"] = penalty
    if stops := options.get("stop_strings"):
        found["stop_strings"] = [stops] if isinstance(stops, str) else list(stops)  # as a file gives them back
    if decoding != DECODINGS[0]:  # the answer is the text of a sample
        if options.get("temperature"):
            found["temperature"] = options["temperature"]
        if (utility := utility_name(options.get("utility"))) != DEFAULT_UTILITY:
            found["utility"] = utility
    return found


def _writes(base: Any) -> bool:
    return bool(getattr(base, "can_generate", bool)())


def _require_classes(base: Any) -> None:
    kind = getattr(base.config, "problem_type", None)
    if base.config.num_labels < 2 or kind in ("regression", "multi_label_classification"):
        raise BlobError(f"predict needs one of two or more classes; this model has {base.config.num_labels} ({kind})")


# ----- classes ---------------------------------------------------------------------------------------------------


def _classify(model: BlobModel, rows: Rows | ChoiceRows, sampling: Sampling, batch_size: int) -> Prediction:
    averaged = own_predictive(model) is None  # else it is not sampled networks that are averaged

    def scores(inputs: dict[str, Tensor], part: Sampling) -> list[np.ndarray]:
        found = (
            sample_log_probs(model, inputs, part) if averaged else predict_classes(model, inputs, part).sample_log_probs
        )
        return list(found.cpu().numpy())

    def draw(only: Sequence[int], part: Sampling) -> np.ndarray:
        return np.stack(in_batches(model, rows, batch_size, partial(scores, part=part), only))

    if sampling.tolerance is None or not sampling.num_samples or not averaged:
        drawn, networks = draw(range(len(rows)), sampling), None
    else:
        settled = settle(len(rows), sampling, draw)
        drawn, networks = settled.log_probs, settled.networks
    config: Any = model.get_base_model().config
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    # float32 log-probabilities sum to 1 only nearly
    samples = log_softmax(drawn.astype(np.float64), axis=-1)
    probabilities = np.exp(class_log_probs(model, samples, sampled=sampling.num_samples > 0))
    rule = class_rule(model)
    decided = None if rule is None else rule.decide(model, probabilities, sampling)
    return Prediction(
        names, probabilities, np.exp(samples), entr(probabilities).sum(axis=-1), expected_entropy(samples),
        mutual_information(samples), networks, decided,
    )  # fmt: skip
