from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from blob_hf.data.summarization import Dialogue
from blob_hf.evaluation import classification_metrics, decode, rouge_compute_metrics, summaries_report
from blob_hf.metrics import calibration_metrics, mutual_information, rouge

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


def test_padding_of_the_trainer_is_masked_before_decoding():
    assert decode(np.array([[2, 3, 1, -100, -100]]), Tokenizer()) == ["anna pays"]


def test_summaries_are_scored_against_all_references():
    dialogues = [Dialogue("a", "...", ["anna pays", "anna leaves early"]), Dialogue("b", "...", ["early", "anna"])]
    mean = np.array([[2, 4, 5, 1], [2, 1, -100, -100]])
    samples = np.array([[[2, 3, 1, 0], [4, 1, 0, 0]], [[5, 1, 0, 0], [3, 1, 0, 0]]])
    metrics, rows = summaries_report(mean, samples, dialogues, Tokenizer())
    references = [dialogue.references for dialogue in dialogues]
    assert metrics["mean_rouge1"] == rouge(["anna leaves early", "anna"], references)["rouge1"] == 1
    each = [rouge(texts, references)["rouge1"] for texts in (["anna pays", "early"], ["leaves", "pays"])]
    assert metrics["rouge1"] == pytest.approx(np.mean(each))
    assert metrics["rouge1_sample_std"] == pytest.approx(np.std(each))
    assert rows[1]["samples"] == ["early", "pays"] and rows[1]["sample_scores"]["rouge1"] == [1.0, 0.0]
    assert rows[0]["id"] == "a" and rows[0]["mean_summary"] == "anna leaves early"
    compute = rouge_compute_metrics(dialogues, Tokenizer())
    repeated = SimpleNamespace(predictions=(None, None, None, mean.repeat(2, axis=0), None))  # a row per reference
    assert compute(repeated)["mean_rouge1"] == 1
