import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from blob_hf.metrics.similarity import cluster_entropy, dissimilarity, minimum_bayes_risk, pairwise, rouge_utility
from blob_hf.utils.errors import BlobError

TEXTS = ["the cat sat", "a cat sat down", "the cat sat", "dogs bark at night", "", "the cats were sitting down"]


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_minimum_bayes_risk_is_its_definition(kind):
    """The O(S^2) double loop with rouge_score itself."""
    scorer = RougeScorer([kind], use_stemmer=True)
    expected = []
    for i, text in enumerate(TEXTS):
        others = [other for j, other in enumerate(TEXTS) if j != i]
        scores = [1.0 if text == other else scorer.score(other, text)[kind].fmeasure for other in others]
        expected.append(sum(scores) / len(scores))
    choice = minimum_bayes_risk(pairwise(TEXTS, rouge_utility(kind)))
    assert choice.expected_utility == pytest.approx(expected)
    assert choice.index == int(np.argmax(expected)) == 0


def test_every_distinct_pair_is_scored_once():
    asked = []

    def utility(texts, references):
        asked.extend(zip(texts, references, strict=True))
        return np.zeros(len(texts))

    matrix = pairwise(["a", "b", "a", "a", "c"], utility)
    assert sorted(asked) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert matrix[0].tolist() == [1, 0, 1, 1, 0] and (matrix == matrix.T).all()


def test_dissimilarity_and_clusters_by_hand():
    same, apart = np.ones((4, 4)), np.eye(4)
    assert dissimilarity(same) == 0 and cluster_entropy(same) == 0
    assert dissimilarity(apart) == 1 and cluster_entropy(apart) == pytest.approx(math.log(4))
    pairs = np.kron(np.eye(2), np.ones((2, 2)))  # two clusters of two
    assert dissimilarity(pairs) == pytest.approx(4 / 6) and cluster_entropy(pairs) == pytest.approx(math.log(2))
    three = np.ones((4, 4)) * 0.6
    three[3, :3] = three[:3, 3] = 0.1
    np.fill_diagonal(three, 1)
    assert cluster_entropy(three, threshold=0.5) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert cluster_entropy(three, threshold=0.7) == pytest.approx(math.log(4))


def test_one_text_alone_and_none():
    one = pairwise(["a"], rouge_utility())
    assert minimum_bayes_risk(one).index == 0 and dissimilarity(one) == 0 and cluster_entropy(one) == 0
    with pytest.raises(BlobError, match="at least one text"):
        minimum_bayes_risk(np.empty((0, 0)))
    with pytest.raises(BlobError, match="utility must be one of rouge1, rouge2, rougeL, bertscore, got 'bleu'"):
        rouge_utility("bleu")
