"""What is said of a run, against numbers counted by hand."""

import numpy as np
import pytest

from blob_hf import cli
from blob_hf.cli.sentences import (
    abstention_sentence,
    agreement_sentence,
    kept_sentence,
    overfitting_sentence,
    samples_sentence,
)


@pytest.mark.parametrize(
    ("nll", "mean_nll", "num_samples", "said"),
    [
        (1.27, 1.91, 10, "10 samples improve the NLL from 1.91 (posterior mean) to 1.27 nats per example."),
        (0.1, 0.09, 5, "5 samples worsen the NLL from 0.09 (posterior mean) to 0.1 nats per example."),
        (0.5001, 0.5, 10, "10 samples change nothing: the NLL is 0.5001 nats per example with and 0.5 without"),
        (0.3, 0.5, 1, "One sample improves the NLL"),
        (0.5, 0.5, 0, "The NLL is 0.5 nats per example."),
        (float("nan"), 0.5, 10, "not a finite number"),
    ],
)
def test_what_samples_do(nll, mean_nll, num_samples, said):
    assert said in samples_sentence(nll, mean_nll, num_samples, "example")


def watched(*nlls):
    return [{"loss": 0.1, "step": 5}, *({"eval_nll": nll, "step": 1000 * (i + 1)} for i, nll in enumerate(nlls))]


def test_a_training_that_went_on_past_its_best_is_told():
    said = overfitting_sentence(watched(0.812, 0.906, 1.161))
    assert "least at step 1,000 of 3,000, 0.812, and ended at 1.16." in said
    assert overfitting_sentence(watched(0.9, 0.812, float("nan"), 0.9)).count("step 2,000 of 4,000") == 1
    for as_good in (watched(0.9, 0.85, 0.86), watched(0.9, 0.8), watched(0.8), watched()):
        assert overfitting_sentence(as_good) == ""


def test_which_step_is_kept():
    said = kept_sentence(1000, 3000, "nll", 0.8123)
    assert said == "the adapter is that of step 1,000, the best by nll (0.812); the training ended at step 3,000"
    assert kept_sentence(3000, 3000, "nll", 0.8) == kept_sentence(None, 3000, "nll", None) == ""


def classifier(wrong):
    """Log-probabilities that grow less certain from row to row, and labels of which some are missed."""
    sure = np.linspace(0.99, 0.51, len(wrong))
    return np.log(np.stack([sure, 1 - sure], axis=1)), np.asarray(wrong, dtype=int)


def test_how_many_inputs_are_to_be_left_open():
    # of 100 the last 12 are wrong: 92 answered are 88 right (95.7 %), 93 are 88 right (94.6 %)
    said = abstention_sentence(*classifier([0] * 88 + [1] * 12))
    assert "accuracy is 88.0%" in said and "least certain 8% of the inputs" in said and "95% accuracy" in said
    assert abstention_sentence(*classifier([0] * 97 + [1] * 3)) == "It answers all inputs with 97.0% accuracy."
    assert "no help" in abstention_sentence(*classifier([1] * 12 + [0] * 88))
    scores, labels = classifier([0, 1])
    assert abstention_sentence(scores, labels) == "Its accuracy is 50.0% on these 2 rows, too few to say more."
    assert abstention_sentence(np.full_like(scores, np.nan), labels) == ""


def test_how_good_summaries_are_on_which_samples_agree():
    rows = [
        {"uncertainty": {"dissimilarity": doubt}, "mean_scores": {"rougeL": score}}
        for doubt, score in ((0.9, 0.2), (0.1, 0.8), (0.5, 0.4), (0.2, 0.6))
    ]
    assert "has ROUGE-L 0.700, all have 0.500" in agreement_sentence(rows)
    assert agreement_sentence(rows[:3]) == ""


def test_data_are_called_by_the_user_s_own_file():
    demo = {"train_file": "demo/train.jsonl", "validation_file": "demo/dev.jsonl"}
    assert cli.name_of_files({"train": "demo/train.jsonl"}, demo, "the demo") == "the demo"
    assert cli.name_of_files({"train": "demo/train.jsonl", "test": "a/chats.csv.gz"}, demo, "the demo") == "chats"
