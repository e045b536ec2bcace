"""The page of a classifier."""

import math
from typing import Any

import gradio as gr

from blob_hf.app.beside import Evaluation
from blob_hf.app.class_markup import classes_html, decision_html
from blob_hf.app.class_view import ClassView, class_view, decide, fitted_decisions
from blob_hf.app.engine import Engine
from blob_hf.app.inputs import MOST_SAMPLES, MOST_SEED, checked_count, checked_number, checked_text
from blob_hf.app.markup import message
from blob_hf.app.pages.common import (
    ENGINE,
    HIDDEN,
    example_list,
    promised,
    samples_slider,
    seed_box,
    sentence,
)
from blob_hf.app.promises import fitted_number
from blob_hf.baselines.conformal import PredictionSets
from blob_hf.inference.predict import calibration_of


class ClassifierPage:
    """What the page of a classifier does, and how it is laid out.

    Args:
        evaluation: Saved predictions, for what a threshold does; None if there are none.
        examples: Texts, or pairs.
        api_name: Under which `gradio_client` finds the records of `model.predict`.
    """

    def __init__(
        self, engine: Engine, evaluation: Evaluation | None, examples: list[tuple[str, ...]], api_name: str = "predict"
    ) -> None:
        self.engine, self.evaluation, self.examples, self.api_name = engine, evaluation, examples, api_name
        self.highest = math.log(len(engine.class_names))
        self.rule = engine.rule if isinstance(engine.rule, PredictionSets) else None

    # ----- what it does -----

    def predict(self, text: str, second: str = "", num_samples: int = 10, seed: int = 0) -> dict[str, Any]:
        """The record of `model.predict` for a text or a pair, with that of the posterior mean under "mean"."""
        try:
            found = self.engine.classify(self._texts(text, second), *self._numbers(num_samples, seed))
        except Exception as error:
            return {"error": sentence(error)}
        return {
            **found.prediction.records()[0], "mean": found.mean.records()[0], "note": found.note,
            **promised(found.promise),
        }  # fmt: skip

    def answer(
        self, text: str, second: str, num_samples: float, seed: float, threshold: float
    ) -> tuple[str, str, str, ClassView | None]:
        """Message, decision and answer as HTML, and the view that the threshold is moved over."""
        try:
            texts, (count, own_seed) = self._texts(text, second), self._numbers(num_samples, seed)
            found = self.engine.classify(texts, count, own_seed)
            drawn = 0 if self.engine.is_point else count
            view = class_view(
                found.prediction, found.mean, drawn, calibration_of(self.engine.model) is not None,
                fitted_decisions(found.prediction, self.rule, found.promise, drawn > 0),
            )  # fmt: skip
        except Exception as error:
            return message(sentence(error), "error"), self.decide(None, threshold), "", None
        return message(found.note), self.decide(view, threshold), classes_html(view), view

    def decide(self, view: ClassView | None, threshold: float) -> str:
        """The decision at a threshold, as HTML."""
        try:
            limit = checked_number(threshold, "The threshold", 0, 1000)
        except Exception as error:
            return message(sentence(error), "error")
        return decision_html(decide(None if view is None else view.entropy, limit, self.evaluation), view)

    def _texts(self, text: object, second: object) -> tuple[str, ...]:
        first = checked_text(text)
        if second is None or (isinstance(second, str) and not second.strip()):
            if self.examples and len(self.examples[0]) == 2:
                checked_text(second, "second text")  # it was trained on pairs
            return (first,)
        return first, checked_text(second, "second text")

    def _numbers(self, num_samples: object, seed: object) -> tuple[int, int]:
        return checked_count(num_samples, "Samples N", 0, MOST_SAMPLES), checked_count(seed, "The seed", 0, MOST_SEED)

    # ----- how it stands -----

    def build(self) -> None:
        """Lay it out inside the current Blocks."""
        pairs = bool(self.examples) and len(self.examples[0]) == 2
        view = gr.State(None)
        first = gr.Textbox(
            label="First text" if pairs else "Text", lines=3, max_lines=12, placeholder="Write or paste a text"
        )
        second = gr.Textbox(
            label="Second text", lines=3 if pairs else 1, max_lines=12, visible=pairs or not self.examples,
            placeholder="Write or paste a text" if pairs else "Only for a classifier of pairs; else leave it empty",
        )  # fmt: skip
        example_list(self.examples, [first, second])
        with gr.Row():
            count = samples_slider(self.engine.is_point, fitted_number(self.rule, "num_samples", MOST_SAMPLES, 10))
            threshold = gr.Slider(
                0, math.ceil(100 * self.highest) / 100, value=round(self.highest / 2, 2), step=0.01, min_width=260,
                label="Abstain above this entropy (nats)",
                info=f"Of {len(self.engine.class_names)} equally likely classes it would be {self.highest:.2f}.",
            )  # fmt: skip
        with gr.Accordion("More settings", open=False):
            seed = seed_box(fitted_number(self.rule, "seed", MOST_SEED, 0))
        run = gr.Button("Classify", variant="primary", elem_id="classify")
        said = gr.HTML(padding=False, elem_id="classifier-message")
        decision = gr.HTML(self.decide(None, self.highest / 2), padding=False, elem_id="decision")
        shown = gr.HTML(padding=False, elem_id="classes")
        inputs, outputs = [first, second, count, seed, threshold], [said, decision, shown, view]
        gr.on([run.click, first.submit, second.submit], self.answer, inputs, outputs, **ENGINE, **_visible_work())
        threshold.change(self.decide, [view, threshold], decision, queue=False, **HIDDEN)
        gr.api(self.predict, api_name=self.api_name, **ENGINE)


def _visible_work() -> dict[str, Any]:
    return {"api_visibility": "private", "show_progress": "minimal"}
