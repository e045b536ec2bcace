"""ROUGE against several references."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from blob_hf.utils.errors import BlobError

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
_AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "max": max,
    "mean": lambda values: sum(values) / len(values),
    "min": min,
}
Aggregate = Literal["max", "mean", "min"]


class _CachedTokenizer(DefaultTokenizer):
    """rouge_score's own tokenizer with stemming, which remembers texts: a reference is scored against many."""

    @lru_cache(maxsize=20_000)  # noqa: B019 - there is one tokenizer, so no other object is kept alive
    def tokenize(self, text: str) -> list[str]:
        return super().tokenize(text)


_TOKENIZER = _CachedTokenizer(use_stemmer=True)


def rouge_per_example(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    aggregate: Aggregate = "max",
    require_equal_references: bool = False,
    kinds: Sequence[str] = ROUGE_TYPES,
) -> dict[str, NDArray[np.float64]]:
    """ROUGE-1, -2 and -L F1 with stemming of each prediction against its references (Lin, 2004; rouge_score).

    Args:
        predictions: One text per example.
        references: One or more texts per example.
        aggregate: Over an example's references: the best, the mean or the worst score.
        require_equal_references: Insist on as many references for every example; the best of more is higher.
        kinds: Which of rouge1, rouge2, rougeL to compute.

    Returns:
        An array `(examples,)` in [0, 1] of each kind.

    Raises:
        BlobError: No examples, unequal lengths, an example without a reference, or (when asked) unequal numbers.
    """
    if len(predictions) == 0:
        raise BlobError("there are no predictions to score")
    if len(predictions) != len(references):
        raise BlobError(f"got {len(predictions)} predictions but {len(references)} lists of references")
    if aggregate not in _AGGREGATES:
        raise BlobError(f"aggregate must be one of {', '.join(_AGGREGATES)}, got {aggregate!r}")
    counts = {len(texts) for texts in references}
    if require_equal_references and len(counts) > 1:
        raise BlobError(f"every example must have the same number of references, got {sorted(counts)}")
    scorer = RougeScorer(list(kinds), tokenizer=_TOKENIZER)
    values: dict[str, list[float]] = {name: [] for name in kinds}
    for index, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(texts, str) or len(texts) == 0:
            raise BlobError(f"example {index} must have a list of one or more references, got {texts!r}")
        scores = [scorer.score(text, prediction) for text in texts]
        for name in kinds:
            values[name].append(_AGGREGATES[aggregate]([score[name].fmeasure for score in scores]))
    return {name: np.asarray(column) for name, column in values.items()}


def rouge(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    aggregate: Aggregate = "max",
    require_equal_references: bool = False,
) -> dict[str, float]:
    """Corpus mean of `rouge_per_example`, and as `rouge1_std` ... the (population) std over examples.

    Arguments and errors are those of `rouge_per_example`.
    """
    scores = rouge_per_example(predictions, references, aggregate, require_equal_references)
    means = {name: float(values.mean()) for name, values in scores.items()}
    return means | {f"{name}_std": float(values.std()) for name, values in scores.items()}


class MultiReferenceRouge(evaluate.Metric):
    """`evaluate.Metric` of `rouge`: references are a list of texts per prediction."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ROUGE-1/2/L F1 with stemming against several references.",
            citation="",
            inputs_description="predictions: texts; references: a list of texts each.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        aggregate: Aggregate = "max",
        require_equal_references: bool = False,
    ) -> dict[str, float]:
        return rouge(predictions, references, aggregate, require_equal_references)
