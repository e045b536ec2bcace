"""Acquisition functions against mutual information by hand, all joint outcomes, and a query known to be best."""

import itertools

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from blob_hf.metrics import acquisition
from blob_hf.metrics.acquisition import acquire, batch_bald, joint_information, scores
from blob_hf.utils.errors import BlobError


def pool(inputs, samples, classes, seed=0, scale=2.0):
    return softmax(scale * np.random.default_rng(seed).normal(size=(inputs, samples, classes)), axis=-1)


def joint_by_hand(probabilities):
    """I(y_1, ..., y_n; A) = sum over (network, outcome) of p log p / (p p), one by one."""
    rows, samples, classes = probabilities.shape
    total = 0.0
    for outcome in itertools.product(range(classes), repeat=rows):
        of_network = [np.prod([probabilities[i, s, y] for i, y in enumerate(outcome)]) for s in range(samples)]
        marginal = sum(of_network) / samples
        total += sum(p / samples * np.log(p / marginal) for p in of_network if p > 0)
    return total


def greedy_by_hand(probabilities, count):
    chosen = []
    for _ in range(count):
        rest = [row for row in range(len(probabilities)) if row not in chosen]
        chosen.append(max(rest, key=lambda row: joint_by_hand(probabilities[[*chosen, row]])))
    return chosen


def test_bald_is_the_mutual_information_of_label_and_network():
    probabilities = pool(6, 4, 3)
    np.testing.assert_allclose(scores(probabilities, "bald"), [joint_by_hand(row[None]) for row in probabilities])
    np.testing.assert_allclose(scores(probabilities, "entropy"), entropy(probabilities.mean(1), axis=-1))
    by_hand = np.log(2) - entropy([0.9, 0.1])  # two networks that are 0.9 sure of opposite labels
    assert scores([[[0.9, 0.1], [0.1, 0.9]]], "bald") == pytest.approx(by_hand)


@pytest.mark.parametrize("shape", [(4, 3, 2), (3, 5, 4), (1, 2, 3)])
def test_the_joint_information_is_that_of_all_outcomes(shape):
    probabilities = pool(*shape)
    assert joint_information(probabilities) == pytest.approx(joint_by_hand(probabilities), rel=1e-9)


def test_the_joint_information_of_drawn_outcomes_is_unbiased():
    probabilities = pool(4, 4, 3)
    exact = joint_by_hand(probabilities)
    found = [joint_information(probabilities, outcomes=20, seed=seed) for seed in range(150)]
    error = np.std(found) / np.sqrt(len(found))
    assert 0 < error < 0.02 * exact and abs(np.mean(found) - exact) < 4 * error


@pytest.mark.parametrize("seed", range(2))
def test_the_greedy_choice_is_that_of_all_rows_weighed_at_every_step(monkeypatch, seed):
    monkeypatch.setattr(acquisition, "_AT_ONCE", 1)  # rows one by one: most need not be weighed again
    probabilities = pool(8, 4, 3, seed)
    found = batch_bald(probabilities, 4)
    assert found.rows.tolist() == greedy_by_hand(probabilities, 4)
    sums = [joint_by_hand(probabilities[found.rows[:k]]) for k in range(1, 5)]
    np.testing.assert_allclose(found.scores.cumsum(), sums, rtol=1e-9)


def test_rows_that_cannot_be_the_best_are_not_weighed_again(monkeypatch):
    monkeypatch.setattr(acquisition, "_AT_ONCE", 1)
    probabilities = pool(200, 6, 2)
    probabilities[20:] = 0.98 * probabilities[20:, :1] + 0.02 * probabilities[20:]  # of which the networks know all
    weighed = []
    gains = acquisition._Outcomes.gains
    monkeypatch.setattr(
        acquisition._Outcomes, "gains", lambda self, rows: weighed.append(len(rows)) or gains(self, rows)
    )
    batch_bald(probabilities, 5)
    assert sum(weighed) < 5 * 20


def test_bald_takes_duplicates_and_batchbald_does_not():
    sure, other = [[0.99, 0.01], [0.99, 0.01], [0.01, 0.99], [0.01, 0.99]], [[0.9, 0.1], [0.1, 0.9]] * 2
    flat = [[0.5, 0.5]] * 4
    probabilities = np.array([flat, sure, other, sure])
    assert acquire(probabilities, 2, "bald").rows.tolist() == [1, 3]
    together = acquire(probabilities, 2, "batchbald")
    assert together.rows.tolist() == [1, 2]
    # the second label of equal rows would tell what is left of the noise of the first; that of the other is independent
    assert together.scores[1] == pytest.approx(joint_by_hand(probabilities[[1, 2]]) - joint_by_hand(probabilities[[1]]))
    assert together.scores[1] == pytest.approx(scores(probabilities, "bald")[2])


