"""Questions as files and the Hub have them: forms, labels, and what cannot be asked."""

import json

import pytest
from datasets import Dataset

from blob_hf.data.multiple_choice import (
    PUBLISHED,
    TASKS,
    continuations,
    letter_prompt,
    load_choices,
    questions,
    require_answers,
)
from blob_hf.utils.errors import BlobError


def written(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_rows_of_the_hub_and_own_ones_are_read_alike(tmp_path):
    arc = {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    wino = {"sentence": "Ann saw _ twice.", "option1": "Bob", "option2": "Eve", "answer": "2"}
    boolq = {"question": "is it", "passage": "p" * 2000, "answer": True}
    own = {"question": "q", "choices": ["x", "y"], "label": "B"}
    by_text = {"question": "q", "choices": ["x", "y"], "label": "y"}
    found = [
        load_choices(files={"train": written(tmp_path / f"{index}.jsonl", [row])})["train"][0]
        for index, row in enumerate([arc, wino, boolq, own, by_text])
    ]
    assert [row["label"] for row in found] == [2, 1, 1, 1, 1]
    assert found[1]["choices"] == ["Bob", "Eve"] and len(found[2]["passage"]) == 1024
    assert list(continuations(found[1], TASKS["winogrande_s"].asking)) == [
        ("Ann saw Bob", " twice."), ("Ann saw Eve", " twice."),
    ]  # fmt: skip
    with pytest.raises(BlobError, match="has no blank _ for its choices"):
        list(continuations(found[3], TASKS["winogrande_s"].asking))
    assert next(iter(continuations(found[1], PUBLISHED))) == ("Question: Ann saw _ twice.\nAnswer:", " Bob")
    assert letter_prompt(found[0], PUBLISHED).endswith("Question: q\nChoices:\nA) x\nB) y\nC) z\nAnswer:")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "q", "choices": ["x"], "label": 0}, "has 1 choices; it must have 2 to 26"),
        ({"question": "q", "choices": [str(i) for i in range(27)], "label": 0}, "has 27 choices"),
        ({"question": "q", "choices": ["x", " "], "label": 0}, "choice B is empty"),
        ({"question": "q", "choices": ["x", "y"], "label": 2}, "the label 2 is none of its 2 choices"),
        ({"question": "q", "choices": ["x", "y"], "label": "C"}, "the label 'C' is none of its 2 choices"),
        ({"question": " ", "choices": ["x", "y"], "label": 1}, "question 1 is empty"),
        ({"question": "q", "choices": "x or y", "label": 1}, "choices must be a list of texts"),
        ({"question": "q", "choices": ["x", "y"], "label": [1]}, "the label .1. is none of its 2 choices"),
        ({"question": "q", "choices": ["x", "y"], "label": 0.5}, "the label 0.5 is none of its 2 choices"),
        ({"question": "q", "choices": "x or y", "answerKey": "A"}, "choices must be a list of texts"),
        ({"text": "q", "label": 1}, "has no column 'question'"),
    ],
)
def test_questions_that_cannot_be_asked(row, message, tmp_path):
    with pytest.raises(BlobError, match=message) as error:
        load_choices(files={"train": written(tmp_path / "rows.jsonl", [row])})
    assert "\n" not in str(error.value)


def test_a_passage_that_the_first_question_lacks_is_read(tmp_path):
    rows = [
        {"question": "q", "choices": ["x", "y"], "label": 0},
        {"question": "r", "choices": ["x", "y"], "label": 0, "passage": "p"},
    ]
    found = load_choices(files={"train": written(tmp_path / "rows.jsonl", rows)})["train"]
    assert found["passage"] == [None, "p"]


def test_labels_as_tables_write_them(tmp_path):
    """A missing one of a column of floats is NaN; a text may have blanks around it, as its choice may."""
    asked = {"question": "q", "choices": ["x ", "y"]}
    for label in (float("nan"), None, ""):
        files = {"train": written(tmp_path / "rows.jsonl", [{**asked, "label": label}])}
        rows = load_choices(files=files)
        assert rows["train"].column_names == ["question", "choices"]
        with pytest.raises(BlobError, match="the train split has no labels"):
            require_answers(rows, "train", "calibration")
    for label, expected in ((1.0, 1), (" y", 1), ("x ", 0), (True, 1)):
        files = {"train": written(tmp_path / "rows.jsonl", [{**asked, "label": label}])}
        assert load_choices(files=files)["train"]["label"] == [expected]


def test_ids_of_two_kinds_are_texts(tmp_path):
    asked = {"question": "q", "choices": ["x", "y"], "label": 1}
    files = {"train": written(tmp_path / "rows.jsonl", [{"id": 1, **asked}, {"id": "b", **asked}])}
    assert load_choices(files=files)["train"]["id"] == ["1", "b"]


def test_each_split_has_a_form_of_its_own(tmp_path):
    own = {"question": "q", "choices": ["x", "y"], "label": 1}
    key = {"question": "q", "choices": ["x", "y"], "answerKey": "B"}
    arc = {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    files = {
        split: written(tmp_path / f"{split}.jsonl", [row])
        for split, row in (("train", own), ("validation", key), ("test", arc))
    }
    assert [rows[0]["label"] for rows in load_choices(files=files).values()] == [1, 1, 1]
    files["validation"] = written(tmp_path / "other.jsonl", [{"text": "q", "label": 1}])
    with pytest.raises(BlobError, match="the validation split has no column 'question'"):
        load_choices(files=files)


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "q", "passage": "p"}, {"question": "r", "passage": "p"}],
        [{"question": "q", "passage": "p", "answer": True}, {"question": "r", "passage": "p", "answer": None}],
        [
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": key}
            for key in ("A", "")
        ],
        [{"question": "q", "choices": ["x", "y"], "label": label} for label in (1, None)],
        [{"question": "q", "choices": ["x", "y"], "label": label} for label in (7, None)],
        [{"sentence": "s _", "option1": "x", "option2": "y", "answer": answer} for answer in ("2", "")],
    ],
)
def test_questions_that_are_asked_need_no_labels(rows):
    asked = questions(Dataset.from_list(rows), labelled=False)
    assert "label" not in asked.column_names and len(asked) == 2 and all(len(one) == 2 for one in asked["choices"])
