"""The page of an adapter that answers questions of multiple choice."""

from typing import Any

import gradio as gr

from blob_hf.app.pages.classes import ClassPage
from blob_hf.app.pages.common import example_list
from blob_hf.app.questions import Question, checked_question, choice_names, fills_blank, has_passage
from blob_hf.inference.choices import ChoiceScoring


class ChoicePage(ClassPage):
    """Its examples are questions, choices one a line, and passages where the adapter reads some."""

    button = "Answer"

    @property
    def scoring(self) -> ChoiceScoring:
        """How the adapter is asked."""
        assert self.engine.scoring is not None
        return self.engine.scoring

    def predict(
        self, question: str, choices: list[str], passage: str = "", num_samples: int = 10, seed: int = 0
    ) -> dict[str, Any]:
        """The record of `model.predict` for a question, with that of the posterior mean under "mean"."""
        return self.record((question, choices, passage), num_samples, seed)

    def asked(self, *written: object) -> Question:
        question, choices, passage = written
        return checked_question(question, choices, passage, self.scoring)

    def choices(self, asked: tuple[str, ...] | Question) -> list[str]:
        assert isinstance(asked, dict)
        return choice_names(asked, self.scoring)

    def boxes(self) -> list[gr.Textbox]:
        hint = ", with a blank _ for its choices" if fills_blank(self.scoring) else ""
        question = gr.Textbox(label="Question", lines=2, max_lines=12, placeholder=f"Write or paste a question{hint}")
        choices = gr.Textbox(
            label="Choices, one a line", lines=4, max_lines=26, visible=not self.scoring.answers,
            placeholder=f"2 to {len(self.scoring.tokens)} choices",
        )  # fmt: skip
        passage = gr.Textbox(
            label="Passage", lines=4, max_lines=12, visible=has_passage(self.scoring),
            placeholder="The text that the question is about",
        )  # fmt: skip
        example_list(self.examples, [question, choices, passage])
        return [question, choices, passage]