def test_of_noise_entropy_takes_the_coin_and_bald_what_networks_differ_about():
    """A threshold between 0 and 1 is learned; labels above 2 are coins. The query known to be best is the middle."""
    thresholds, inputs = np.linspace(0.05, 0.95, 10), np.array([0.1, 0.3, 0.5, 0.7, 2.5])
    above = np.where(inputs[:, None] > 2, 0.5, np.where(inputs[:, None] > thresholds, 1.0, 0.0))
    probabilities = np.stack([above, 1 - above], axis=-1)
    assert acquire(probabilities, 1, "bald").rows.tolist() == [2]
    assert acquire(probabilities, 1, "bald").scores == pytest.approx(np.log(2))  # bisection: one bit
    assert set(acquire(probabilities, 2, "entropy").rows) == {2, 4}
    # three questions, none of them the coin: after the middle, those that halve what it leaves
    assert set(acquire(probabilities, 3, "batchbald").rows) == {1, 2, 3}
    # all that ten networks can be told apart by these questions: 1, 2, 2, 2 and 3 of them are alike
    shares = np.array([1, 2, 2, 2, 3]) / 10
    assert joint_information(probabilities) == pytest.approx(entropy(shares))


def test_many_rows_of_many_classes_stay_below_what_the_networks_can_tell(monkeypatch):
    monkeypatch.setattr(acquisition, "TOLD", 9.0)
    probabilities = pool(50, 8, 20, scale=3.0)
    found = acquire(probabilities, 30, "batchbald", outcomes=64)
    assert len(set(found.rows.tolist())) == found.jointly == 30 and (found.scores >= 0).all()
    assert np.log(8) * 0.99 < found.scores.sum() <= np.log(8) * 1.05
    again = acquire(probabilities, 30, "batchbald", outcomes=64)
    assert found.rows.tolist() == again.rows.tolist()


@pytest.mark.parametrize("leading", [1, 50])
def test_when_the_networks_are_told_apart_rows_are_weighed_against_each_chosen_one(monkeypatch, leading):
    monkeypatch.setattr(acquisition, "_LEADING", leading)
    probabilities = pool(14, 3, 4)
    found = batch_bald(probabilities, 9)
    told = found.scores.cumsum()
    assert 0 < found.jointly < 8
    assert told[found.jointly - 2] < 0.9 * np.log(3) <= told[found.jointly - 1]

    def least(row, chosen):
        return min(joint_by_hand(probabilities[[row, j]]) - joint_by_hand(probabilities[[j]]) for j in chosen)

    for place in range(found.jointly, 9):
        before = found.rows[:place].tolist()
        by_hand = {row: least(row, before) for row in range(14) if row not in before}
        assert found.rows[place] == max(by_hand, key=by_hand.get)
        assert found.scores[place] == pytest.approx(max(by_hand.values()))


def test_also_then_duplicates_are_left(monkeypatch):
    one = np.eye(3)[np.random.default_rng(0).integers(0, 3, (8, 6))] * 0.97 + 0.01  # of surely differing networks
    found = batch_bald(np.concatenate([one, one]), 8)
    assert found.jointly < 6 and sorted(row % 8 for row in found.rows.tolist()) == list(range(8))


def test_random_rows_are_different_and_named_by_the_seed():
    probabilities = pool(9, 1, 2)
    found = [acquire(probabilities, 9, "random", seed).rows.tolist() for seed in (0, 0, 1)]
    assert sorted(found[0]) == list(range(9)) and found[0] == found[1] != found[2]
    assert np.isnan(acquire(probabilities, 2, "random").scores).all()


def test_mistakes_are_said():
    probabilities = pool(5, 3, 2)
    for arguments, message in (
        ((probabilities, 6), "from 1 to the 5 rows"),
        ((probabilities, 0), "from 1 to the 5 rows"),
        ((probabilities, 2, "variance"), "ordered by entropy or bald, got 'variance'"),
        ((probabilities[:, :1], 2), "a single network has no mutual information; take entropy"),
        ((probabilities[:, :1], 2, "batchbald"), "a single network"),
        ((probabilities[0], 2), r"got shape \(3, 2\)"),
        ((2 * probabilities, 2), "a sum of 1"),
        ((3 * probabilities - 1, 2), "at least 0"),
        ((probabilities[:0], 1), "expected sample probabilities"),
        ((probabilities, 2, "batchbald", 0, 2), "at least the number of networks, 3"),
    ):
        with pytest.raises(BlobError, match=message):
            acquire(*arguments)
    assert acquire(probabilities[:, :1], 2, "entropy").rows.shape == (2,)
