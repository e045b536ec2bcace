"""Questions with choices on the page, against `model.predict` on the same questions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.pages import LETTERS, fit_sets, save_choices, some_questions

from blob_hf import BlobModel, Sampling
from blob_hf.app.beside import examples_of_questions, saved_evaluation, saved_examples
from blob_hf.app.class_markup import classes_html, decision_html
from blob_hf.app.class_view import class_view, decide, fitted_decisions
from blob_hf.app.engine import CHOICES, Engine
from blob_hf.app.questions import checked_question, choice_names, has_passage, probe, prompts, question_texts
from blob_hf.app.run_markup import rows_html
from blob_hf.app.run_view import run_view
from blob_hf.data.multiple_choice import BLANK, READING
from blob_hf.inference.choices import ChoiceScoring
from blob_hf.utils.errors import BlobError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_choices(tmp_path_factory.mktemp("choices"))


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(folder)


@pytest.fixture(scope="module")
def model(folder):
    return BlobModel.from_pretrained(folder).eval()


def test_choices_have_the_numbers_of_predict(engine, model):
    assert engine.kind == CHOICES
    for asked in some_questions(4):
        found = model.predict([asked], sampling=Sampling(5, seed=3))
        mean = model.predict([asked], sampling=0)
        own = checked_question(asked["question"], "\n".join(asked["choices"]), "", engine.scoring)
        answer = engine.classify(own, 5, 3)
        view = class_view(answer.prediction, answer.mean, 5, choices=choice_names(own, engine.scoring))
        count = len(asked["choices"])  # two or three, of an adapter with three answers
        order = np.argsort(-found.probabilities[0, :count])
        assert [row.name for row in view.rows] == [f"{LETTERS[i]}) {asked['choices'][i]}" for i in order]
        np.testing.assert_array_equal([row.probability for row in view.rows], found.probabilities[0, order])
        np.testing.assert_array_equal([row.samples for row in view.rows], found.sample_probabilities[0].T[order])
        np.testing.assert_array_equal([row.mean for row in view.rows], mean.probabilities[0, order])
        assert (view.entropy, view.aleatoric, view.epistemic, view.mean_entropy) == tuple(
            value[0] for value in (found.entropy, found.aleatoric, found.epistemic, mean.entropy)
        )
        assert view.label.startswith(found.labels[0]) and view.mean_label.startswith(mean.labels[0])
        assert answer.prediction.records() == found.records() and not answer.note
        html = classes_html(view)
        assert "Choice probabilities" in html and ">choice</th>" in html and ">class</th>" not in html


def test_the_prediction_set_has_the_names_of_choices(folder, tmp_path):
    own = Path(shutil.copytree(folder, tmp_path / "adapter"))
    fit_sets(own, Sampling(4), quantile=0.7, confidence=0.4)
    engine, model = Engine(own), BlobModel.from_pretrained(own).eval()
    (asked,) = [one for one in some_questions(2) if len(one["choices"]) == 2]
    answer = engine.classify(checked_question(asked["question"], asked["choices"], "", engine.scoring), 4)
    names = [f"A) {asked['choices'][0]}", f"B) {asked['choices'][1]}"]
    fitted = fitted_decisions(answer.prediction, engine.rule, answer.promise, True, names)
    expected = model.predict([asked], sampling=Sampling(4))
    assert [name[0] for name in fitted.prediction_set] == expected.prediction_sets[0] and fitted.prediction_set
    view = class_view(answer.prediction, answer.mean, 4, fitted=fitted, choices=names)
    assert [row.in_set for row in view.rows] == [row.name in fitted.prediction_set for row in view.rows]
    assert answer.promise.holds and names[0] in decision_html(decide(view.entropy, 0.5, None), view)


@pytest.mark.parametrize(
    "question, choices, passage, said",
    [
        ("", "a\nb", "", "The question is empty"), ("w1", "a", "", "needs two choices or more: write one a line"),
        ("w1", "a\n \n", "", "needs two choices or more"), ("w1", None, "", "The choices are missing"),
        ("w1", ["a", 3], "", "The choice must be text, not int"), ("w1", ["a", "\0"], "", "does not look like text"),
        ("w1", "a\nb\nc\nd", "", "has 4 choices, and this adapter answers with at most 3"),
    ],
)  # fmt: skip
def test_what_is_no_question_is_a_sentence(question, choices, passage, said):
    with pytest.raises(BlobError, match=said):
        checked_question(question, choices, passage, ChoiceScoring("letter", (3, 4, 5)))


def test_each_kind_of_question_is_asked_for_what_it_needs():
    plain = ChoiceScoring("letter", (3, 4, 5))
    assert checked_question("w1", " a \n\nb", None, plain) == {"question": "w1", "choices": ["a", "b"]}
    assert prompts(probe(plain), plain)[0].endswith("Question: a _ b\nChoices:\nA) a\nB) b\nAnswer:")
    reading = ChoiceScoring("letter", (3, 4), letter_prompt=READING.letter, answers=READING.answers)
    assert has_passage(reading) and not has_passage(plain)
    asked = checked_question("w1", "", "w2", reading)
    assert asked == {"question": "w1", "choices": ["false", "true"], "passage": "w2"}
    assert choice_names(asked, reading) == ["false", "true"]
    with pytest.raises(BlobError, match="The passage is empty"):
        checked_question("w1", "", "", reading)
    blank = ChoiceScoring("text", (0, 0), fills_blank=BLANK.fills_blank)
    with pytest.raises(BlobError, match="has no blank _"):
        checked_question("w1", "a\nb", "", blank)
    assert prompts(checked_question("w1 _ w2", "a\nb", "", blank), blank) == ["w1 a w2", "w1 b w2"]


def test_a_choice_of_several_lines_stays_one():
    texts = question_texts({"question": "w1", "choices": ["a\nb", "c\u2028d", "e"]})
    plain = ChoiceScoring("letter", (3, 4, 5))
    assert checked_question(texts["question"], texts["choices"], "", plain)["choices"] == ["a b", "c d", "e"]


def test_a_question_that_is_too_long_is_answered_with_a_note(engine):
    long = checked_question(" ".join(["w5"] * 400), "w1\nw2", "", engine.scoring)
    count = len(engine.tokenizer(prompts(long, engine.scoring)[0]).input_ids)
    limit = engine.scoring.max_length
    assert engine.classify(long, 2).note == (
        f"The question has {count} tokens and the model reads {limit}: its beginning was left out."
    )


def test_examples_and_the_run_of_questions(tmp_path, model):
    asked = some_questions(3)
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({**row, "label": 0}) + "\n" for row in asked))
    expected = [(row["question"], "\n".join(row["choices"])) for row in asked]
    assert examples_of_questions(str(path)) == expected
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "w1"}\n')
    with pytest.raises(BlobError, match="has no questions: the adapter answers multiple choice"):
        examples_of_questions(str(texts))
    found = model.predict(asked, sampling=Sampling(4))
    with np.errstate(divide="ignore"):
        log_probs = np.maximum(np.log(found.probabilities), -1e9)
    rows = [
        {"index": i, **one, "prediction": found.labels[i], "probability": float(found.confidence[i]), "label": 1,
         "label_name": "B", "log_probs": log_probs[i].tolist()}
        for i, one in enumerate(asked)
    ]  # fmt: skip
    (tmp_path / "validation_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = saved_evaluation(tmp_path, model)
    np.testing.assert_allclose(evaluation.entropy, found.entropy, rtol=1e-6)
    np.testing.assert_array_equal(evaluation.wrong, found.label_ids != 1)
    assert sorted(saved_examples(tmp_path)) == sorted(expected)
    (saved,) = run_view(tmp_path).predictions
    first = saved.rows[0]
    lettered = [f"{letter}) {text}" for letter, text in zip(LETTERS, asked[0]["choices"], strict=False)]
    assert first.asked == "\n".join([asked[0]["question"], *lettered])
    assert first.risk == pytest.approx(-np.log(found.probabilities[0, 1])) and first.truth == "B"
    assert lettered[1] in rows_html(saved, saved.rows, "Rows")
    words = {**rows[0], "choices": ["false", "true"], "passage": "w9", "prediction": "true"}
    path = tmp_path / "validation_predictions.jsonl"
    path.write_text(json.dumps(words) + "\n")
    (saved,) = run_view(tmp_path).predictions
    assert saved.rows[0].asked == f"{asked[0]['question']}\nw9"
    assert saved_examples(tmp_path) == [(asked[0]["question"], "false\ntrue", "w9")]
