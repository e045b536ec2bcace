"""The numbers that the scripts report: the same metrics for the posterior mean (N=0) and for N posterior samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from blob_hf.data.summarization import Dialogue
from blob_hf.inference.generate import SEQUENCE_SCORES
from blob_hf.inference.predict import IGNORED_LABEL, TokenScores
from blob_hf.metrics.calibration import calibration_metrics
from blob_hf.metrics.detection import uncertainty_scores
from blob_hf.metrics.selective import RiskCoverage, prediction_rejection_ratio, risk_coverage
from blob_hf.metrics.similarity import (
    Utility,
    cluster_entropy,
    dissimilarity,
    minimum_bayes_risk,
    pairwise,
    rouge_utility,
)
from blob_hf.metrics.summarization import rouge, rouge_per_example
from blob_hf.metrics.uncertainty import predictive_log_probs, uncertainty_metrics
from blob_hf.utils.names import MEAN, STD

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")


def classification_metrics(prediction: Any) -> dict[str, float]:
    """compute_metrics of a `BlobTrainer` for a classifier.

    Args:
        prediction: `EvalPrediction` whose predictions are (log_probs, sample_log_probs, mean_log_probs).

    Returns:
        accuracy, ece, nll, brier of the predictive of the N samples, and rejection_area, its mean accuracy over all
        shares of rejected inputs, least certain first; the same as `mean_*` for the posterior mean;
        `*_sample_std`, the std over samples of each sample's own metric; entropies in nats.
    """
    log_probs, samples, mean = prediction.predictions
    labels = prediction.label_ids
    metrics = calibration_metrics(log_probs, labels)
    metrics.update({MEAN + name: value for name, value in calibration_metrics(mean, labels).items()})
    each = [calibration_metrics(samples[:, s], labels) for s in range(samples.shape[1])]
    metrics.update({name + STD: float(np.std([one[name] for one in each])) for name in each[0]})
    metrics.update(uncertainty_metrics(samples))
    curves = rejection_curves(samples, mean, labels)
    metrics["rejection_area"] = 1 - curves.get(SAMPLES_CURVE, curves[MEAN_CURVE]).area
    metrics[f"{MEAN}rejection_area"] = 1 - curves[MEAN_CURVE].area
    return metrics


MEAN_CURVE, SAMPLES_CURVE = "posterior mean, max. probability", "samples, max. probability"


def rejection_curves(samples: np.ndarray, mean: np.ndarray, labels: np.ndarray) -> dict[str, RiskCoverage]:
    """Error against coverage: of the posterior mean, of the samples' predictive, and if an oracle chose.

    Args:
        samples: Log-probabilities `(examples, samples, classes)`, nats.
        mean: The posterior mean's, `(examples, classes)`.
        labels: Class ids `(examples,)`.
    """
    curves = {}
    scores = uncertainty_scores(mean[:, None])
    wrong = (mean.argmax(-1) != labels).astype(float)
    curves[MEAN_CURVE] = risk_coverage(scores["max_prob"], wrong)
    if samples.shape[1] > 1:
        scores = uncertainty_scores(samples)
        wrong = (predictive_log_probs(samples).argmax(-1) != labels).astype(float)
        curves[SAMPLES_CURVE] = risk_coverage(scores["max_prob"], wrong)
        curves["samples, mutual information"] = risk_coverage(scores["mutual_information"], wrong)
    curves["oracle"] = risk_coverage(wrong, wrong)
    return curves


def decode(tokens: np.ndarray, tokenizer: Any) -> list[str]:
    """Texts of rows of token ids; -100, which the trainer pads with, becomes the pad token."""
    tokens = np.where(tokens == IGNORED_LABEL, tokenizer.pad_token_id, tokens)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def summaries_report(
    mean_tokens: np.ndarray,
    sample_tokens: np.ndarray,
    dialogues: Sequence[Dialogue],
    tokenizer: Any,
    decoding: str = "samples",
    predictive: tuple[np.ndarray, np.ndarray] | None = None,
    utility: Utility | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """ROUGE of generated summaries against all references of each dialogue (the best of them counts).

    Args:
        mean_tokens: `(dialogues, length)` of the posterior mean.
        sample_tokens: `(dialogues, samples, length)` of the posterior samples.
        decoding: As in `BlobSeq2SeqTrainingArguments`.
        utility: What minimum Bayes risk expects; default ROUGE-L.
        predictive: For decoding "predictive": `(dialogues, length)` of the predictive, and `(dialogues, 4)` scores.

    Returns:
        Metrics: rouge1/2/L averaged over samples and dialogues, `mean_rouge*` of the posterior mean,
        `rouge*_sample_std`, the std over samples of the corpus ROUGE, and `{decoding}_rouge*` of the chosen summaries.
        Rows for generated_predictions.jsonl: texts, ROUGE and the uncertainty of each dialogue.
    """
    references = [dialogue.references for dialogue in dialogues]
    mean = decode(mean_tokens, tokenizer)
    mean_scores = rouge_per_example(mean, references)
    metrics = {MEAN + name: float(mean_scores[name].mean()) for name in ROUGE_NAMES}
    rows: list[dict[str, Any]] = [
        {
            "id": dialogue.id,
            "references": dialogue.references,
            "summary": mean[i],  # unless `decoding` makes another choice
            "mean_summary": mean[i],
            "mean_scores": {name: float(mean_scores[name][i]) for name in ROUGE_NAMES},
        }
        for i, dialogue in enumerate(dialogues)
    ]
    if decoding == "mean":
        return metrics, rows
    samples = [decode(tokens, tokenizer) for tokens in sample_tokens.swapaxes(0, 1)]
    _add_samples(rows, metrics, samples, references, decoding, utility)
    if decoding == "predictive" and predictive is not None:
        texts = decode(predictive[0], tokenizer)
        for row, text, scores in zip(rows, texts, predictive[1], strict=True):
            row["summary"] = text
            row["uncertainty"] |= dict(zip(SEQUENCE_SCORES, map(float, scores), strict=True))
    if decoding in ("predictive", "mbr"):
        chosen = rouge_per_example([row["summary"] for row in rows], references)
        for i, row in enumerate(rows):
            row["summary_scores"] = {name: float(chosen[name][i]) for name in ROUGE_NAMES}
        metrics |= {f"{decoding}_{name}": float(chosen[name].mean()) for name in ROUGE_NAMES}
    return metrics, rows


def _add_samples(
    rows: list[dict[str, Any]],
    metrics: dict[str, float],
    samples: list[list[str]],
    references: list[list[str]],
    decoding: str,
    utility: Utility | None,
) -> None:
    """Add the texts of each sample `(samples, dialogues)`, their scores, how they differ, and the choice among them."""
    scores = [rouge_per_example(texts, references) for texts in samples]
    for name in ROUGE_NAMES:
        corpus = [float(one[name].mean()) for one in scores]
        metrics[name] = float(np.mean(corpus))
        metrics[name + STD] = float(np.std(corpus))
    for i, row in enumerate(rows):
        texts = [one[i] for one in samples]
        similarities = pairwise(texts, rouge_utility())
        choice = minimum_bayes_risk(similarities if utility is None else pairwise(texts, utility))
        row["samples"] = texts
        row["sample_scores"] = {name: [float(one[name][i]) for one in scores] for name in ROUGE_NAMES}
        row["sample_utilities"] = choice.expected_utility.tolist()
        if decoding == "mbr":
            row["summary"] = texts[choice.index]
        row["uncertainty"] = {
            "dissimilarity": dissimilarity(similarities),
            "cluster_entropy": cluster_entropy(similarities),
        }


def selective_summarization(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, RiskCoverage], dict[str, float]]:
    """Does the uncertainty of a summary tell how good it is? Risk is 1 - ROUGE-L of the summary.

    Args:
        rows: From `summaries_report`, with `uncertainty` and the scores of the chosen summary or the posterior mean's.

    Returns:
        Risk-coverage curves by uncertainty score, with "random" and "oracle", and the prediction-rejection ratios.
    """
    risk = np.array([1 - row.get("summary_scores", row["mean_scores"])["rougeL"] for row in rows])
    scores = {name: np.array([row["uncertainty"][name] for row in rows]) for name in rows[0]["uncertainty"]}
    curves = {name: risk_coverage(values, risk) for name, values in scores.items()}
    curves |= {"random": risk_coverage(np.zeros(len(risk)), risk), "oracle": risk_coverage(risk, risk)}
    return curves, {name: prediction_rejection_ratio(values, risk) for name, values in scores.items()}


def rouge_compute_metrics(dialogues: Sequence[Dialogue], tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    """compute_metrics for `predict_with_generate` during training, for rows in the order of `scoring_rows`."""
    references = [dialogue.references for dialogue in dialogues for _ in dialogue.references]

    def compute(prediction: Any) -> dict[str, float]:
        mean_tokens = prediction.predictions[len(fields(TokenScores))]  # behind the scores
        scores = rouge(decode(mean_tokens, tokenizer), references)
        return {MEAN + name: scores[name] for name in ROUGE_NAMES}

    return compute
