"""Decisions with a guarantee: sets against MAPIE and p-values by hand, rates against what theory says of them."""

import importlib.util
import json
import logging
import math

import numpy as np
import pytest
import torch
from helpers.models import TARGETS, randomize_b, tiny_bert, tiny_tokenizer, words
from helpers.training import blob_bert
from scipy.stats import binom

from blob_hf import BlobConfig, BlobModel, Sampling, get_blob_model
from blob_hf.baselines.conformal import ClassThresholds, PredictionSets, conformal_sets
from blob_hf.baselines.conformal_fit import CONFIDENCES, STARTS, answering_threshold, fit_thresholds
from blob_hf.baselines.conformal_texts import TextAbstention, TextThreshold, fit_text_threshold
from blob_hf.baselines.fitted_rules import check_rows, fitted_to, least_rows, still_holds, warn_once
from blob_hf.baselines.laplace import LaplaceState
from blob_hf.baselines.temperature import Temperatures
from blob_hf.inference.answers import set_names
from blob_hf.utils.errors import BlobError

needs_mapie = pytest.mark.skipif(importlib.util.find_spec("mapie") is None, reason="MAPIE is not installed")


def drawn(rows, classes=4, seed=0):
    """Probabilities, and labels that follow others a little flatter: an overconfident classifier."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((rows, classes))
    true = np.exp(0.6 * logits)
    true /= true.sum(axis=1, keepdims=True)
    given = np.exp(logits)
    given /= given.sum(axis=1, keepdims=True)
    return given, (true.cumsum(axis=1) < rng.random((rows, 1))).sum(axis=1)


# ----- prediction sets ------------------------------------------------------------------------------------------


@needs_mapie
@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_sets_are_those_of_mapie(score, alpha):
    from mapie.classification import SplitConformalClassifier
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    features = rng.standard_normal((400, 3))
    labels = (features @ rng.standard_normal((3, 4)) + rng.gumbel(size=(400, 4))).argmax(axis=1)
    model = LogisticRegression().fit(features[:100], labels[:100])
    theirs = SplitConformalClassifier(model, confidence_level=1 - alpha, conformity_score=score, random_state=0)
    _, expected = theirs.conformalize(features[100:250], labels[100:250]).predict_set(features[250:])
    found = fit_thresholds(model.predict_proba(features[100:250]), labels[100:250], alpha, 0.1, score)
    ours = conformal_sets(model.predict_proba(features[250:]), found.quantile, score)
    np.testing.assert_array_equal(ours, expected[:, :, 0])
    assert 1 < ours.sum(axis=1).mean() < 4  # it is a case that tells sets apart


@needs_mapie
def test_a_class_is_in_the_set_where_its_conformal_p_value_is_above_alpha():
    (given, labels), (new, _) = drawn(37), drawn(50, seed=1)
    known = 1 - given[range(37), labels]
    for alpha in (0.05, 0.1, 0.25, 0.5):
        ours = conformal_sets(new, fit_thresholds(given, labels, alpha, 0.1).quantile, "lac")
        for row, of_row in zip(ours, new, strict=True):
            p_values = [(1 + (known >= 1 - p).sum()) / 38 for p in of_row]
            assert row.tolist() == [p > alpha for p in p_values]


@needs_mapie
def test_coverage_of_exchangeable_rows_is_that_of_its_beta_binomial():
    """Of one draw of 60 held-out and 40 new rows the covered are BetaBinomial(40, k, 61 - k), k = ceil(61 * 0.9)."""
    alpha, rows, new, repeats = 0.1, 60, 40, 250
    rank = math.ceil((rows + 1) * (1 - alpha))
    a, b = rank, rows + 1 - rank
    counts = []
    for seed in range(repeats):
        given, labels = drawn(rows + new, seed=seed)
        found = fit_thresholds(given[:rows], labels[:rows], alpha, 0.1)
        sets = conformal_sets(given[rows:], found.quantile, "lac")
        counts.append(sets[range(new), labels[rows:]].sum())
    mean = new * a / (a + b)
    std = math.sqrt(new * a * b * (a + b + new) / ((a + b) ** 2 * (a + b + 1)))
    # the mean of 250 draws has a std of std / sqrt(250), about 0.2 rows; four of them are passed once in 16,000 seeds
    assert np.mean(counts) == pytest.approx(mean, abs=4 * std / math.sqrt(repeats))
    assert np.std(counts) == pytest.approx(std, rel=0.25)  # of 250 skewed draws: some 6 % to either side
    assert mean > (1 - alpha) * new


@needs_mapie
def test_sets_of_aps_have_a_class_and_cover_at_least_as_often():
    given, labels = drawn(4000, seed=3)
    found = fit_thresholds(given[:2000], labels[:2000], 0.2, 0.1, "aps")
    sets = conformal_sets(given[2000:], found.quantile, "aps")
    assert sets.any(axis=1).all()
    assert sets[np.arange(2000), given[2000:].argmax(axis=1)].all()
    assert sets[range(2000), labels[2000:]].mean() > 0.8


def test_a_set_of_aps_has_every_class_that_some_u_would_have_put_into_it():
    given, _ = drawn(200, seed=4)
    expected = np.zeros(given.shape, dtype=bool)
    for row, of_row in zip(expected, given, strict=True):
        for label, p in enumerate(of_row):
            down_to_it = of_row[of_row >= p].sum()
            row[label] = any(down_to_it - u * p <= 0.7 for u in (0.0, 0.5, 0.999, 1 - 1e-9))
    np.testing.assert_array_equal(conformal_sets(given, 0.7, "aps"), expected)


def test_a_choice_that_a_question_does_not_have_is_in_no_set():
    probabilities = np.array([[0.7, 0.3, 0.0], [0.2, 0.3, 0.5]])
    for score in ("lac", "aps"):
        assert conformal_sets(probabilities, 1.0, score).tolist() == [[True, True, False], [True, True, True]]
    assert set_names(conformal_sets(probabilities, 0.6, "lac"), probabilities, ["a", "b", "c"]) == [["a"], ["c"]]


@needs_mapie
def test_as_few_rows_as_can_promise_anything():
    assert [least_rows(alpha) for alpha in (0.5, 0.3, 0.1, 0.07, 0.05, 0.01)] == [1, 3, 9, 14, 19, 99]
    given, labels = drawn(9)
    found = fit_thresholds(given, labels, 0.1, 0.1)  # ceil(10 * 0.9) = 9: the largest of the nine scores
    assert found.quantile == (1 - given[range(9), labels]).max() and found.confidence is None
    with pytest.raises(BlobError, match=r"conformal_alpha 0.1 needs at least 9 held-out rows .* got 8: hold out more"):
        fit_thresholds(given[:8], labels[:8], 0.1, 0.1)
    for alpha in (0.5, 0.3, 0.1, 0.07, 0.05):  # one row fewer, and the rank would be beyond the last row
        assert math.ceil(round(least_rows(alpha) * (1 - alpha), 9)) > least_rows(alpha) - 1
        check_rows(least_rows(alpha), alpha)


@needs_mapie
def test_what_cannot_be_fitted_is_one_line(monkeypatch):
    given, labels = drawn(30)
    for changes, message in (
        ({"alpha": 0.0}, "alpha must be > 0 and < 1, got 0"),
        ({"alpha": 1.0}, "alpha must be > 0 and < 1, got 1"),
        ({"delta": float("nan")}, "delta must be > 0 and < 1, got nan"),
        (
            {"probabilities": given[:, :1]},
            r"of two or more classes, got probabilities of shape \(30, 1\) \(a regression",
        ),
        ({"labels": labels[:7]}, "need a label for each row, got 7 for 30"),
    ):
        with pytest.raises(BlobError, match=message):
            fit_thresholds(**{"probabilities": given, "labels": labels, "alpha": 0.1, "delta": 0.1, **changes})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BlobError, match=r"need MAPIE to be fitted: pip install 'blob_hf\[conformal\]'"):
        fit_thresholds(given, labels, 0.1, 0.1)


# ----- answering ------------------------------------------------------------------------------------------------


def confident(rows, seed):
    """Confidences from 1/2 to 1, and errors of rate 1 - confidence: above t the error rate is (1 - t) / 2."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.5, 1, rows)
    return confidence, rng.random(rows) > confidence


