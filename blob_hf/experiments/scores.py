"""Scores of many texts against several references each, on all cores."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from blob_hf.metrics.bertscore import BertScorer
from blob_hf.metrics.summarization import ROUGE_TYPES, rouge_per_example

METRIC_NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "bertscore": "BERTScore F1"}
AGGREGATES = ("mean", "max", "min")
_WORTH_PROCESSES = 10_000  # pairs; below, starting processes is not worth it


def rouge_of_pairs(
    candidates: Sequence[str], references: Sequence[str], workers: int | None = None
) -> dict[str, NDArray[np.float64]]:
    """ROUGE-1/2/L of each candidate against its reference, every distinct pair once.

    Args:
        workers: Processes; default all cores when there is enough to do.
    """
    pairs = list(dict.fromkeys(zip(candidates, references, strict=True)))
    pairs.sort(key=lambda pair: pair[1])  # texts of one dialogue together: the tokenizer remembers them
    workers = workers or (os.cpu_count() or 1 if len(pairs) >= _WORTH_PROCESSES else 1)
    if workers == 1:
        scores = _rouge(pairs)
    else:
        parts = [pairs[len(pairs) * i // workers : len(pairs) * (i + 1) // workers] for i in range(workers)]
        # forked where possible: a new interpreter would import torch first, which takes longer than 10,000 pairs
        context = get_context("fork" if "fork" in get_all_start_methods() else "spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            scores = np.concatenate(list(pool.map(_rouge, parts)))
    known = dict(zip(pairs, scores, strict=True))
    table = np.array([known[pair] for pair in zip(candidates, references, strict=True)])
    return {name: table[:, i] for i, name in enumerate(ROUGE_TYPES)}


def _rouge(pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
    scores = rouge_per_example([candidate for candidate, _ in pairs], [[reference] for _, reference in pairs])
    return np.stack([scores[name] for name in ROUGE_TYPES], axis=1)


def score_rows(
    rows: Sequence[Mapping], references: Mapping[str, Sequence[str]], bert: BertScorer | None
) -> pd.DataFrame:
    """Score generated texts.

    Args:
        rows: With `dialogue`, `arm`, `sample`, `text`.
        references: Texts by dialogue.

    Returns:
        The rows with `{metric}_{aggregate}` for each metric and mean, max and min over the references.
    """
    table = pd.DataFrame(list(rows))
    counts = [len(references[dialogue]) for dialogue in table["dialogue"]]
    candidates = [text for text, count in zip(table["text"], counts, strict=True) for _ in range(count)]
    targets = [reference for dialogue in table["dialogue"] for reference in references[dialogue]]
    scores = rouge_of_pairs(candidates, targets)
    if bert is not None:
        scores["bertscore"] = bert(candidates, targets)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    for name, values in scores.items():
        table[f"{name}_mean"] = np.add.reduceat(values, starts) / np.array(counts)
        table[f"{name}_max"] = np.maximum.reduceat(values, starts)
        table[f"{name}_min"] = np.minimum.reduceat(values, starts)
    return table


def metrics_of(table: pd.DataFrame) -> list[str]:
    """The metrics that a scored table has."""
    return [name for name in METRIC_NAMES if f"{name}_mean" in table]
