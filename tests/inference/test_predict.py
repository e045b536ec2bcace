import math

import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bart, tiny_bert

from blob_hf import BlobConfig, get_blob_model
from blob_hf.inference.predict import log_mean_exp, predict_classes, repeat_rows, score_targets
from blob_hf.tuner.sampling import Sampling


@pytest.fixture
def classifier():
    model = get_blob_model(tiny_bert(), BlobConfig(target_modules=TARGETS["bert"], init_eps=0.9))
    randomize_b(model)
    return model.eval()


@pytest.fixture
def summarizer():
    model = get_blob_model(
        tiny_bart(), BlobConfig(target_modules=TARGETS["bart"], init_eps=0.9, task_type="SEQ_2_SEQ_LM")
    )
    randomize_b(model)
    return model.eval()


@pytest.mark.parametrize("per_forward", [1, 2, 4, 7])
def test_probabilities_are_averaged_over_samples(classifier, per_forward):
    inputs = {"input_ids": random_ids(5, 8)}
    found = predict_classes(classifier, inputs, Sampling(4, seed=2, batch_size=per_forward))
    probs = []
    for s in range(4):
        with torch.no_grad(), classifier.posterior_samples(Sampling(1, seed=2, first=s)):
            probs.append(classifier(**inputs).logits.softmax(-1))
    torch.testing.assert_close(found.log_probs.exp(), torch.stack(probs).mean(0))
    torch.testing.assert_close(found.sample_log_probs.exp(), torch.stack(probs, dim=1))
    torch.testing.assert_close(found.mean_log_probs.exp(), classifier(**inputs).logits.softmax(-1))
    torch.testing.assert_close(found.log_probs.exp().sum(-1), torch.ones(5))


def test_no_samples_is_the_posterior_mean(classifier):
    inputs = {"input_ids": random_ids(5, 8)}
    found = predict_classes(classifier, inputs, Sampling(0))
    expected = classifier(**inputs).logits.log_softmax(-1)
    assert torch.equal(found.log_probs, expected) and torch.equal(found.mean_log_probs, expected)
    assert found.sample_log_probs.shape == (5, 1, 3)


@pytest.mark.parametrize("per_forward", [1, 3])
def test_token_scores_are_those_of_the_averaged_token_probabilities(summarizer, per_forward):
    inputs = {"input_ids": random_ids(3, 8), "decoder_input_ids": random_ids(3, 6)}
    labels = random_ids(3, 6)
    labels[1, 4:] = labels[2, 2:] = -100
    found = score_targets(summarizer, inputs, labels, Sampling(3, seed=1, batch_size=per_forward))
    probs = []
    for s in range(3):
        with torch.no_grad(), summarizer.posterior_samples(Sampling(1, seed=1, first=s)):
            probs.append(summarizer(**inputs).logits.softmax(-1))
    for row in range(3):
        for t in range(6):
            if labels[row, t] == -100:
                assert found.log_probs[row, t] == found.mean_log_probs[row, t] == 0
                continue
            p = [sample[row, t, labels[row, t]].item() for sample in probs]
            assert found.log_probs[row, t].item() == pytest.approx(math.log(sum(p) / 3), rel=1e-4)
        each = [
            sum(sample[row, t, labels[row, t]].log().item() for t in range(6) if labels[row, t] != -100)
            for sample in probs
        ]
        assert found.sample_log_probs[row].tolist() == pytest.approx(each, rel=1e-4)
    for count in (1, 2, 3):  # the first samples' predictive is that of fewer samples
        fewer = score_targets(summarizer, inputs, labels, Sampling(count, seed=1))
        torch.testing.assert_close(found.prefix_log_probs[:, count - 1], fewer.log_probs.sum(1))


def test_antithetic_samples_come_in_pairs(classifier, summarizer):
    inputs, labels = {"input_ids": random_ids(5, 8)}, random_ids(3, 6)
    found = predict_classes(classifier, inputs, Sampling(4, 2, "antithetic")).sample_log_probs
    alone = predict_classes(classifier, inputs, Sampling(2, 2)).sample_log_probs
    torch.testing.assert_close(found[:, 0::2], alone)
    assert not torch.allclose(found[:, 1], found[:, 0])
    summaries = {"input_ids": random_ids(3, 8), "decoder_input_ids": labels}
    scores = score_targets(summarizer, summaries, labels, Sampling(3, 2, "antithetic")).sample_log_probs
    torch.testing.assert_close(
        scores[:, [0, 2]], score_targets(summarizer, summaries, labels, Sampling(2, 2)).sample_log_probs
    )


def test_log_mean_exp_does_not_underflow():
    values = torch.tensor([[-2000.0, -2000.0 + math.log(3)]])
    assert log_mean_exp(values, dim=1).item() == pytest.approx(-2000 + math.log(2), rel=1e-6)


def test_rows_are_repeated_in_blocks():
    repeated = repeat_rows({"x": torch.tensor([[1], [2]]), "flag": True}, 2)
    assert repeated["x"].flatten().tolist() == [1, 2, 1, 2] and repeated["flag"] is True