@needs_mapie
def test_the_error_rate_of_what_is_answered_is_controlled():
    alpha, delta, repeats = 0.1, 0.2, 300
    found = [answering_threshold(*confident(1000, seed), alpha, delta) for seed in range(repeats)]
    broken = sum(threshold is not None and (1 - threshold) / 2 > alpha for threshold in found)
    # allowed is a probability of delta; its binomial 99.9 % point over the seeds is what 300 draws may show
    assert broken <= binom.ppf(0.999, repeats, delta)
    assert sum(threshold is not None for threshold in found) > repeats / 2  # and it does answer


@needs_mapie
def test_many_rows_find_nearly_the_best_threshold():
    threshold = answering_threshold(*confident(20_000, seed=0), 0.1, 0.1)
    best = CONFIDENCES[CONFIDENCES >= 0.8].min()  # (1 - 0.8) / 2 = alpha
    assert best <= threshold <= 0.85


@needs_mapie
def test_the_threshold_is_that_of_tests_by_hand():
    for seed in range(5):
        confidence, wrong = confident(300, seed)
        p_values = []
        for level in CONFIDENCES:
            kept = [bool(error) for sure, error in zip(confidence, wrong, strict=True) if sure >= level]
            p_values.append(
                sum(math.comb(len(kept), k) * 0.1**k * 0.9 ** (len(kept) - k) for k in range(sum(kept) + 1))
            )
        valid, size = set(), len(CONFIDENCES) // STARTS
        for start in range(0, STARTS * size, size):  # each goes on until its first test that does not reject
            index = start
            while index < len(p_values) and p_values[index] <= 0.1 / STARTS:
                valid.add(index)
                index += 1
        expected = float(CONFIDENCES[max(valid)]) if valid else None
        assert answering_threshold(confidence, wrong, 0.1, 0.1) == expected


