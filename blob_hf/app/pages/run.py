"""The page of a run's folder."""

import gradio as gr

from blob_hf.app.inputs import checked_count
from blob_hf.app.markup import message
from blob_hf.app.pages.common import HIDDEN, sentence
from blob_hf.app.run_markup import plots_html, rows_html, top_html
from blob_hf.app.run_view import AS_SAVED, LEAST_CERTAIN, MOST_CERTAIN, WORST, RunView, SavedPredictions

ORDERS = (LEAST_CERTAIN, WORST, MOST_CERTAIN, AS_SAVED)
_PAGE = 25  # rows together


class RunPage:
    """What the page of a run does, and how it is laid out."""

    def __init__(self, view: RunView) -> None:
        self.view = view
        self._by_split = {saved.split: saved for saved in view.predictions}

    # ----- what it does -----

    def rows(self, split: str, order: str, score: str | None, page: float) -> str:
        """A page of the saved predictions, as HTML."""
        try:
            saved = self._by_split[split]
            rows = saved.ordered(order, score if score in saved.scores else None)
            number = checked_count(page, "The page", 1, last_page(saved))
            first = _PAGE * (min(number, pages_of(saved)) - 1)
            shown = rows[first : first + _PAGE]
            said = f"Rows {first + 1} to {first + len(shown)} of {len(rows)} ({split}), {order}"
            return message(said) + rows_html(saved, shown, said)
        except Exception as error:
            return message(sentence(error), "error")

    def choose(
        self, split: str, order: str, score: str | None
    ) -> tuple[dict[str, object], dict[str, object], str, str]:
        """Scores and pages to choose from of another split, its top and its first rows in the order that is chosen."""
        saved = self._by_split[split]
        score = score if score in saved.scores else next(iter(saved.scores), None)
        scores = gr.update(choices=list(saved.scores), value=score)
        pages = gr.update(maximum=last_page(saved), value=1, interactive=pages_of(saved) > 1)
        return scores, pages, top_html(saved), self.rows(split, order, score, 1)

    # ----- how it stands -----

    def build(self) -> None:
        """Lay it out inside the current Blocks."""
        with gr.Tabs():
            if self.view.predictions:
                with gr.Tab("Predictions"):
                    self._predictions()
            with gr.Tab("Report"):
                gr.Markdown(self.view.report or "This folder has no report.", elem_id="report")
            with gr.Tab("Plots"):
                gr.HTML(plots_html(self.view.plots), padding=False, elem_id="plots")

    def _predictions(self) -> None:
        first = self.view.predictions[0]
        with gr.Row():
            split = gr.Dropdown(list(self._by_split), value=first.split, label="Split", filterable=False)
            order = gr.Dropdown(list(ORDERS), value=LEAST_CERTAIN, label="Order", filterable=False, elem_id="order")
            score = gr.Dropdown(
                list(first.scores), value=next(iter(first.scores), None), label="Uncertainty", filterable=False
            )
            page = gr.Slider(1, last_page(first), value=1, step=1, label="Page", interactive=pages_of(first) > 1)
        top = gr.HTML(top_html(first), padding=False, elem_id="top")
        rows = gr.HTML(self.rows(first.split, LEAST_CERTAIN, None, 1), padding=False, elem_id="rows")
        inputs = [split, order, score, page]
        split.change(self.choose, [split, order, score], [score, page, top, rows], queue=False, **HIDDEN)
        for changed in (order, score, page):
            changed.change(self.rows, inputs, rows, queue=False, **HIDDEN)


def pages_of(saved: SavedPredictions) -> int:
    """Number of pages."""
    return -(-len(saved.rows) // _PAGE)


def last_page(saved: SavedPredictions) -> int:
    """Where the slider ends: one of a single page needs two ends, too."""
    return max(2, pages_of(saved))
