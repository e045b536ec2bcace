"""What a run of multiple choice says of its questions."""

from dataclasses import dataclass

import pytest
from datasets import Dataset

from blob_hf.cli.questions import warn_of_unread_asking, width_note
from blob_hf.inference.choices import ChoiceScoring


def of(*counts):
    return Dataset.from_list([{"choices": ["x"] * count} for count in counts])


@dataclass
class Asked:
    scoring: str = "letter"
    length_normalization: str = "none"
    max_length: int = 300


@pytest.mark.parametrize(
    ("asked", "scoring", "saved", "said"),
    [
        (
            Asked(length_normalization="tokens"),
            ChoiceScoring("letter", (1, 2), "tokens"),
            False,
            "is of --scoring text",
        ),
        (Asked("text", "tokens"), ChoiceScoring("text", (0, 0), "tokens"), False, ""),
        (Asked(max_length=64), ChoiceScoring("text", (0, 0), "tokens", max_length=128), True, "--max_length 64 is not"),
        (Asked(), ChoiceScoring("text", (0, 0), "tokens", max_length=128), True, ""),
        (Asked("text", "characters"), ChoiceScoring("text", (0, 0)), True, "--length_normalization characters is not"),
    ],
)
def test_arguments_that_are_not_read_are_named(asked, scoring, saved, said, caplog):
    with caplog.at_level("WARNING", "blob_hf"):
        warn_of_unread_asking(asked, scoring, saved)
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_other_numbers_of_choices_are_said_of_shifted_questions():
    assert width_note("arc", of(4, 4, 4, 3, 5), of(4, 4)) is None
    assert "wino has 2 choices a question, the evaluation 4" in str(width_note("wino", of(2, 2), of(4, 4)))