# ----- texts ----------------------------------------------------------------------------------------------------


def test_the_threshold_of_texts_is_the_largest_that_risk_control_allows():
    rng = np.random.default_rng(0)
    for rows, alpha in ((9, 0.1), (40, 0.1), (40, 0.25), (100, 0.5), (100, 0.02)):
        scores = rng.integers(0, 12, rows) / 4.0  # with ties
        bad = rng.random(rows) < 0.4
        found = fit_text_threshold(scores, bad, alpha).below
        below = math.inf if found is None else found

        def bound(t, scores=scores, bad=bad, rows=rows):
            return ((bad & (scores < t)).sum() + 1) / (rows + 1)

        allowed = [t for t in [*np.unique(scores), math.inf] if bound(t) <= alpha + 1e-12]
        assert below == (max(allowed) if allowed else None)


def test_the_risk_of_new_texts_is_at_most_alpha_and_near_it():
    alpha, rows, repeats = 0.1, 39, 400
    risks = []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        scores = rng.random(rows + 50)
        bad = rng.random(rows + 50) < scores  # the less certain, the worse
        below = fit_text_threshold(scores[:rows], bad[:rows], alpha).below
        given = scores[rows:] < (math.inf if below is None else below)
        risks.append((bad[rows:] & given).mean())
    # E = floor(alpha (n + 1)) / (n + 1) = 0.1 exactly for scores without ties (Beta); the std of a draw is about 0.063
    assert np.mean(risks) == pytest.approx(alpha, abs=4 * np.std(risks) / math.sqrt(repeats))


def test_texts_that_are_never_bad_are_all_given():
    assert fit_text_threshold(np.arange(20.0), np.zeros(20, dtype=bool), 0.1).below is None
    with pytest.raises(BlobError, match="at least 9 held-out rows"):
        fit_text_threshold(np.arange(8.0), np.zeros(8, dtype=bool), 0.1)
    with pytest.raises(BlobError, match="must be finite"):
        fit_text_threshold(np.full(20, np.nan), np.zeros(20, dtype=bool), 0.1)


# ----- with an adapter ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    model = get_blob_model(
        type(base).from_pretrained(tmp_path / "base"), BlobConfig(target_modules=TARGETS["bert"], init_eps=0.9)
    )
    randomize_b(model)
    facts = fitted_to(model, Sampling(4, seed=2))
    rule = PredictionSets(
        0.1, 0.1, "lac", 50, ClassThresholds(0.66, None), ClassThresholds(0.665, 0.37), json.loads(json.dumps(facts))
    )
    model.set_companion(rule)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_keeps_its_decisions_and_predict_makes_them(folder, caplog):
    model, texts = BlobModel.from_pretrained(folder), words(9)
    found = model.predict(texts, sampling=Sampling(4, seed=2))
    np.testing.assert_array_equal(found.decisions.sets, found.probabilities >= 1 - 0.665)
    np.testing.assert_array_equal(found.decisions.abstain, found.confidence < 0.37)
    assert 0 < found.decisions.abstain.sum() < 9
    for record, own, p in zip(found.records(), found.decisions.sets, found.probabilities, strict=True):
        likeliest = sorted((index for index in range(3) if own[index]), key=lambda index: -p[index])
        assert record["prediction_set"] == [found.class_names[index] for index in likeliest]
    assert [row["abstain"] for row in found.records()] == found.decisions.abstain.tolist()
    assert not caplog.records
    mean = model.predict(texts, sampling=0)  # thresholds of its own, and no samples that could be others
    np.testing.assert_array_equal(mean.decisions.sets, mean.probabilities >= 1 - 0.66)
    assert mean.decisions.abstain.all() and not caplog.records


