"""Questions with choices on the page: what an adapter is asked with, what a visitor has written, and their names."""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from blob_hf.app.inputs import checked_text
from blob_hf.data.multiple_choice import MOST_CHOICES, continuations, letter_prompt
from blob_hf.inference.choices import ChoiceScoring
from blob_hf.utils.errors import BlobError

Question = dict[str, Any]  # question, choices, and where there is one passage
PARTS = ("question", "choices", "passage")


def has_passage(scoring: ChoiceScoring) -> bool:
    """Whether the adapter's questions are about a text."""
    return "{passage}" in (scoring.letter_prompt if scoring.scoring == "letter" else scoring.text_prompt)


def fills_blank(scoring: ChoiceScoring) -> bool:
    """Whether a choice stands for the blank `_` of the question."""
    return scoring.fills_blank and scoring.scoring == "text"


def checked_question(question: object, choices: object, passage: object, scoring: ChoiceScoring) -> Question:
    """A question that the adapter can be asked.

    Args:
        choices: A list, or a text with one a line. Of an adapter whose answers are always the same they are not read.
        passage: Of an adapter without passages it is not read.

    Raises:
        BlobError: A part is missing or is no text, or there are too few choices or too many.
    """
    found: Question = {"question": checked_text(question, "question")}
    if fills_blank(scoring) and "_" not in found["question"]:
        raise BlobError("The question has no blank _ for its choices: write one.")
    found["choices"] = list(scoring.answers) or _checked_choices(choices, scoring)
    if has_passage(scoring):
        found["passage"] = checked_text(passage, "passage")
    return found


def _checked_choices(value: object, scoring: ChoiceScoring) -> list[str]:
    lines = value.splitlines() if isinstance(value, str) else value
    if not isinstance(lines, (list, tuple)):
        raise BlobError("The choices are missing: write two or more, one a line.")
    found = [checked_text(one, "choice").strip() for one in lines if not isinstance(one, str) or one.strip()]
    if len(found) < 2:
        raise BlobError("A question needs two choices or more: write one a line.")
    most = min(len(scoring.tokens), MOST_CHOICES)
    if len(found) > most:
        raise BlobError(f"The question has {len(found)} choices, and this adapter answers with at most {most}.")
    return found


def probe(scoring: ChoiceScoring) -> Question:
    """A question that any adapter of this kind can be asked."""
    return checked_question("a _ b", ["a", "b"], "a", scoring)


def choice_names(asked: Question, scoring: ChoiceScoring) -> list[str]:
    """What the choices of a question are called: the words that they are answered with, or letter and text."""
    return list(scoring.answers) or lettered(asked["choices"])


def lettered(choices: Sequence[str]) -> list[str]:
    """Choices with their letters."""
    return [f"{letter}) {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)]


def prompts(asked: Question, scoring: ChoiceScoring) -> list[str]:
    """What the model reads of a question: the prompt before the letter, or each choice's text after its context."""
    if scoring.scoring == "letter":
        return [letter_prompt(asked, scoring.asking)]
    return ["".join(pair) for pair in continuations(asked, scoring.asking)]


def question_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a question in a row of a file or of saved predictions; empty if it has none.

    Choices are one a line, as they are read from their box: those of several lines become one.
    """
    question, choices = row.get("question"), row.get("choices")
    if not isinstance(question, str) or not isinstance(choices, list):
        return {}
    found = {**row, "choices": "\n".join(" ".join(str(one).splitlines()) for one in choices)}
    return {name: found[name] for name in PARTS if isinstance(found.get(name), str)}
