"""From what the trainer predicts (log-probabilities, token ids) to the metrics that the scripts report."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction, PreTrainedTokenizerBase

from blob_hf import metrics
from blob_hf.data.summarization import Dialogue
from blob_hf.inference.predict import IGNORED_LABEL, TokenScores
from blob_hf.inference.uncertainty import SEQUENCE_SCORES
from blob_hf.metrics.similarity import Utility
from blob_hf.metrics.summaries import Predictive
from blob_hf.metrics.summarization import ROUGE_TYPES
from blob_hf.trainer.predictions import ClassPredictions
from blob_hf.trainer.selection import ALWAYS_MEASURED, check_metric
from blob_hf.trainer.training_args import BlobSeq2SeqTrainingArguments, BlobTrainingArguments
from blob_hf.utils.names import MEAN


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """compute_metrics of a `BlobTrainer` for a classifier: `metrics.classification_metrics` of its predictions.

    Args:
        prediction: Its predictions are `ClassPredictions`.
    """
    log_probs, samples, mean = cast(ClassPredictions, prediction.predictions)[:3]
    return metrics.classification_metrics(log_probs, samples, mean, np.asarray(prediction.label_ids))


def check_best_metric(args: BlobTrainingArguments) -> None:
    """Refuse a metric_for_best_model that the scripts do not measure, before anything is loaded.

    Raises:
        BlobError: naming the metrics that there are.
    """
    if args.metric_for_best_model is None:
        return
    if not isinstance(args, BlobSeq2SeqTrainingArguments):
        even = np.log(np.full((2, 2, 2), 0.5))
        own = list(metrics.classification_metrics(even[0], even, even[0], np.arange(2)))
    else:
        own = ["nll_sample_std", *(MEAN + name for name in ROUGE_TYPES if args.predict_with_generate)]
    check_metric(args.metric_for_best_model, [*ALWAYS_MEASURED, *own])


def decode(tokens: NDArray[np.integer], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of rows of token ids; -100, which the trainer pads with, becomes the pad token."""
    tokens = np.where(tokens == IGNORED_LABEL, tokenizer.pad_token_id, tokens)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def summaries_report(
    tokens: Sequence[NDArray[Any]],
    dialogues: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    decoding: str = "samples",
    utility: Utility | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`metrics.summaries_report` of what a `BlobSeq2SeqTrainer` generated.

    Args:
        tokens: The trainer's predictions: token ids `(dialogues, length)` of the posterior mean and
            `(dialogues, samples, length)` of the samples; for decoding "predictive" also `(dialogues, length)` of the
            predictive and its scores `(dialogues, 4)`.
        decoding: As in `BlobSeq2SeqTrainingArguments`.
        utility: What minimum Bayes risk expects; default ROUGE-L.
    """
    mean, samples, *more = tokens
    predictive = None
    if decoding == "predictive" and more:
        scores = dict(zip(SEQUENCE_SCORES, more[1].T, strict=True))
        predictive = Predictive(decode(more[0], tokenizer), scores)
    return metrics.summaries_report(
        [dialogue.id for dialogue in dialogues],
        [dialogue.references for dialogue in dialogues],
        decode(mean, tokenizer),
        [] if decoding == "mean" else [decode(one, tokenizer) for one in samples.swapaxes(0, 1)],
        decoding,
        predictive,
        utility,
    )


def rouge_compute_metrics(
    dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """compute_metrics for `predict_with_generate` during training, for rows in the order of `scoring_rows`."""
    references = [dialogue.references for dialogue in dialogues for _ in dialogue.references]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        mean_tokens = prediction.predictions[len(fields(TokenScores))]  # behind the scores
        scores = metrics.rouge(decode(mean_tokens, tokenizer), references)
        return {MEAN + name: scores[name] for name in ROUGE_TYPES}

    return compute
