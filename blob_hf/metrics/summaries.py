"""The numbers that a summarizer's run reports: ROUGE of the mean, of the samples and of the chosen texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blob_hf.metrics.selective import RiskCoverage, prediction_rejection_ratio, risk_coverage
from blob_hf.metrics.similarity import (
    Utility,
    cluster_entropy,
    dissimilarity,
    minimum_bayes_risk,
    pairwise,
    rouge_utility,
)
from blob_hf.metrics.summarization import ROUGE_TYPES, rouge_per_example
from blob_hf.utils.names import CHOICES, MEAN, STD


@dataclass(frozen=True)
class Predictive:
    """What decoding with the posterior predictive wrote: texts `(inputs,)`, and uncertainties `(inputs,)` by name."""

    texts: Sequence[str]
    scores: Mapping[str, NDArray[np.floating]]


def summaries_report(
    ids: Sequence[str],
    references: Sequence[Sequence[str]],
    mean: Sequence[str],
    samples: Sequence[Sequence[str]] = (),
    decoding: str = "samples",
    predictive: Predictive | None = None,
    utility: Utility | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """ROUGE of generated summaries against all references of each input (the best of them counts).

    Args:
        ids: A name for each input, `(inputs,)`.
        references: One or more texts for each input; none for all of them: then nothing is scored.
        mean: The posterior mean's texts, `(inputs,)`.
        samples: The texts of each posterior sample, `(samples, inputs)`; not read for decoding "mean".
        decoding: Which text is the answer: "mean", "samples" (the mean's, beside the samples), "mbr" or "predictive".
        predictive: For decoding "predictive", what it wrote.
        utility: What minimum Bayes risk expects; default ROUGE-L.

    Returns:
        Metrics: rouge1/2/L averaged over samples and inputs, `mean_rouge*` of the posterior mean,
        `rouge*_sample_std`, the std over samples of the corpus ROUGE, and `{decoding}_rouge*` of the chosen summaries.
        Rows for generated_predictions.jsonl: texts, ROUGE and the uncertainty of each input.
    """
    mean_scores = _scores(mean, references)
    metrics = {MEAN + name: float(values.mean()) for name, values in mean_scores.items()}
    rows: list[dict[str, Any]] = [
        {
            "id": name,
            "references": texts,
            "summary": summary,  # unless `decoding` makes another choice
            "mean_summary": summary,
            **({"mean_scores": _of_row(mean_scores, i)} if mean_scores else {}),
        }
        for i, (name, texts, summary) in enumerate(zip(ids, references, mean, strict=True))
    ]
    if decoding == "mean":
        return metrics, rows
    _add_samples(rows, metrics, samples, references, decoding, utility)
    if decoding == "predictive" and predictive is not None:
        for i, (row, text) in enumerate(zip(rows, predictive.texts, strict=True)):
            row["summary"] = text
            row["uncertainty"] |= {name: float(values[i]) for name, values in predictive.scores.items()}
    chosen = _scores([row["summary"] for row in rows], references) if decoding in CHOICES else {}
    if chosen:
        for i, row in enumerate(rows):
            row["summary_scores"] = _of_row(chosen, i)
        metrics |= {f"{decoding}_{name}": float(values.mean()) for name, values in chosen.items()}
    return metrics, rows


def _scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, NDArray[np.float64]]:
    """ROUGE of each text by kind, empty where there are no references."""
    return dict(rouge_per_example(texts, references)) if any(references) else {}


def _of_row(scores: Mapping[str, NDArray[np.float64]], index: int) -> dict[str, float]:
    return {name: float(values[index]) for name, values in scores.items()}


def _add_samples(
    rows: list[dict[str, Any]],
    metrics: dict[str, float],
    samples: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    decoding: str,
    utility: Utility | None,
) -> None:
    """Add the texts of each sample `(samples, inputs)`, their scores, how they differ, and the choice among them."""
    scores = [_scores(texts, references) for texts in samples]
    for name in ROUGE_TYPES if any(references) else ():
        corpus = [float(one[name].mean()) for one in scores]
        metrics[name] = float(np.mean(corpus))
        metrics[name + STD] = float(np.std(corpus))
    for i, row in enumerate(rows):
        texts = [one[i] for one in samples]
        similarities = pairwise(texts, rouge_utility())
        choice = minimum_bayes_risk(similarities if utility is None else pairwise(texts, utility))
        row["samples"] = texts
        if any(references):
            row["sample_scores"] = {name: [float(one[name][i]) for one in scores] for name in ROUGE_TYPES}
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
