import numpy as np
import pytest

from blob_hf.metrics.selective import prediction_rejection_ratio, risk_coverage
from blob_hf.utils.errors import BlobError


def test_curve_by_hand():
    curve = risk_coverage([0.3, 0.1, 0.2], [1.0, 0.0, 0.5])
    assert curve.coverage == pytest.approx([1 / 3, 2 / 3, 1]) and curve.risk == pytest.approx([0, 0.25, 0.5])
    assert curve.area == pytest.approx(0.25)


def test_ties_count_as_random_order():
    """The mean over all orders of the tied inputs."""
    rng = np.random.default_rng(0)
    uncertainty, risk = np.array([0, 0, 1, 1, 1, 2.0]), rng.random(6)
    areas = []
    for _ in range(4000):
        order = rng.permutation(6)
        order = order[np.argsort(uncertainty[order], kind="stable")]
        areas.append(np.mean(np.cumsum(risk[order]) / np.arange(1, 7)))
    # 4000 orders: the standard error of the mean is below 0.002
    assert risk_coverage(uncertainty, risk).area == pytest.approx(np.mean(areas), abs=0.008)


def test_ratio_is_1_for_the_oracle_0_for_random_and_negative_when_inverted():
    risk = np.random.default_rng(1).random(50)
    assert prediction_rejection_ratio(risk, risk) == pytest.approx(1)
    assert prediction_rejection_ratio(np.zeros(50), risk) == pytest.approx(0)  # all tied: random
    assert prediction_rejection_ratio(-risk, risk) < 0
    assert np.isnan(prediction_rejection_ratio([1, 2], [0.5, 0.5]))


@pytest.mark.parametrize(("uncertainty", "risk"), [([], []), ([1, 2], [1]), ([1, float("nan")], [1, 1])])
def test_bad_input(uncertainty, risk):
    with pytest.raises(BlobError):
        risk_coverage(uncertainty, risk)
