import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from blob_hf.experiments.scores import metrics_of, rouge_of_pairs, score_rows

WORDS = ["anna", "leaves", "early", "and", "tom", "buys", "some", "bread", "because", "they", "meet", "at", "noon"]


def sentences(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 6)) for _ in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_rouge_of_pairs_is_rouge_score_on_any_number_of_cores(workers):
    candidates, references = sentences(40), sentences(40, seed=1)
    candidates[3], references[3] = candidates[4], references[4]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = rouge_of_pairs(candidates, references, workers)
    for i, (candidate, reference) in enumerate(zip(candidates, references, strict=True)):
        expected = scorer.score(reference, candidate)
        for name in expected:
            assert found[name][i] == pytest.approx(expected[name].fmeasure)


def test_scores_are_aggregated_over_the_references_of_each_dialogue():
    references = {"a": sentences(3, seed=2), "b": sentences(2, seed=3)}
    rows = [{"dialogue": d, "arm": "x", "sample": s, "text": t} for s, t in enumerate(sentences(4)) for d in ("a", "b")]

    def bert(candidates, targets):
        return np.array([len(candidate) + len(target) for candidate, target in zip(candidates, targets, strict=True)])

    table = score_rows(rows, references, bert)
    assert metrics_of(table) == ["rouge1", "rouge2", "rougeL", "bertscore"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for _, row in table.iterrows():
        each = [scorer.score(reference, row["text"])["rougeL"].fmeasure for reference in references[row["dialogue"]]]
        assert row["rougeL_max"] == pytest.approx(max(each)) and row["rougeL_min"] == pytest.approx(min(each))
        assert row["rougeL_mean"] == pytest.approx(sum(each) / len(each))
        longest = max(len(reference) for reference in references[row["dialogue"]])
        assert row["bertscore_max"] == len(row["text"]) + longest
    assert metrics_of(score_rows(rows, references, None)) == ["rouge1", "rouge2", "rougeL"]
