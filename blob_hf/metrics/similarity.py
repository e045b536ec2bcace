"""What the texts of several networks have in common: utility, minimum Bayes risk, dissimilarity, clusters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering

from blob_hf.metrics.summarization import ROUGE_TYPES, rouge_per_example
from blob_hf.utils.errors import BlobError

LIKE = 0.5  # texts of that similarity count as saying the same

# Scores `(pairs,)` in which higher is more alike, of candidates against references; symmetric in the two.
Utility = Callable[[Sequence[str], Sequence[str]], NDArray[np.float64]]
DEFAULT_UTILITY = "rougeL"


@dataclass(frozen=True)
class _Rouge:
    """ROUGE F1 of the kind `name`."""

    name: str

    def __call__(self, texts: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
        return rouge_per_example(texts, [[text] for text in references], kinds=(self.name,))[self.name]


def utility_name(utility: Utility | None) -> str:
    """What a utility is called: its kind of ROUGE, a BERTScore's encoder, a function's name; None is the default."""
    if utility is None:
        return DEFAULT_UTILITY
    return str(getattr(utility, "name", None) or getattr(utility, "__qualname__", type(utility).__name__))


def rouge_utility(name: str = DEFAULT_UTILITY) -> Utility:
    """ROUGE F1 of one kind as a utility.

    Raises:
        BlobError: Not one of rouge1, rouge2, rougeL.
    """
    if name not in ROUGE_TYPES:
        raise BlobError(f"utility must be one of {', '.join(ROUGE_TYPES)}, bertscore, got {name!r}")
    return _Rouge(name)


def pairwise(texts: Sequence[str], utility: Utility) -> NDArray[np.float64]:
    """Utility between all texts of one input, `(samples, samples)`; every distinct pair is scored once.

    The diagonal is 1: a text says what it says.
    """
    distinct = list(dict.fromkeys(texts))
    index = [distinct.index(text) for text in texts]
    matrix = np.ones((len(distinct), len(distinct)))
    pairs = list(combinations(range(len(distinct)), 2))
    if pairs:
        scores = utility([distinct[i] for i, _ in pairs], [distinct[j] for _, j in pairs])
        for (i, j), score in zip(pairs, scores, strict=True):
            matrix[i, j] = matrix[j, i] = score
    return matrix[np.ix_(index, index)]


@dataclass(frozen=True)
class Choice:
    """What minimum Bayes risk chose: the index of a text, and each text's expected utility `(samples,)`."""

    index: int
    expected_utility: NDArray[np.float64]


def minimum_bayes_risk(similarities: NDArray[np.float64]) -> Choice:
    """The text with the highest expected utility against the others (Kumar & Byrne, 2004; Eikema & Aziz, 2022).

    Args:
        similarities: From `pairwise`, `(samples, samples)`.

    Returns:
        The choice; of equal ones the first. A single text has expected utility 1.
    """
    count = len(similarities)
    if count == 0:
        raise BlobError("minimum Bayes risk needs at least one text")
    if count == 1:
        return Choice(0, np.ones(1))
    expected = (similarities.sum(axis=1) - similarities.diagonal()) / (count - 1)
    return Choice(int(np.argmax(expected)), expected)


def dissimilarity(similarities: NDArray[np.float64]) -> float:
    """Mean over all pairs of 1 - similarity: 0 if all samples say the same."""
    count = len(similarities)
    if count < 2:
        return 0.0
    return float((1 - similarities)[np.triu_indices(count, k=1)].mean())


def cluster_entropy(similarities: NDArray[np.float64], threshold: float = LIKE) -> float:
    """Entropy in nats of the clusters that the samples fall into: 0 if they all say nearly the same.

    A lexical relative of semantic entropy (Kuhn et al., 2023): clusters are made by average linkage of texts whose
    similarity is at least `threshold`.
    """
    count = len(similarities)
    if count < 2:
        return 0.0
    clustering = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=1 - threshold
    )
    return share_entropy(clustering.fit_predict(1 - similarities))


def share_entropy(groups: NDArray[np.int64], weights: NDArray[np.float64] | None = None) -> float:
    """Entropy in nats of the shares of groups 0, 1, ... in what is in them.

    Args:
        groups: The group of each text, `(texts,)`.
        weights: Of the texts, which sum to 1; default all the same.
    """
    shares = np.bincount(groups) / len(groups) if weights is None else np.bincount(groups, weights)
    shares = shares[shares > 0]
    return max(0.0, float(-(shares * np.log(shares)).sum()))  # not -0.0
