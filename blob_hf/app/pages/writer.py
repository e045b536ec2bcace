"""The page of a model that writes: a summarizer, or a causal model with or without conversations."""

import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr

from blob_hf.app.engine import CHAT, Engine, Progress, Stopped, TextAnswer, Watch, Writing
from blob_hf.app.inputs import MOST_SAMPLES, MOST_SEED, checked_count, checked_number, checked_text
from blob_hf.app.markup import escape, message
from blob_hf.app.pages.common import (
    ENGINE,
    HIDDEN,
    Watches,
    example_list,
    promised,
    samples_slider,
    seed_box,
    sentence,
)
from blob_hf.app.promises import fitted_number
from blob_hf.app.text_markup import progress_html, text_html
from blob_hf.app.text_view import fitted_abstention, text_view
from blob_hf.baselines.conformal_texts import TextAbstention
from blob_hf.data.conversations import Conversation

MOST_TOKENS = 1024
_TICK = 0.15  # seconds between looks at what is written
DECODING_CHOICES = [
    ("predictive: of averaged probabilities", "predictive"),
    ("MBR: the sample most like the others", "mbr"),
]
_TITLES = {"predictive": "The posterior predictive's text", "mbr": "The MBR choice, read by all networks"}

Shown = tuple[str, str, Conversation, str]


