"""Decisions that were fitted to an adapter, as the page shows them: `model.predict`'s, and whether they promise."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.models import words
from helpers.pages import PROMPT, fit_sets, save_classifier, save_summarizer
from transformers import GenerationConfig

from blob_hf import BlobModel, Sampling
from blob_hf.app.class_markup import classes_html, decision_html
from blob_hf.app.class_view import class_view, decide, fitted_decisions
from blob_hf.app.engine import Engine, Writing
from blob_hf.app.text_markup import text_html
from blob_hf.app.text_view import fitted_abstention, text_view
from blob_hf.baselines.conformal_texts import TextAbstention, TextThreshold
from blob_hf.baselines.fitted_rules import differences, fitted_to
from blob_hf.inference.predictor import how_written
from blob_hf.metrics.similarity import rouge_utility
from blob_hf.utils.errors import BlobError

DIALOGUE = "#Person1#: Can I borrow the tent?\n#Person2#: Yes. Please return it on Monday."


def shown(html):
    return html.replace("\N{NO-BREAK SPACE}", " ")


def seen(engine, answer, count):
    """The view of an answer, and it as HTML: decision, classes."""
    fitted = fitted_decisions(answer.prediction, engine.rule, answer.promise, count > 0)
    view = class_view(answer.prediction, answer.mean, count, fitted=fitted)
    return view, shown(decision_html(decide(view.entropy, 0.5, None), view)), shown(classes_html(view))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = save_classifier(tmp_path_factory.mktemp("classifier"))
    fit_sets(folder, Sampling(4, seed=2), quantile=0.665, confidence=0.37)
    return folder


@pytest.fixture(scope="module")
def engine(classifier):
    return Engine(classifier)


@pytest.fixture(scope="module")
def model(classifier):
    return BlobModel.from_pretrained(classifier).eval()


@pytest.fixture
def other(classifier, tmp_path):
    """The same adapter in another folder, to be fitted otherwise."""
    return Path(shutil.copytree(classifier, tmp_path / "adapter"))


def test_sets_and_abstention_are_those_of_predict(engine, model):
    abstained = set()
    for text in words(9):
        expected = model.predict([text], sampling=Sampling(4, seed=2))
        answer = engine.classify((text,), 4, 2)
        view, decision, classes = seen(engine, answer, 4)
        probable = {name for name, p in zip(expected.class_names, expected.probabilities[0], strict=True) if p >= 0.335}
        assert view.fitted.prediction_set == tuple(expected.prediction_sets[0]) and view.fitted.made
        assert {row.name for row in view.rows if row.in_set} == set(view.fitted.prediction_set) == probable
        assert view.fitted.abstains == (expected.confidence[0] < 0.37) == bool(expected.decisions.abstain[0])
        abstained.add(view.fitted.abstains)
        assert answer.promise.holds and "50 held-out rows, with 4 samples of seed 2: the truth" in decision
        assert "at least 90 %" in decision and "at most 10 % are answered wrongly" in decision
        assert ("Ask a person" in decision) == view.fitted.abstains != ("Answer:" in decision)
        assert classes.count("in the set") == len(probable) and all(f">{name}</b>" in decision for name in probable)
    assert abstained == {True, False}


def test_of_other_samples_nothing_is_promised(engine, model):
    (text,) = words(1)
    other = engine.classify((text,), 3, 5)
    view, decision, _ = seen(engine, other, 3)
    assert not other.promise.holds
    said = "The rule was fitted with N=4, seed 2. With N=3, seed 5 its guarantee does not hold."
    assert other.promise.said == said and said in decision and "90 %" not in decision
    assert "blob-busy" in decision
    assert view.fitted.prediction_set == tuple(model.predict([text], sampling=Sampling(3, seed=5)).prediction_sets[0])
    mean = engine.classify((text,), 0, 7)  # it has thresholds of its own, and no samples that could be others
    view, decision, _ = seen(engine, mean, 0)
    assert mean.promise.holds and "blob-busy" not in decision and "with the posterior mean: the truth" in decision
    assert view.fitted.abstains and "nothing is answered" in decision
    np.testing.assert_array_equal(mean.prediction.decisions.sets, mean.prediction.probabilities >= 1 - 0.66)


def test_samples_are_drawn_as_the_rule_was_fitted_to(other, model):
    fit_sets(other, Sampling(4, draw="antithetic"))
    answer = Engine(other).classify(tuple(words(1)), 4, 0)
    expected = model.predict(words(1), sampling=Sampling(4, draw="antithetic"))
    np.testing.assert_array_equal(answer.prediction.sample_probabilities, expected.sample_probabilities)
    assert answer.promise.holds


def test_as_many_samples_are_drawn_as_the_rule_was_fitted_to_need(other, model):
    as_needed = Sampling.auto(0.3, 8)
    fit_sets(other, as_needed)
    engine = Engine(other)
    taken = set()
    for text in words(4):
        expected = model.predict([text], sampling=as_needed)
        answer = engine.classify((text,), 8, 0)
        np.testing.assert_array_equal(answer.prediction.probabilities, expected.probabilities)
        view, decision, _ = seen(engine, answer, 8)
        count = int(expected.networks[0])
        taken.add(count)
        assert view.num_samples == len(view.rows[0].samples) == count
        assert np.mean(view.rows[0].samples) == pytest.approx(view.rows[0].probability, rel=1e-5)
        assert answer.promise.holds and "with at most 8 samples of seed 0: the truth" in decision
    assert min(taken) < 8


def test_a_rule_of_the_posterior_mean_alone_says_nothing_of_samples(other):
    fit_sets(other, Sampling(0))
    engine = Engine(other)
    answer = engine.classify(tuple(words(1)), 3)
    view, decision, classes = seen(engine, answer, 3)
    assert not view.fitted.made and "in the set" not in classes and "One of these" not in decision
    assert "fitted with N=0. With N=3 its guarantee does not hold" in decision


def test_without_a_file_nothing_is_new(other):
    (other / "conformal.json").unlink()
    engine = Engine(other)
    answer = engine.classify(tuple(words(1)), 3)
    view, decision, classes = seen(engine, answer, 3)
    assert engine.rule is None and answer.promise is None and view.fitted is None
    assert "fitted to this adapter" not in decision and "in the set" not in classes


@pytest.mark.slow
def test_a_summary_is_withheld_as_predict_says(tmp_path):
    folder = save_summarizer(tmp_path)
    (folder / "run_settings.json").unlink()  # as in a repo of the Hub: the prompt is that which was fitted with
    model = BlobModel.from_pretrained(folder).eval()
    texts = [DIALOGUE, "#Person1#: Hello."]
    own = {"prompt": PROMPT, "max_new_tokens": 6, "num_beams": 2, "length_penalty": 0.3}
    entropies = model.predict(texts, sampling=Sampling(3, seed=1), **own).entropy
    limit = float(entropies.mean())
    facts = {**fitted_to(model, Sampling(3, seed=1)), "decoding": "predictive", **own}
    rule = TextAbstention(0.2, 0.8, "token_entropy", 40, TextThreshold(None), TextThreshold(limit), facts)
    rule.save(model, folder)
    model, engine = BlobModel.from_pretrained(folder).eval(), Engine(folder)
    found = []
    for text in texts:
        expected = model.predict([text], sampling=Sampling(3, seed=1), **own)
        answer = engine.write(text, Writing(3, 1, max_new_tokens=6))
        fitted = fitted_abstention(answer.prediction, engine.rule, answer.promise, sampled=True)
        html = shown(text_html(text_view(answer.prediction, engine.tokenizer, fitted), "A text", sampled=True))
        assert answer.prediction.texts == expected.texts and answer.promise.holds
        assert fitted.abstains == bool(expected.abstain[0]) == (expected.entropy[0] >= limit)
        assert ("Abstain: " in html) == fitted.abstains != ("Give the text" in html)
        assert "at most 20 % a text is given and is bad, which is a ROUGE-L below 0.2" in html
        assert f"{expected.entropy[0]:.3f} nats, texts are given below {limit:.3f}" in html
        found.append(fitted.abstains)
    assert sorted(found) == [False, True]
    other = engine.write(DIALOGUE, Writing(2, 1, max_new_tokens=5))
    said = (
        "The rule was fitted with N=3, a longest answer of 6 tokens. With N=2, a longest answer of 5 tokens its "
        "guarantee does not hold."
    )
    assert other.promise.said == said
    fitted = fitted_abstention(other.prediction, engine.rule, other.promise, sampled=True)
    html = text_html(text_view(other.prediction, engine.tokenizer, fitted), "A text", sampled=True)
    assert said in html and "Promised" not in html


def test_the_temperature_is_a_part_of_how_a_text_that_was_drawn_is_written():
    plain = SimpleNamespace(generation_config=GenerationConfig())
    assert "temperature" not in how_written(plain, None, {"decoding": "predictive", "temperature": 0.7})
    assert "temperature" not in how_written(plain, None, {"decoding": "mbr", "temperature": 0.0})
    assert how_written(plain, None, {"decoding": "mbr", "temperature": 0.7})["temperature"] == 0.7


def test_what_changes_a_text_is_a_part_of_how_it_is_written():
    plain = SimpleNamespace(generation_config=GenerationConfig())
    default = {"prompt": None, "decoding": "predictive", "num_beams": 1, "max_new_tokens": 128}
    one_beam = {"length_penalty": 2.0, "utility": rouge_utility("rouge1")}  # that neither looks at
    assert how_written(plain, None, {}) == how_written(plain, None, one_beam) == default
    assert how_written(plain, None, {"num_beams": 2, "length_penalty": 1.0}) == {**default, "num_beams": 2}
    searched = {"num_beams": 2, "length_penalty": 0.6}
    assert how_written(plain, None, searched) == {**default, **searched}
    config = GenerationConfig(num_beams=4, length_penalty=2.0)  # as of BART's summarizers
    assert how_written(SimpleNamespace(generation_config=config), None, {}) == {
        **default, "num_beams": 4, "length_penalty": 2.0,
    }  # fmt: skip
    for stops in (["."], (".",), "."):  # all the same to generate, and a list in the rule's file
        assert how_written(plain, None, {"stop_strings": stops})["stop_strings"] == ["."]
    by_mbr = {**default, "decoding": "mbr"}
    for utility, named in ((None, {}), (rouge_utility(), {}), (rouge_utility("rouge2"), {"utility": "rouge2"})):
        assert how_written(plain, None, {"decoding": "mbr", "utility": utility}) == {**by_mbr, **named}


def test_what_a_rule_was_fitted_with_and_is_not_here_is_otherwise_but_of_the_mean_no_decoding():
    sampled, mean = {"num_samples": 3, "decoding": "mbr"}, {"num_samples": 0, "decoding": "predictive"}
    assert differences({**sampled, "temperature": 0.7, "utility": "rouge1"}, sampled) == {
        "temperature": (0.7, None), "utility": ("rouge1", None),
    }  # fmt: skip
    assert differences({**sampled, "temperature": 0.7, "utility": "rouge1"}, mean) == {}  # its text is one, decoded
    assert differences(sampled, {**mean, "num_beams": 2}) == {"num_beams": (None, 2)}


def test_a_temperature_that_was_fitted_later_is_refused_before_there_is_a_page(other):
    file = other / "conformal.json"
    rule = json.loads(file.read_text())
    rule["fitted_to"]["temperatures"] = [1.5, 1.2]
    file.write_text(json.dumps(rule))
    with pytest.raises(BlobError, match="fitted with temperatures .*, but it has None now: fit them again"):
        Engine(other)
