"""The numbers that the scripts report: the same metrics for the posterior mean (N=0) and for N posterior samples."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blob_hf.data.summarization import Dialogue
from blob_hf.metrics.calibration import calibration_metrics
from blob_hf.metrics.summarization import rouge, rouge_per_example
from blob_hf.metrics.uncertainty import uncertainty_metrics
from blob_hf.prediction import IGNORED_LABEL
from blob_hf.reporting.tables import MEAN, STD

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")


def classification_metrics(prediction: Any) -> dict[str, float]:
    """compute_metrics of a `BlobTrainer` for a classifier.

    Args:
        prediction: `EvalPrediction` whose predictions are (log_probs, sample_log_probs, mean_log_probs).

    Returns:
        accuracy, ece, nll, brier of the predictive of the N samples; the same as `mean_*` for the posterior mean;
        `*_sample_std`, the std over samples of each sample's own metric; entropies in nats.
    """
    log_probs, samples, mean = prediction.predictions
    labels = prediction.label_ids
    metrics = calibration_metrics(log_probs, labels)
    metrics.update({MEAN + name: value for name, value in calibration_metrics(mean, labels).items()})
    each = [calibration_metrics(samples[:, s], labels) for s in range(samples.shape[1])]
    metrics.update({name + STD: float(np.std([one[name] for one in each])) for name in each[0]})
    metrics.update(uncertainty_metrics(samples))
    return metrics


def decode(tokens: np.ndarray, tokenizer: Any) -> list[str]:
    """Texts of rows of token ids; -100, which the trainer pads with, becomes the pad token."""
    tokens = np.where(tokens == IGNORED_LABEL, tokenizer.pad_token_id, tokens)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def summaries_report(
    mean_tokens: np.ndarray, sample_tokens: np.ndarray, dialogues: Sequence[Dialogue], tokenizer: Any
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """ROUGE of generated summaries against all references of each dialogue (the best of them counts).

    Args:
        mean_tokens: `(dialogues, length)` of the posterior mean.
        sample_tokens: `(dialogues, samples, length)` of the posterior samples.

    Returns:
        Metrics: rouge1/2/L averaged over samples and dialogues, `mean_rouge*` of the posterior mean, and
        `rouge*_sample_std`, the std over samples of the corpus ROUGE. Rows for generated_predictions.jsonl.
    """
    references = [dialogue.references for dialogue in dialogues]
    num_samples = sample_tokens.shape[1]
    mean = decode(mean_tokens, tokenizer)
    samples = [decode(sample_tokens[:, s], tokenizer) for s in range(num_samples)]
    mean_scores = rouge_per_example(mean, references)
    scores = [rouge_per_example(texts, references) for texts in samples]
    metrics: dict[str, float] = {}
    for name in ROUGE_NAMES:
        corpus = [float(one[name].mean()) for one in scores]
        metrics[name] = float(np.mean(corpus))
        metrics[MEAN + name] = float(mean_scores[name].mean())
        metrics[name + STD] = float(np.std(corpus))
    rows = [
        {
            "id": dialogue.id,
            "references": dialogue.references,
            "mean_summary": mean[i],
            "samples": [texts[i] for texts in samples],
            "mean_scores": {name: float(mean_scores[name][i]) for name in ROUGE_NAMES},
            "sample_scores": {name: [float(one[name][i]) for one in scores] for name in ROUGE_NAMES},
        }
        for i, dialogue in enumerate(dialogues)
    ]
    return metrics, rows


def rouge_compute_metrics(dialogues: Sequence[Dialogue], tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    """compute_metrics for `predict_with_generate` during training, for rows in the order of `scoring_rows`."""
    references = [dialogue.references for dialogue in dialogues for _ in dialogue.references]

    def compute(prediction: Any) -> dict[str, float]:
        *_, mean_tokens, _samples = prediction.predictions
        scores = rouge(decode(mean_tokens, tokenizer), references)
        return {MEAN + name: scores[name] for name in ROUGE_NAMES}

    return compute
