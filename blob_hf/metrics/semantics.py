"""Do several answers to a question mean the same? Sets of one meaning, their entropy, and the graph of likenesses.

What says that two answers mean the same is a parameter, an `Equivalence`: by words (here), or a model of natural
language inference (`blob_hf.metrics.entailment`). All scores are higher the less the answers agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from blob_hf.metrics.similarity import LIKE, dissimilarity, pairwise, rouge_utility, share_entropy
from blob_hf.utils.errors import BlobError

Floats = NDArray[np.float64]

# Of the answers to a question; `disagreement` is of the one that is given among them.
SEMANTIC_SCORES = (
    "disagreement", "semantic_entropy", "discrete_semantic_entropy", "semantic_sets", "eigv", "degree",
)  # fmt: skip
# Around words, and a full stop behind them; not a number's sign or unit. The escapes are quotation marks.
_EDGES = "\"'()[]{}*_`,;:!?…“”«»¿¡\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Relations:
    """What the answers to one question have to do with one another.

    Attributes:
        same: Whether two mean the same, `(answers, answers)`, symmetric.
        similarity: How alike two are, `(answers, answers)` in [0, 1], symmetric, 1 on the diagonal.
    """

    same: NDArray[np.bool_]
    similarity: Floats


# Relations of answers, given these and the question.
Equivalence = Callable[[Sequence[str], str], Relations]


def normalized_answer(text: str) -> str:
    """A short answer without capitals, articles, blanks and the punctuation around its words (after SQuAD's F1)."""
    words = [word.strip(_EDGES).rstrip("." + _EDGES) for word in text.casefold().split()]
    kept = [word for word in words if word and word not in _ARTICLES]
    return " ".join(kept or filter(None, words))  # the answer "A" is an answer


@dataclass(frozen=True)
class LexicalEquivalence:
    """Answers mean the same if they are equal after `normalized_answer`, or long and of nearly the same words.

    Words cannot tell a paraphrase from another meaning, nor a long answer from the one that has another number in it.

    Args:
        threshold: ROUGE-L F1 from which on two long answers mean the same.
        short: Answers of up to so many words (without articles) have to be equal.
    """

    threshold: float = LIKE
    short: int = 5

    def __call__(self, texts: Sequence[str], question: str = "") -> Relations:
        """Relations of texts; the question plays no part. `similarity` is ROUGE-L, and 1 of equal ones."""
        answers = [normalized_answer(text) for text in texts]
        equal = np.array([[one == other for other in answers] for one in answers])
        long = np.array([len(answer.split()) > self.short for answer in answers])
        similarity = np.where(equal, 1.0, pairwise(texts, rouge_utility()))
        return Relations(equal | ((similarity >= self.threshold) & np.logical_and.outer(long, long)), similarity)


def semantic_sets(same: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The set of each answer, `(answers,)`, numbered in the order of their first ones.

    An answer joins the first set whose first answer means the same (algorithm 1 of Kuhn et al., ICLR 2023,
    arXiv 2302.09664).
    """
    firsts: list[int] = []
    found = []
    for index in range(len(same)):
        own = next((number for number, first in enumerate(firsts) if same[first, index]), len(firsts))
        if own == len(firsts):
            firsts.append(index)
        found.append(own)
    return np.array(found, dtype=np.int64)


def semantic_entropy(sets: ArrayLike, log_weights: ArrayLike | None = None) -> float:
    """Entropy over the sets of one meaning, nats.

    Args:
        sets: The set of each answer, `(answers,)`.
        log_weights: log-probability of each answer, nats; a set's probability is the sum of its answers', and all sum
            to 1 (Farquhar et al., Nature 2024, who take the mean over an answer's tokens, so that long answers count
            as much as short ones). None counts answers: their discrete semantic entropy.

    Raises:
        BlobError: Fewer than two answers, or not a weight for each.
    """
    ids = np.asarray(sets, dtype=np.int64)
    _require_two(len(ids))
    if log_weights is None:
        return share_entropy(ids)
    logs = np.asarray(log_weights, dtype=np.float64)
    if logs.shape != ids.shape:
        raise BlobError(f"expected a log-probability for each of {len(ids)} answers, got shape {logs.shape}")
    return share_entropy(ids, softmax(logs))


def eigenvalue_uncertainty(similarity: Floats) -> float:
    """U_EigV of Lin et al. (TMLR 2024, arXiv 2305.19187), a continuous number of semantic sets, in [1, answers].

    The sum of max(0, 1 - lambda) over the eigenvalues lambda of the graph's Laplacian I - D^(-1/2) W D^(-1/2): of a
    graph of cliques without edges between them it is their number.

    Args:
        similarity: W, `(answers, answers)`.

    Raises:
        BlobError: Fewer than two answers (so in the next one).
    """
    _require_two(len(similarity))
    scale = 1 / np.sqrt(similarity.sum(axis=1))
    eigenvalues = np.linalg.eigvalsh(np.eye(len(similarity)) - scale[:, None] * similarity * scale)
    return float(np.maximum(1 - eigenvalues, 0).sum())


def degree_uncertainty(similarity: Floats) -> float:
    """U_Deg of Lin et al. (2024): trace(m I - D) / m^2 of m answers, in [0, 1 - 1/m].

    It is (m - 1)/m of the mean dissimilarity of two answers.
    """
    count = len(similarity)
    _require_two(count)
    return dissimilarity(similarity) * (count - 1) / count


def semantic_scores(
    answer: str, samples: Sequence[str], log_weights: ArrayLike, question: str, equivalence: Equivalence
) -> tuple[dict[str, float], list[int]]:
    """`SEMANTIC_SCORES` of the sampled answers to one question, and the set of each.

    Args:
        answer: The one that is given: `disagreement` is the share of samples that mean something else.
        samples: S >= 2 answers.
        log_weights: Of the samples, as of `semantic_entropy`.

    Raises:
        BlobError: Fewer than two samples.
    """
    _require_two(len(samples))
    relations = equivalence([answer, *samples], question)
    same, similarity = relations.same[1:, 1:], relations.similarity[1:, 1:]
    sets = semantic_sets(same)
    values = (
        1 - relations.same[0, 1:].mean(), semantic_entropy(sets, log_weights), semantic_entropy(sets),
        sets.max() + 1, eigenvalue_uncertainty(similarity), degree_uncertainty(similarity),
    )  # fmt: skip
    return dict(zip(SEMANTIC_SCORES, map(float, values), strict=True)), sets.tolist()


def _require_two(count: int) -> None:
    if count < 2:
        raise BlobError(f"agreement is between two or more sampled answers, got {count}; raise num_samples")
