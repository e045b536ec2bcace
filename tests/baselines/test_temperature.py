"""Temperature scaling against a grid and against cases with a known answer."""

import numpy as np
import pytest
from scipy.special import log_softmax

from blob_hf.baselines.temperature import fit_temperature, scale


def drawn(rows=20_000, temperature=1.0, seed=0):
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((rows, 3))
    probs = np.exp(log_softmax(logits / temperature, axis=-1))
    labels = (probs.cumsum(-1) < rng.random((rows, 1))).sum(-1)
    return log_softmax(logits, axis=-1), labels


def test_scaling_log_probabilities_is_scaling_logits():
    logits = np.random.default_rng(0).standard_normal((5, 4))
    np.testing.assert_allclose(scale(log_softmax(logits, -1), 2.5), log_softmax(logits / 2.5, -1), atol=1e-12)
    assert (scale(logits, 7.0).argmax(-1) == logits.argmax(-1)).all()


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    # the Fisher information of log T in 20,000 rows gives a std of about 1.5 %
    assert fit_temperature(*drawn(temperature=temperature)) == pytest.approx(temperature, rel=0.06)


def test_no_temperature_of_a_grid_is_better():
    log_probs, labels = drawn(rows=50, temperature=2.0)
    grid = np.geomspace(0.02, 50, 4001)
    nll = [-scale(log_probs, t)[range(50), labels].mean() for t in grid]
    assert fit_temperature(log_probs, labels) == pytest.approx(grid[int(np.argmin(nll))], rel=3e-3)


def test_rows_that_are_all_right_have_no_best_temperature_and_the_log_says_so(caplog):
    log_probs, _ = drawn(rows=30)
    assert fit_temperature(log_probs, log_probs.argmax(-1)) == pytest.approx(0.02, rel=1e-3)
    assert "all 30 held-out rows are right" in caplog.text
    caplog.clear()
    one_wrong = log_probs.argmax(-1)
    one_wrong[np.argmin(log_probs.max(-1))] = log_probs.argmin(-1)[np.argmin(log_probs.max(-1))]
    assert fit_temperature(log_probs, one_wrong) > 0.021
    assert not caplog.text