class WriterPage:
    """What the page does, and how it is laid out.

    Args:
        examples: Texts.
        max_new_tokens: Where the slider stands at first, if it goes so far.
        api_name: Under which `gradio_client` finds the records of `model.predict`.
    """

    def __init__(
        self, engine: Engine, examples: list[tuple[str, ...]], max_new_tokens: int = 128, api_name: str = "predict"
    ) -> None:
        self.engine, self.examples = engine, examples
        self.rule = engine.rule if isinstance(engine.rule, TextAbstention) else None
        longest = fitted_number(self.rule, "max_new_tokens", MOST_TOKENS, min(max_new_tokens, MOST_TOKENS))
        self.max_new_tokens, self.api_name = longest, api_name
        self.talks = engine.kind == CHAT and engine.has_template
        self.watches = Watches()

    # ----- what it does -----

    def predict(
        self,
        text: str,
        num_samples: int = 10,
        temperature: float = 0.0,
        decoding: str = "predictive",
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> dict[str, Any]:
        """The record of `model.predict` for a text (of a chat: the first message of a user)."""
        try:
            how = self._how(num_samples, temperature, decoding, max_new_tokens, seed)
            found = self.engine.write(self._asked(checked_text(text), []), how)
        except Exception as error:
            return {"error": sentence(error)}
        return {**found.prediction.records()[0], "note": found.note, **promised(found.promise)}

    def answer(
        self,
        text: str,
        turns: Conversation,
        num_samples: float,
        temperature: float,
        decoding: str,
        max_new_tokens: float,
        seed: float,
        request: gr.Request,
    ) -> Iterator[Shown]:
        """Message, answer as HTML, the conversation and it as HTML, again and again until the answer is whole."""
        before = list(turns or [])
        try:
            how = self._how(num_samples, temperature, decoding, max_new_tokens, seed)
            asked = self._asked(checked_text(text, "message" if self.talks else "text"), before)
            with self.watches.running(request.session_hash) as watch:
                work = _Work(self.engine, asked, how, watch)
                count = 0 if self.engine.is_point else how.num_samples
                for progress in work.progress():
                    yield progress_html(progress, count), "", before, turns_html(before)
                found = work.result()
            fitted = fitted_abstention(found.prediction, self.rule, found.promise, count > 0)
            view = text_view(found.prediction, self.engine.tokenizer, fitted)
            title = _TITLES[how.decoding] if count else "The posterior mean's text (N=0)"
            after = [*asked, {"role": "assistant", "content": view.text}] if isinstance(asked, list) else []
            yield message(found.note), text_html(view, title, count > 0), after, turns_html(after)
        except Stopped:
            yield message("Stopped."), "", before, turns_html(before)
        except Exception as error:
            yield message(sentence(error), "error"), "", before, turns_html(before)

    def stop(self, request: gr.Request) -> None:
        """End this visitor's answer at its next token."""
        self.watches.stop(request.session_hash)

    def fresh(self, request: gr.Request) -> Shown:
        """A new conversation; an answer that is still written belongs to the old one, and ends."""
        self.stop(request)
        return "", "", [], ""

    def _asked(self, text: str, turns: Conversation) -> str | Conversation:
        return [*turns, {"role": "user", "content": text}] if self.talks else text

    def _how(self, count: object, temperature: object, decoding: object, tokens: object, seed: object) -> Writing:
        return Writing(
            checked_count(count, "Samples N", 0, MOST_SAMPLES), checked_count(seed, "The seed", 0, MOST_SEED),
            str(decoding), checked_number(temperature, "The temperature", 0, 2),
            checked_count(tokens, "The longest answer", 1, MOST_TOKENS),
        )  # fmt: skip

    # ----- how it stands -----

    def build(self) -> None:
        """Lay it out inside the current Blocks."""
        turns = gr.State([])
        talk = gr.HTML(padding=False, elem_id="turns", visible=self.talks)
        label = (
            "Your message" if self.talks else "Text to go on from" if self.engine.kind == CHAT else "Dialogue or text"
        )
        text = gr.Textbox(label=label, lines=3 if self.talks else 6, max_lines=16, placeholder="Write or paste a text")
        example_list(self.examples, [text])
        with gr.Row():
            count = samples_slider(self.engine.is_point, fitted_number(self.rule, "num_samples", MOST_SAMPLES, 10))
            temperature = gr.Slider(
                0, 2, value=0, step=0.05, label="Temperature of the samples", min_width=260,
                info="0: each network writes its likeliest text; above it draws its tokens.",
            )  # fmt: skip
        own = None if self.rule is None else self.rule.fitted_to.get("decoding")
        decoding = gr.Radio(
            DECODING_CHOICES, value=own if own in _TITLES else "predictive",
            label="Decoding: which text is shown with its tokens",
        )  # fmt: skip
        with gr.Accordion("More settings", open=False):
            tokens = gr.Slider(1, MOST_TOKENS, value=self.max_new_tokens, step=1, label="Longest answer (tokens)")
            seed = seed_box(fitted_number(self.rule, "seed", MOST_SEED, 0))
        with gr.Row():
            run = gr.Button("Send" if self.talks else "Write", variant="primary", elem_id="write", scale=3)
            stop = gr.Button("Stop", elem_id="stop", scale=1)
            clear = gr.Button("New conversation", visible=self.talks, scale=1)
        said = gr.HTML(padding=False, elem_id="writer-message")
        shown = gr.HTML(padding=False, elem_id="written")
        inputs, outputs = [text, turns, count, temperature, decoding, tokens, seed], [said, shown, turns, talk]
        answered = run.click(self.answer, inputs, outputs, **ENGINE, **HIDDEN)
        if self.talks:
            answered.then(unsent, [text, turns], text, queue=False, **HIDDEN)
        stop.click(self.stop, None, None, queue=False, **HIDDEN)
        clear.click(self.fresh, None, outputs, queue=False, cancels=[answered], **HIDDEN)
        gr.api(self.predict, api_name=self.api_name, **ENGINE)


class _Work:
    """An answer in a thread of its own, so that its progress can be looked at meanwhile."""

    def __init__(self, engine: Engine, asked: str | Conversation, how: Writing, watch: Watch) -> None:
        self._watch = watch
        self._found: TextAnswer | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(engine, asked, how), daemon=True)
        self._thread.start()

    def _run(self, engine: Engine, asked: str | Conversation, how: Writing) -> None:
        try:
            self._found = engine.write(asked, how, self._watch)
        except BaseException as error:
            self._error = error

    def progress(self) -> Iterator[Progress]:
        """What is reported until it has ended."""
        while self._thread.is_alive():
            found = self._watch.newest(_TICK)
            if found is not None:
                yield found
        self._thread.join()

    def result(self) -> TextAnswer:
        """The answer; raises what its thread has raised."""
        if self._error is not None:
            raise self._error
        assert self._found is not None
        return self._found


def unsent(text: str, turns: Conversation) -> str:
    """What stays in the box: nothing of a message that was answered, all of one that was refused or stopped."""
    return "" if len(turns) > 1 and turns[-2]["content"] == text else text


def turns_html(turns: Conversation) -> str:
    """The conversation so far; the last answer is shown with its tokens below."""
    names = {"user": "You", "assistant": "Model", "system": "System"}
    return "".join(
        f'<div class="blob-turn"><b>{escape(names.get(str(one["role"]), str(one["role"])))}</b>'
        f"{escape(str(one['content']))}</div>"
        for one in turns
    )
