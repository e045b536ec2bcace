from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from blob_hf.cli.evaluation import (
    classification_metrics,
    decode,
    rouge_compute_metrics,
    summaries_report,
)
from blob_hf.data.summarization import Dialogue
from blob_hf.metrics import calibration_metrics, mutual_information, rouge, selective_summarization

WORDS = ["<pad>", "</s>", "anna", "pays", "leaves", "early"]


class Tokenizer:
    pad_token_id = 0

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(WORDS[token] for token in row if token > 1) for row in rows]


def test_classification_metrics_are_those_of_the_predictive_of_the_mean_and_of_each_sample():
    rng = np.random.default_rng(0)
    samples = log_softmax(rng.normal(size=(30, 4, 3)), axis=-1)
    mean = log_softmax(rng.normal(size=(30, 3)), axis=-1)
    predictive = logsumexp(samples, axis=1) - np.log(4)
    labels = rng.integers(0, 3, 30)
    found = classification_metrics(SimpleNamespace(predictions=(predictive, samples, mean), label_ids=labels))
    for name, value in calibration_metrics(predictive, labels).items():
        assert found[name] == value
        assert found[f"mean_{name}"] == calibration_metrics(mean, labels)[name]
        each = [calibration_metrics(samples[:, s], labels)[name] for s in range(4)]
        assert found[f"{name}_sample_std"] == pytest.approx(np.std(each))
    assert found["mutual_information"] == pytest.approx(mutual_information(samples).mean())
    for key, scores in (("rejection_area", predictive), ("mean_rejection_area", mean)):
        right = (scores.argmax(1) == labels)[np.argsort(-scores.max(1))]  # most certain first
        assert found[key] == pytest.approx(np.mean([right[:n].mean() for n in range(1, 31)]))


def test_padding_of_the_trainer_is_masked_before_decoding():
    assert decode(np.array([[2, 3, 1, -100, -100]]), Tokenizer()) == ["anna pays"]


def test_summaries_are_scored_against_all_references():
    dialogues = [Dialogue("a", "...", ["anna pays", "anna leaves early"]), Dialogue("b", "...", ["early", "anna"])]
    mean = np.array([[2, 4, 5, 1], [2, 1, -100, -100]])
    samples = np.array([[[2, 3, 1, 0], [4, 1, 0, 0]], [[5, 1, 0, 0], [3, 1, 0, 0]]])
    metrics, rows = summaries_report((mean, samples), dialogues, Tokenizer())
    references = [dialogue.references for dialogue in dialogues]
    assert metrics["mean_rouge1"] == rouge(["anna leaves early", "anna"], references)["rouge1"] == 1
    each = [rouge(texts, references)["rouge1"] for texts in (["anna pays", "early"], ["leaves", "pays"])]
    assert metrics["rouge1"] == pytest.approx(np.mean(each))
    assert metrics["rouge1_sample_std"] == pytest.approx(np.std(each))
    assert rows[1]["samples"] == ["early", "pays"] and rows[1]["sample_scores"]["rouge1"] == [1.0, 0.0]
    assert rows[0]["id"] == "a" and rows[0]["mean_summary"] == "anna leaves early"
    compute = rouge_compute_metrics(dialogues, Tokenizer())
    rows_of_references = mean.repeat(2, axis=0)
    repeated = SimpleNamespace(predictions=(None, None, None, None, rows_of_references, None))
    assert compute(repeated)["mean_rouge1"] == 1


DIALOGUES = [Dialogue("a", "...", ["anna pays", "anna leaves early"]), Dialogue("b", "...", ["early", "anna"])]
MEAN = np.array([[2, 4, 5, 1], [2, 1, -100, -100]])
SAMPLES = np.array([[[2, 3, 1, 0], [4, 1, 0, 0], [2, 3, 1, 0]], [[5, 1, 0, 0], [3, 1, 0, 0], [2, 5, 1, 0]]])


def test_what_each_decoding_answers():
    metrics, rows = summaries_report((MEAN, SAMPLES), DIALOGUES, Tokenizer(), "mean")
    assert set(metrics) == {"mean_rouge1", "mean_rouge2", "mean_rougeL"} and "samples" not in rows[0]
    assert rows[0]["summary"] == "anna leaves early"
    metrics, rows = summaries_report((MEAN, SAMPLES), DIALOGUES, Tokenizer(), "samples")
    assert rows[0]["summary"] == rows[0]["mean_summary"] and not any(name.startswith("mbr") for name in metrics)
    metrics, rows = summaries_report((MEAN, SAMPLES), DIALOGUES, Tokenizer(), "mbr")
    assert [row["summary"] for row in rows] == ["anna pays", "early"]  # what two of three say; of equals the first
    assert rows[0]["sample_utilities"] == pytest.approx([0.5, 0.0, 0.5])

    def shortest(texts, references):
        return np.array([1 - len(text + reference) / 100 for text, reference in zip(texts, references, strict=True)])

    _, other = summaries_report((MEAN, SAMPLES), DIALOGUES, Tokenizer(), "mbr", utility=shortest)
    assert [row["summary"] for row in other] == ["anna pays", "pays"] and other[1]["uncertainty"] == rows[1][
        "uncertainty"
    ]
    references = [dialogue.references for dialogue in DIALOGUES]
    assert metrics["mbr_rougeL"] == pytest.approx(rouge(["anna pays", "early"], references)["rougeL"])
    assert rows[0]["uncertainty"]["dissimilarity"] == pytest.approx(2 / 3)
    predictive = (np.array([[4, 1], [2, 1]]), np.array([[1.0, 2.0, 1.5, 0.5], [0.1, 0.2, 0.1, 0.1]]))
    metrics, rows = summaries_report((MEAN, SAMPLES, *predictive), DIALOGUES, Tokenizer(), "predictive")
    assert [row["summary"] for row in rows] == ["leaves", "anna"]
    assert rows[0]["uncertainty"]["token_nll"] == 1.0 and rows[0]["uncertainty"]["mutual_information"] == 0.5
    assert metrics["predictive_rouge1"] == pytest.approx(rouge(["leaves", "anna"], references)["rouge1"])


def test_an_uncertainty_that_finds_the_bad_summary_has_the_best_ratio():
    predictive = (np.array([[4, 1], [2, 1]]), np.array([[1.0, 2.0, 1.5, 0.5], [0.1, 0.2, 0.1, 0.9]]))
    _, rows = summaries_report((MEAN, SAMPLES, *predictive), DIALOGUES, Tokenizer(), "predictive")
    curves, ratios = selective_summarization(rows)
    assert ratios["token_nll"] == pytest.approx(1) and ratios["mutual_information"] == pytest.approx(-1)
    assert curves["oracle"].area == curves["token_nll"].area < curves["random"].area
