"""What the pages share: sentences for mistakes, who may stop which answer, examples to choose from."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr

from blob_hf.app.engine import Watch
from blob_hf.app.inputs import MOST_SAMPLES
from blob_hf.app.promises import Promise
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

# Requests that wait for an engine hold a thread each; the server has 40, and needs some for all else.
ENGINE: dict[str, Any] = {"concurrency_limit": 16, "concurrency_id": "engine"}
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_SHOWN = 80  # characters of an example in the list


def sentence(error: Exception) -> str:
    """What a visitor is told of an error; of one that is nobody's mistake the log has kind and place, not the text."""
    if isinstance(error, BlobError):
        return str(error)
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "unknown place"
    logger.error("%s at %s while answering on the page", type(error).__name__, where)
    return f"Something went wrong inside ({type(error).__name__}); the log of the server says where."


def promised(promise: Promise | None) -> dict[str, Any]:
    """What the page's record says of decisions that were fitted to the adapter, beside them; nothing without a rule."""
    return {} if promise is None else {"guarantee": promise.said, "guarantee_holds": promise.holds}


class Watches:
    """The running answer of each visitor, so that a page stops its own alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Watch] = {}

    @contextmanager
    def running(self, visitor: str | None) -> Iterator[Watch]:
        """A new answer; one of the same visitor that still runs ends."""
        watch, name = Watch(), visitor or f"api-{id(threading.current_thread())}"
        with self._lock:
            before, self._running[name] = self._running.get(name), watch
        if before is not None:
            before.stop()
        try:
            yield watch
        finally:
            watch.stop()  # also when the visitor has gone
            with self._lock:
                if self._running.get(name) is watch:
                    del self._running[name]

    def stop(self, visitor: str | None) -> None:
        """Stop a visitor's answer, if one runs."""
        with self._lock:
            watch = self._running.get(visitor or "")
        if watch is not None:
            watch.stop()


def example_list(examples: Sequence[Sequence[str]], boxes: Sequence[gr.Textbox]) -> None:
    """A list to fill the boxes from; nothing where there are no examples."""
    if not examples:
        return
    titles = [f"{number}. {_title(texts)}" for number, texts in enumerate(examples, start=1)]
    chosen = gr.Dropdown(titles, value=None, label="Example", filterable=False)

    def fill(title: str | None) -> list[str]:
        texts = list(examples[titles.index(title)]) if title in titles else []
        return (texts + [""] * len(boxes))[: len(boxes)]

    outputs: Any = list(boxes) if len(boxes) > 1 else boxes[0]
    call: Callable[[str | None], Any] = fill if len(boxes) > 1 else lambda title: fill(title)[0]
    chosen.input(call, chosen, outputs, queue=False, **HIDDEN)


def _title(texts: Sequence[str]) -> str:
    text = " | ".join(" ".join(one.split()) for one in texts)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def seed_box(value: int) -> gr.Number:
    """Which networks are drawn."""
    return gr.Number(value, precision=0, label="Seed of the samples")


def samples_slider(is_point: bool, value: int) -> gr.Slider:
    """How many networks to draw, so many at first; a point has none."""
    info = (
        "This adapter is a point: it has no networks to draw."
        if is_point
        else "Networks drawn; 0 is the posterior mean."
    )
    return gr.Slider(
        0,
        MOST_SAMPLES,
        value=0 if is_point else value,
        step=1,
        label="Samples N",
        info=info,
        interactive=not is_point,
        min_width=260,
    )
