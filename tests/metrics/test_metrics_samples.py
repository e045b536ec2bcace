from itertools import combinations

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.metrics import log_loss

from blob_hf.metrics.samples import NLLCurve, nll_curve
from blob_hf.utils.errors import BlobError


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return log_softmax(2 * rng.normal(size=(40, 6, 3)), axis=-1), rng.integers(0, 3, 40)


def predictive_nll(values, labels, chosen):
    return log_loss(labels, np.exp(values[:, list(chosen)]).mean(1), labels=[0, 1, 2])


def test_one_sample_all_samples_and_the_average_over_choices(data):
    curve = nll_curve(*data)
    assert curve.samples.tolist() == [1, 2, 3, 4, 5, 6]
    assert curve.nll[-1] == pytest.approx(predictive_nll(*data, range(6))) and curve.spread[-1] == 0
    for size in (1, 2, 3):
        every = [predictive_nll(*data, chosen) for chosen in combinations(range(6), size)]
        # 100 choices of a few: the mean of theirs is within five standard errors of that over all
        assert curve.nll[size - 1] == pytest.approx(np.mean(every), abs=5 * np.std(every) / 10)
    assert (np.diff(curve.nll) < 0).all()  # Jensen: averaging more never hurts on average


def test_antithetic_pairs_stay_together(data):
    curve = nll_curve(*data, antithetic=True)
    assert curve.samples.tolist() == [2, 4, 6]
    assert curve.nll[-1] == pytest.approx(predictive_nll(*data, range(6)))
    every = [predictive_nll(*data, pair) for pair in ((0, 1), (2, 3), (4, 5))]
    assert curve.nll[0] == pytest.approx(np.mean(every), abs=5 * np.std(every) / 10)
    assert not np.isclose(curve.nll[0], nll_curve(*data).nll[1], atol=1e-4)


def test_enough_is_where_the_curve_stays_within_a_percent():
    def curve(*nll):
        return NLLCurve(np.arange(1, len(nll) + 1), np.array(nll), np.zeros(len(nll)))

    assert curve(1.2, 1.009, 1.0).enough == 2
    assert curve(1.0, 1.2, 1.0).enough == 3
    assert curve(1.0, 1.0).enough == 1
    assert curve(1.011, 1.0).enough == 2


def test_bad_input(data):
    for values, labels in ((data[0][:, 0], data[1]), (data[0], data[1][:5]), (data[0][:0], data[1][:0])):
        with pytest.raises(BlobError, match="expected"):
            nll_curve(values, labels)