def test_other_samples_are_warned_of_once_and_another_temperature_is_refused(folder, caplog):
    warn_once.cache_clear()
    model = BlobModel.from_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        assert model.predict(words(2), sampling=Sampling(3, seed=2)).decisions is not None
        model.predict(words(2), sampling=Sampling(3, seed=2))
    assert [record.getMessage() for record in caplog.records] == [
        "the adapter's decisions were fitted with num_samples 4; with num_samples 3 their guarantee does not hold"
    ]
    model.set_companion(Temperatures(1.5, 1.2))
    with pytest.raises(BlobError, match="fitted with temperatures None, but it has .*1.5, 1.2.* now: fit them again"):
        model.predict(words(2), sampling=Sampling(4, seed=2))


@pytest.mark.parametrize(
    "change",
    [
        {"score": "raps"},
        {"alpha": 2},
        {"mean": None},
        {"predictive": {"quantile": "x", "confidence": 0.5}},
        {"rest": 1},
        {"fitted_to": {"num_samples": "four", "seed": 0}},
        {"fitted_to": {"num_samples": 4, "seed": 0, "draw": "sobol"}},
        {"fitted_to": {"num_samples": 4, "seed": 0, "tolerance": [1]}},
    ],
)
def test_a_damaged_file_is_one_line(folder, change):
    file = folder / "conformal.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(BlobError, match="conformal.json is damaged|must be one of lac, aps|alpha must be > 0 and < 1"):
        BlobModel.from_pretrained(folder)
    file.write_text("[]")
    with pytest.raises(BlobError, match="conformal.json is damaged"):
        BlobModel.from_pretrained(folder)


def test_abstention_of_texts_is_kept_and_checked(tmp_path):
    facts = {**fitted_to_point(), "decoding": "predictive", "prompt": None, "num_beams": 1, "max_new_tokens": 5}
    rule = TextAbstention(0.1, 0.8, "token_entropy", 30, TextThreshold(1.5), TextThreshold(None), facts)
    model = get_blob_model(tiny_bert(), BlobConfig(target_modules=TARGETS["bert"]))
    scores = {"token_entropy": np.array([1.4, 1.5, 1.6])}  # below the threshold is given, at it is not
    decoding = {name: facts[name] for name in ("decoding", "prompt", "num_beams", "max_new_tokens")}
    assert rule.abstains(model, scores, Sampling(0), decoding).tolist() == [False, True, True]
    assert not rule.abstains(model, scores, Sampling(4), decoding).any()
    rule.save(None, tmp_path)
    assert TextAbstention.load(tmp_path) == rule
    file = tmp_path / "conformal_texts.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mean": {"below": "x"}}))
    with pytest.raises(BlobError, match="conformal_texts.json is damaged"):
        TextAbstention.load(tmp_path)


def fitted_to_point():
    names = ("num_samples", "seed", "draw", "layers", "tolerance", "temperatures", "posterior_scale")
    return {name: 0 if name in ("num_samples", "seed") else None for name in names}


def test_the_way_in_which_laplace_predicts_is_a_part_of_what_a_rule_was_fitted_to(caplog):
    model = blob_bert()
    facts = {}
    for way in ("sampled", "linearized"):
        model.set_companion(LaplaceState(predictive=way))
        facts[way] = fitted_to(model, Sampling(4))
    warn_once.cache_clear()
    still_holds(facts["sampled"], facts["sampled"])
    assert not caplog.text
    still_holds(facts["sampled"], facts["linearized"])
    assert "fitted with predictive 'sampled'; with predictive 'linearized' their guarantee does not hold" in caplog.text
