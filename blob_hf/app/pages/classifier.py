"""The page of a classifier of texts or of pairs."""

from typing import Any

import gradio as gr

from blob_hf.app.inputs import checked_text
from blob_hf.app.pages.classes import ClassPage
from blob_hf.app.pages.common import example_list
from blob_hf.app.questions import Question


class ClassifierPage(ClassPage):
    """Its examples are texts or pairs."""

    @property
    def takes_pairs(self) -> bool:
        """Whether it was trained on pairs, as far as examples say."""
        return bool(self.examples) and len(self.examples[0]) == 2

    def predict(self, text: str, second: str = "", num_samples: int = 10, seed: int = 0) -> dict[str, Any]:
        """The record of `model.predict` for a text or a pair, with that of the posterior mean under "mean"."""
        return self.record((text, second), num_samples, seed)

    def asked(self, *written: object) -> tuple[str, ...]:
        text, second = written
        first = checked_text(text)
        if second is None or (isinstance(second, str) and not second.strip()):
            if self.takes_pairs:
                checked_text(second, "second text")
            return (first,)
        return first, checked_text(second, "second text")

    def choices(self, asked: tuple[str, ...] | Question) -> None:
        return None

    def boxes(self) -> list[gr.Textbox]:
        pairs = self.takes_pairs
        first = gr.Textbox(
            label="First text" if pairs else "Text", lines=3, max_lines=12, placeholder="Write or paste a text"
        )
        second = gr.Textbox(
            label="Second text", lines=3 if pairs else 1, max_lines=12, visible=pairs or not self.examples,
            placeholder="Write or paste a text" if pairs else "Only for a classifier of pairs; else leave it empty",
        )  # fmt: skip
        example_list(self.examples, [first, second])
        return [first, second]
