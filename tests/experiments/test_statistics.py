import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from blob_hf.experiments.statistics import (
    best_of,
    compare,
    critical_difference,
    decompose,
    holm,
    mean_interval,
    mean_ranks,
    paired_test,
    sizes_up_to,
)


def test_best_of_n_is_the_mean_over_all_subsets():
    scores = np.random.default_rng(0).random(7)
    for size in range(1, 8):
        expected = np.mean([max(subset) for subset in itertools.combinations(scores, size)])
        assert best_of(scores, size) == pytest.approx(expected)
    assert [sizes_up_to(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]


def test_comparison_is_the_paired_t_test_and_says_what_the_interval_says():
    rng = np.random.default_rng(1)
    first = rng.normal(size=80)
    second = first + rng.normal(0.5, 0.1, size=80)
    found = compare(first, second)
    assert found.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert found.difference.value == pytest.approx((first - second).mean()) and found.verdict == "lower"
    assert compare(second, first).verdict == "higher"
    same = compare(first, first)
    assert same.verdict == "not shown to differ" and np.isnan(same.p_value)
    # a 95 % bootstrap interval of a mean is close to the normal one: 1.96 standard errors
    interval, error = mean_interval(first), first.std(ddof=1) / 80**0.5
    assert interval.low == pytest.approx(first.mean() - 1.96 * error, abs=0.3 * error)
    assert interval.high == pytest.approx(first.mean() + 1.96 * error, abs=0.3 * error)


def simulated(weights, decoding, dialogues=400, samples=30, spread=0.5, seed=0):
    """Scores y = dialogue + weights + decoding with known, independent stds."""
    rng = np.random.default_rng(seed)
    rows = []
    level = rng.normal(0, spread, dialogues)
    arms = {"sample-greedy": (weights, 0), "mean-sampling": (0, decoding), "sample-sampling": (weights, decoding)}
    for arm, (w, t) in arms.items():
        noise = rng.normal(size=(dialogues, samples)) * w + rng.normal(size=(dialogues, samples)) * t
        rows += [
            {"arm": f"blob-{arm}", "dialogue": str(d), "score": level[d] + noise[d, s]}
            for d in range(dialogues)
            for s in range(samples)
        ]
    return pd.DataFrame(rows)


def test_decomposition_finds_the_variances_that_were_put_in():
    """400 x 30 draws: the relative standard error of a pooled variance is below 2 %, that of 400 dialogues 7 %."""
    found = decompose(simulated(weights=0.2, decoding=0.4), "score")
    assert found.loc["weights", "variance"] == pytest.approx(0.04, rel=0.06)
    assert found.loc["decoding", "variance"] == pytest.approx(0.16, rel=0.06)
    assert found.loc["both", "variance"] == pytest.approx(0.20, rel=0.06)
    assert found.loc["dialogues", "variance"] == pytest.approx(0.25, rel=0.25)
    assert found.loc["interaction", "low"] < 0 < found.loc["interaction", "high"]
    assert found.loc[["both", "dialogues"], "share"].sum() == pytest.approx(1)
    assert found.loc["weights", "low"] < 0.04 < found.loc["weights", "high"]


def test_dialogue_variance_is_not_inflated_by_few_samples():
    """Two samples a dialogue: the plain variance of the means would say 0.5 * 0.16 too much."""
    found = decompose(simulated(weights=0.0, decoding=0.4, samples=2, dialogues=2000, spread=0.2), "score")
    assert found.loc["dialogues", "variance"] == pytest.approx(0.04, rel=0.2)


def test_decomposition_needs_the_whole_cross():
    table = simulated(0.1, 0.1, dialogues=3, samples=2)
    assert decompose(table[table["arm"] != "blob-mean-sampling"], "score") is None


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_that_of_statsmodels(seed):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = np.random.default_rng(seed).random(9) ** 3
    expected = multitest.multipletests(p_values, method="holm")[1]
    np.testing.assert_allclose(holm(list(p_values)), expected, rtol=1e-12)
    assert holm([]) == [] and holm([0.02]) == [0.02]


@pytest.mark.parametrize(
    ("methods", "blocks", "q"), [(2, 10, 1.960), (5, 30, 2.728), (10, 8, 3.164)]
)  # q of Demsar (2006), table 5a
def test_the_critical_difference_is_nemenyis(methods, blocks, q):
    expected = q * np.sqrt(methods * (methods + 1) / (6 * blocks))
    assert critical_difference(methods, blocks) == pytest.approx(expected, rel=1e-3)


def test_mean_ranks_are_those_of_scipy():
    table = pd.DataFrame(np.random.default_rng(0).random((8, 4)), columns=list("abcd"))
    table.loc[0, "b"] = table.loc[0, "a"]  # a tie
    for more, sign in ((True, -1), (False, 1)):
        found = mean_ranks(table, more_is_better=more)
        expected = stats.rankdata(sign * table.to_numpy(), axis=1).mean(axis=0)
        assert list(found.ranks.values()) == pytest.approx(expected.tolist())
        assert found.p_value == pytest.approx(stats.friedmanchisquare(*table.to_numpy().T).pvalue)
        assert found.critical_difference == critical_difference(4, 8)


def test_a_paired_test_is_scipys():
    first, second = np.random.default_rng(3).random((2, 8))
    expected = stats.ttest_rel(first, second)
    found = paired_test(first, second)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.interval.low, found.interval.high) == pytest.approx(expected.confidence_interval(0.95))
    assert paired_test(first, first).p_value == 1.0
