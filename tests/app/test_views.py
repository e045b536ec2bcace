"""What is shown of predictions, against the predictions themselves."""

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.chat import causal
from helpers.models import TARGETS, randomize_b, tiny_bert, tiny_tokenizer, words
from transformers import AutoTokenizer

from blob_hf import BlobConfig, Sampling, get_blob_model
from blob_hf.app.beside import Evaluation
from blob_hf.app.class_markup import classes_html, decision_html, threshold_sentence
from blob_hf.app.class_view import class_view, decide
from blob_hf.app.inputs import LONGEST, checked_count, checked_text
from blob_hf.app.text_markup import text_html, token_html
from blob_hf.app.text_view import LEVELS, level_of, pieces, text_view
from blob_hf.data.demo import BACKBONE_DIR
from blob_hf.utils.errors import BlobError


def plain(text):
    """With ordinary blanks."""
    return text.replace("\N{NO-BREAK SPACE}", " ")


def classifier(classes=3):
    model = get_blob_model(tiny_bert(classes), BlobConfig(target_modules=TARGETS["bert"], init_eps=0.9))
    randomize_b(model)
    model.get_base_model().config.id2label = {index: f"class <{index}>" for index in range(classes)}
    return model.eval()


def test_a_class_view_has_the_numbers_of_predict():
    model, text = classifier(), words(1)
    found, mean = (model.predict(text, tiny_tokenizer(), count) for count in (Sampling(4, seed=2), 0))
    view = class_view(found, mean, 4)
    order = np.argsort(-found.probabilities[0])
    assert [row.name for row in view.rows] == [f"class <{index}>" for index in order]
    np.testing.assert_array_equal([row.probability for row in view.rows], found.probabilities[0, order])
    np.testing.assert_array_equal([row.samples for row in view.rows], found.sample_probabilities[0].T[order])
    np.testing.assert_allclose([row.std for row in view.rows], [np.std(row.samples) for row in view.rows])
    np.testing.assert_array_equal([row.mean for row in view.rows], mean.probabilities[0, order])
    assert (view.entropy, view.aleatoric, view.epistemic) == (found.entropy[0], found.aleatoric[0], found.epistemic[0])
    assert view.mean_label == mean.labels[0] and view.num_samples == 4
    shown = classes_html(view)
    assert f"{view.epistemic:.3f}" in shown and "class &lt;0&gt;" in shown and "class <0>" not in shown


def test_many_classes_are_the_likeliest_and_the_rest():
    model = classifier(30)
    found = model.predict(words(1), tiny_tokenizer(), Sampling(3))
    view = class_view(found, found, 3)
    assert len(view.rows) == 10 and view.other_count == 20
    assert sum(row.probability for row in view.rows) + view.others == pytest.approx(1)
    assert "20 other classes" in classes_html(view)


def test_a_point_shows_no_spread():
    model = classifier()
    mean = model.predict(words(1), tiny_tokenizer(), 0)
    view = class_view(mean, mean, 0)
    assert view.num_samples == 0 and not any(row.samples for row in view.rows)
    assert "std" not in classes_html(view)


def test_the_decision_and_what_it_does_to_the_evaluation_set():
    rows = Evaluation("validation", 10, np.array([0.1, 0.2, 0.6, 0.7]), np.array([False, True, False, True]))
    decision = decide(0.5, 0.6, rows)
    assert decision.answers and decision.coverage == 0.75 and decision.accuracy == pytest.approx(2 / 3)
    assert "75.0 % of the 4 validation rows are answered, and 66.7 % of these are right; of all 50.0 %" in (
        plain(threshold_sentence(decision))
    )
    assert not decide(0.61, 0.6, rows).answers
    assert math.isnan(decide(0.5, 0.05, rows).accuracy) and "none of the 4" in threshold_sentence(
        decide(0.5, 0.05, rows)
    )
    unknown = decide(0.5, 0.6, None)
    assert "No predictions with labels" in decision_html(unknown, None) and "Answers" not in decision_html(
        unknown, None
    )


def test_levels_are_discrete_steps():
    assert [level_of(value) for value in (0.0, LEVELS[0], LEVELS[1] - 1e-9, LEVELS[1], LEVELS[2], 2.0)] == [
        0, 1, 1, 2, 3, 3,
    ]  # fmt: skip


