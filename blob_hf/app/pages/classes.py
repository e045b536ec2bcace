"""What the pages share that show the probabilities of classes: of a classifier's, or of the choices of a question."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import gradio as gr

from blob_hf.app.beside import Evaluation
from blob_hf.app.class_markup import classes_html, decision_html
from blob_hf.app.class_view import ClassView, class_view, decide, fitted_decisions
from blob_hf.app.engine import Engine
from blob_hf.app.inputs import MOST_SAMPLES, MOST_SEED, checked_count, checked_number
from blob_hf.app.markup import message
from blob_hf.app.pages.common import ENGINE, HIDDEN, promised, samples_slider, seed_box, sentence
from blob_hf.app.promises import fitted_number
from blob_hf.app.questions import Question
from blob_hf.baselines.conformal import PredictionSets
from blob_hf.inference.predict import calibration_of


class ClassPage(ABC):
    """What a page of class probabilities does, and how it is laid out.

    Args:
        evaluation: Saved predictions, for what a threshold does; None if there are none.
        examples: What the boxes can be filled with.
        api_name: Under which `gradio_client` finds the records of `model.predict`.

    Attributes:
        button: What it says.
    """

    button = "Classify"

    def __init__(
        self, engine: Engine, evaluation: Evaluation | None, examples: list[tuple[str, ...]], api_name: str = "predict"
    ) -> None:
        self.engine, self.evaluation, self.examples, self.api_name = engine, evaluation, examples, api_name
        self.highest = math.log(len(engine.class_names))
        self.rule = engine.rule if isinstance(engine.rule, PredictionSets) else None

    # ----- of each kind of page -----

    @abstractmethod
    def boxes(self) -> list[gr.Textbox]:
        """Lay out what is written into, in the order of `asked`."""

    @abstractmethod
    def asked(self, *written: object) -> tuple[str, ...] | Question:
        """What the model is asked, from what was written into the boxes.

        Raises:
            BlobError: It cannot be.
        """

    @abstractmethod
    def choices(self, asked: tuple[str, ...] | Question) -> list[str] | None:
        """What the choices of a question are called; None of a classifier."""

    @abstractmethod
    def predict(self, *args: Any) -> dict[str, Any]:
        """`record` of what a program has sent."""

    # ----- what it does -----

    def record(self, written: Sequence[object], num_samples: object, seed: object) -> dict[str, Any]:
        """The record of `model.predict`, with that of the posterior mean under "mean"."""
        try:
            found = self.engine.classify(self.asked(*written), *self._numbers(num_samples, seed))
        except Exception as error:
            return {"error": sentence(error)}
        return {
            **found.prediction.records()[0], "mean": found.mean.records()[0], "note": found.note,
            **promised(found.promise),
        }  # fmt: skip

    def answer(self, *values: Any) -> tuple[str, str, str, ClassView | None]:
        """Message, decision and answer as HTML, and the view that the threshold is moved over.

        Args:
            values: What is written into the boxes; number of samples, seed and threshold.
        """
        *written, num_samples, seed, threshold = values
        try:
            asked, (count, own_seed) = self.asked(*written), self._numbers(num_samples, seed)
            found = self.engine.classify(asked, count, own_seed)
            drawn, choices = 0 if self.engine.is_point else count, self.choices(asked)
            view = class_view(
                found.prediction, found.mean, drawn, calibration_of(self.engine.model) is not None,
                fitted_decisions(found.prediction, self.rule, found.promise, drawn > 0, choices), choices,
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

    def _numbers(self, num_samples: object, seed: object) -> tuple[int, int]:
        return checked_count(num_samples, "Samples N", 0, MOST_SAMPLES), checked_count(seed, "The seed", 0, MOST_SEED)

    # ----- how it stands -----

    def build(self) -> None:
        """Lay it out inside the current Blocks."""
        view = gr.State(None)
        boxes = self.boxes()
        with gr.Row():
            count = samples_slider(self.engine.is_point, fitted_number(self.rule, "num_samples", MOST_SAMPLES, 10))
            threshold = gr.Slider(
                0, math.ceil(100 * self.highest) / 100, value=round(self.highest / 2, 2), step=0.01, min_width=260,
                label="Abstain above this entropy (nats)",
                info=f"Of {len(self.engine.class_names)} equally likely answers it would be {self.highest:.2f}.",
            )  # fmt: skip
        with gr.Accordion("More settings", open=False):
            seed = seed_box(fitted_number(self.rule, "seed", MOST_SEED, 0))
        run = gr.Button(self.button, variant="primary", elem_id="classify")
        said = gr.HTML(padding=False, elem_id="classifier-message")
        decision = gr.HTML(self.decide(None, self.highest / 2), padding=False, elem_id="decision")
        shown = gr.HTML(padding=False, elem_id="classes")
        inputs, outputs = [*boxes, count, seed, threshold], [said, decision, shown, view]
        events = [run.click, *(box.submit for box in boxes)]
        gr.on(events, self.answer, inputs, outputs, api_visibility="private", show_progress="minimal", **ENGINE)
        threshold.change(self.decide, [view, threshold], decision, queue=False, **HIDDEN)
        gr.api(self.predict, api_name=self.api_name, **ENGINE)
