import evaluate
import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch.distributions import Categorical

from blob_hf.metrics import (
    Uncertainty,
    expected_entropy,
    mutual_information,
    predictive_entropy,
    predictive_log_probs,
    uncertainty,
    uncertainty_metrics,
)
from blob_hf.utils.errors import BlobError


@pytest.fixture
def samples():
    return log_softmax(2 * np.random.default_rng(0).normal(size=(20, 7, 4)), axis=-1)


def test_against_torch_distributions(samples):
    probs = torch.tensor(np.exp(samples))
    np.testing.assert_allclose(np.exp(predictive_log_probs(samples)), probs.mean(1))
    np.testing.assert_allclose(predictive_entropy(samples), Categorical(probs.mean(1)).entropy())
    np.testing.assert_allclose(expected_entropy(samples), Categorical(probs).entropy().mean(1))
    kl_to_mean = (probs * (probs.log() - probs.mean(1, keepdim=True).log())).sum(-1).mean(1)
    np.testing.assert_allclose(mutual_information(samples), kl_to_mean)  # the Jensen-Shannon form


def test_closed_forms():
    agree = np.log(np.full((1, 5, 4), 0.25))
    assert predictive_entropy(agree)[0] == pytest.approx(np.log(4))
    assert mutual_information(agree)[0] == pytest.approx(0, abs=1e-12)
    with np.errstate(divide="ignore"):
        disagree = np.log(np.array([[[1.0, 0.0], [0.0, 1.0]]]))
    assert mutual_information(disagree)[0] == pytest.approx(np.log(2))
    assert expected_entropy(disagree)[0] == 0


def test_one_sample_has_no_mutual_information(samples):
    assert np.abs(mutual_information(samples[:, :1])).max() < 1e-12


def test_is_an_evaluate_metric_without_network(samples):
    for metric in (Uncertainty(), evaluate.load(uncertainty.__file__)):
        assert metric.compute(predictions=samples.tolist()) == pytest.approx(uncertainty_metrics(samples))


def test_bad_input():
    with pytest.raises(BlobError, match=r"\(batch, samples, classes\), got shape \(3, 2\)"):
        mutual_information(np.zeros((3, 2)))
    with pytest.raises(BlobError, match="apply log_softmax"):
        predictive_entropy(np.ones((1, 2, 3)))