def test_a_text_view_has_the_numbers_of_predict():
    model, tokenizer = causal("llama"), tiny_tokenizer()
    own = {"max_new_tokens": 8, "top_tokens": 4}
    found = model.predict(words(1, seed=3), tokenizer, Sampling(3, seed=5), **own)
    view = text_view(found, tokenizer)
    count = int((found.tokens[0] != -100).sum())
    assert len(view.tokens) == count > 1
    unsure = found.token_uncertainty
    for at, token in enumerate(view.tokens):
        assert token.epistemic == float(unsure.epistemic[0, at]) and token.total == float(unsure.total[0, at])
        assert token.aleatoric == float(unsure.aleatoric[0, at])
        assert token.probability == pytest.approx(math.exp(float(unsure.log_probs[0, at])))
        assert token.level == sum(token.epistemic >= least for least in LEVELS)
        own_id = int(found.tokens[0, at])
        others = [int(one) for one in found.top_tokens.tokens[0, at] if one != own_id]
        assert [name for name, _ in token.runners_up] == [tokenizer.decode([one]) for one in others]
    assert [sample.text for sample in view.samples] == found.samples[0]
    assert sum(sample.is_mbr for sample in view.samples) == 1
    assert (
        view.mbr
        == model.predict(words(1, seed=3), tokenizer, Sampling(3, seed=5), decoding="mbr", max_new_tokens=8).texts[0]
    )
    assert [sample.meaning - 1 for sample in view.samples] == found.sample_sets[0]
    assert "".join(token.text for token in view.tokens).strip() == found.texts[0]
    shown = text_html(view, "A text", sampled=True)
    for token in view.tokens:
        assert not token.text or f'data-epistemic="{token.epistemic:.6f}"' in token_html(token)
    assert "instead: " in shown and "strong disagreement" in shown


def test_the_pieces_of_a_text_are_the_text():
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE_DIR)
    for text in ("#Person1# invites #Person2#.", "naïve “café” 東京 🎲 done", "two\nlines"):
        ids = tokenizer(text).input_ids
        found = pieces(ids, tokenizer)
        assert len(found) == len(ids)
        assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


@pytest.mark.parametrize(
    "value, said",
    [
        ("", "The text is empty"), ("  \n", "The text is empty"), (None, "The text is empty"),
        (7, "must be text, not int"), (["a"], "must be text, not list"), ("a\0b", "does not look like text"),
        ("\x01\x02\x03 hm", "does not look like text"), ("half of a pair \ud83d in a text", "does not look like text"),
        ("a" * (LONGEST + 1), "has 100,001 characters, and at most 100,000"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence_that_does_not_repeat_it(value, said):
    with pytest.raises(BlobError, match=said) as error:
        checked_text(value)
    assert len(str(error.value)) < 120


def test_text_of_any_language_is_text():
    for text in ("東京 🎲", "a\tb\r\nc", "e\u0301\u200d", "العربية"):
        assert checked_text(text) == text
    for value in (2.5, "3", None, True, -1, 65, math.nan, math.inf):
        with pytest.raises(BlobError, match="Samples N must be"):
            checked_count(value, "Samples N", 0, 64)


def test_what_is_written_is_escaped():
    model, tokenizer = causal("llama"), tiny_tokenizer()
    found = model.predict(words(1), tokenizer, Sampling(2), max_new_tokens=2)
    view = text_view(found, tokenizer)
    evil = view.tokens[0].__class__(**{**vars(view.tokens[0]), "text": "<script>", "name": '"><script>'})
    assert "<script" not in token_html(evil)
    word = "<script>alert(1)</script>"
    samples = tuple(replace(one, text=word) for one in view.samples)
    shown = text_html(replace(view, samples=samples, mbr=word, words=((word, 0.5), (word, 1.0))), word, sampled=True)
    assert "<script" not in shown and shown.count("&lt;script&gt;") == len(samples) + 4
    one = classifier()
    mean = one.predict(words(1), tokenizer, 0)
    seen = replace(class_view(mean, mean, 0), label=word)
    for limit in (0.0, 100.0):
        verdict = decision_html(decide(seen.entropy, limit, None), seen)
        assert "<script" not in verdict and verdict.count("&lt;script&gt;") == 1
