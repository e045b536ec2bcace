import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import entropy

from blob_hf.metrics.detection import detection_metrics, detection_report, uncertainty_scores
from blob_hf.utils.errors import BlobError


def scores(seed=0, rounded=True):
    rng = np.random.default_rng(seed)
    inside, outside = rng.normal(size=60), rng.normal(1.0, size=45)
    return (inside.round(1), outside.round(1)) if rounded else (inside, outside)  # rounded: with ties


@pytest.mark.parametrize("rounded", [True, False])
def test_auroc_is_the_share_of_pairs_in_order(rounded):
    inside, outside = scores(rounded=rounded)
    wins = (outside[:, None] > inside[None]).mean() + 0.5 * (outside[:, None] == inside[None]).mean()
    assert detection_metrics(inside, outside)["auroc"] == pytest.approx(wins)


@pytest.mark.parametrize("rounded", [True, False])
def test_fpr95_and_aupr_by_walking_the_thresholds(rounded):
    inside, outside = scores(1, rounded)
    found = detection_metrics(inside, outside)
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    flagged = [((outside >= t).mean(), (inside >= t).mean()) for t in thresholds]
    assert found["fpr95"] == pytest.approx(min(false for true, false in flagged if true >= 0.95))
    area, before = 0.0, 0.0
    for threshold, (true, _) in zip(thresholds, flagged, strict=True):
        precision = (outside >= threshold).sum() / ((outside >= threshold).sum() + (inside >= threshold).sum())
        area, before = area + (true - before) * precision, true
    assert found["aupr"] == pytest.approx(area)


def test_perfect_useless_and_inverted_scores():
    low, high = np.zeros(20), np.ones(30)
    assert detection_metrics(low, high) == {"auroc": 1.0, "aupr": 1.0, "fpr95": 0.0}
    assert detection_metrics(high, low)["auroc"] == 0.0 and detection_metrics(high, low)["fpr95"] == 1.0
    same = detection_metrics(low, np.zeros(30))
    assert same["auroc"] == 0.5 and same["aupr"] == pytest.approx(0.6) and same["fpr95"] == 1.0


def test_fpr95_is_at_95_percent_and_at_no_other():
    """In alternating scores the flagged shares of both sets are equal at every threshold."""
    numbers = np.arange(100.0)
    assert detection_metrics(numbers + 0.5, numbers)["fpr95"] == pytest.approx(0.95)


def test_uncertainty_scores_of_samples_and_of_one_network():
    rng = np.random.default_rng(0)
    values = log_softmax(3 * rng.normal(size=(7, 5, 3)), axis=-1)
    mean = np.exp(values).mean(1)
    found = uncertainty_scores(values)
    np.testing.assert_allclose(found["entropy"], entropy(mean, axis=1))
    np.testing.assert_allclose(found["max_prob"], 1 - mean.max(1))
    np.testing.assert_allclose(
        found["mutual_information"], entropy(mean, axis=1) - entropy(np.exp(values), axis=2).mean(1)
    )
    assert set(uncertainty_scores(values[:, :1])) == {"entropy", "max_prob"}


def test_the_report_names_every_score_and_metric():
    rng = np.random.default_rng(0)
    inside, outside = (log_softmax(s * rng.normal(size=(30, 4, 3)), axis=-1) for s in (5, 1))
    found = detection_report(inside, outside, "mean_")
    assert len(found) == 9 and found["mean_entropy_auroc"] > 0.7
    expected = detection_metrics(uncertainty_scores(inside)["max_prob"], uncertainty_scores(outside)["max_prob"])
    assert found["mean_max_prob_fpr95"] == expected["fpr95"]


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [([], [1.0], "both sets"), ([1.0], [], "both sets"), ([1.0], [np.nan], "finite"), ([[1.0]], [1.0], "both sets")],
)
def test_bad_input(inside, outside, message):
    with pytest.raises(BlobError, match=message):
        detection_metrics(inside, outside)
