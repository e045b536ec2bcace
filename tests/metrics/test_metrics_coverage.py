"""Coverage and abstention counted row by row, and the interval of chance against draws."""

import numpy as np
import pytest

from blob_hf.metrics.coverage import class_decisions, coverage_interval, decision_metrics


def case(seed=0, rows=60, classes=3):
    rng = np.random.default_rng(seed)
    sets = rng.random((rows, classes)) < 0.5
    return sets, rng.random(rows) < 0.4, rng.integers(0, classes, rows), rng.integers(0, classes - 1, rows)


def counted(sets, abstain, predicted, labels):
    rows = list(zip(sets.tolist(), abstain.tolist(), predicted.tolist(), labels.tolist(), strict=True))
    answered = [row for row in rows if not row[1]]
    return {
        "coverage": sum(own[label] for own, _, _, label in rows) / len(rows),
        "set_size": sum(map(sum, (own for own, *_ in rows))) / len(rows),
        "empty_sets": sum(not any(own) for own, *_ in rows) / len(rows),
        "answered": len(answered) / len(rows),
        "answered_error": sum(one != label for _, _, one, label in answered) / len(answered),
    }


def test_metrics_are_what_one_counts():
    sets, abstain, predicted, labels = case()
    assert decision_metrics(sets, abstain, predicted, labels) == pytest.approx(
        counted(sets, abstain, predicted, labels)
    )
    without = decision_metrics(sets, abstain, predicted)
    assert set(without) == {"set_size", "empty_sets", "answered"}
    nothing = decision_metrics(sets, np.ones(60, dtype=bool), predicted, labels)
    assert nothing["answered"] == 0 and np.isnan(nothing["answered_error"])


def test_classes_are_counted_each_by_itself():
    sets, abstain, predicted, labels = case(1)
    table = class_decisions(sets, abstain, predicted, labels, ["a", "b", "none of it"])
    assert table.index.tolist() == ["a", "b"]  # nothing is of the third
    for index, name in enumerate("ab"):
        own = labels == index
        expected = counted(sets[own], abstain[own], predicted[own], labels[own])
        assert table.loc[name, "rows"] == own.sum()
        for column in ("coverage", "set_size", "answered", "answered_error"):
            assert table.loc[name, column] == pytest.approx(expected[column])


def test_chance_is_that_of_held_out_and_new_rows_together():
    """2,000 draws of 40 held-out and 200 new scores: 95 % of the coverages are inside, give or take 2.5 %."""
    rng = np.random.default_rng(0)
    scores = rng.random((2000, 240))
    quantile = np.sort(scores[:, :40], axis=1)[:, 36, None]  # ceil(41 * 0.9) = 37
    coverage = (scores[:, 40:] <= quantile).mean(axis=1)
    low, high = coverage_interval(200, 40, 0.1)
    assert ((low <= coverage) & (coverage <= high)).mean() == pytest.approx(0.95, abs=0.025)
    assert (coverage < low).mean() > 0.005 and (coverage > high).mean() > 0.005  # neither end is idle
