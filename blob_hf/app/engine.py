"""A model that answers one visitor at a time, tells how far it is, and stops when it is told to."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from blob_hf.app import questions
from blob_hf.app.promises import Promise, fitted_number, fitted_rule, promise_of, sampling_as_fitted
from blob_hf.cli.adapters import load_networks
from blob_hf.data.conversations import Conversation
from blob_hf.data.summarization import DEFAULT_PROMPT, Prompt
from blob_hf.inference.answers import Prediction, TextPrediction
from blob_hf.inference.choices import ChoiceScoring
from blob_hf.inference.inputs import find_tokenizer, is_decoder, longest_input
from blob_hf.inference.predictor import how_written
from blob_hf.inference.texts import Text, encode
from blob_hf.tuner.adapter_files import read_config, resolve
from blob_hf.tuner.base_model import is_sequence_classifier
from blob_hf.tuner.posterior import sampling_of
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

CLASSIFIER, SUMMARIZER, CHAT, CHOICES = "classifier", "summarizer", "chat", "multiple choice"
MOST_BEAMS = 64
RUNNERS_UP = 5  # likeliest tokens that are kept at each place
_POLL = 0.1  # seconds
_UNCUT = 1_000_000  # tokens
# What models are by the ends of their classes' names, and these ends by PEFT's names of tasks.
_KINDS = {
    "ForSequenceClassification": CLASSIFIER, "ForConditionalGeneration": SUMMARIZER, "ForCausalLM": CHAT,
    "LMHeadModel": CHAT,
}  # fmt: skip
_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification", "SEQ_2_SEQ_LM": "ForConditionalGeneration", "CAUSAL_LM": "ForCausalLM",
    "TOKEN_CLS": "ForTokenClassification", "QUESTION_ANS": "ForQuestionAnswering",
}  # fmt: skip


class Stopped(Exception):
    """A visitor has stopped the answer."""


@dataclass(frozen=True)
class Progress:
    """How far an answer is.

    Attributes:
        stage: 0 for the first texts that are written, 1 for the next ...; -1 while it waits for its turn.
        texts: What is written so far, of each network, or the one text of all.
    """

    stage: int
    tokens: int = 0
    texts: tuple[str, ...] = ()


class Watch:
    """What a visitor's page and the running answer tell one another."""

    def __init__(self) -> None:
        self._progress: SimpleQueue[Progress] = SimpleQueue()
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the answer at its next token."""
        self._stop.set()

    def check(self) -> None:
        """Raises Stopped if it was stopped."""
        if self._stop.is_set():
            raise Stopped

    def report(self, progress: Progress) -> None:
        self._progress.put(progress)

    def newest(self, timeout: float) -> Progress | None:
        """The newest report, waiting at most so many seconds for one."""
        found = None
        try:
            found = self._progress.get(timeout=timeout)
            while True:
                found = self._progress.get_nowait()
        except Empty:
            return found


class _Follow(StoppingCriteria):
    """Tells a watch what `generate` has written, and ends it when told to; it rules nothing out."""

    def __init__(self, watch: Watch, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        self.watch, self.tokenizer, self.rows = watch, tokenizer, rows
        self._stage, self._length, self._start = -1, 0, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.watch.check()
        length = input_ids.shape[1]
        if self._stage < 0 or length <= self._length:
            self._stage, self._start = self._stage + 1, length - 1
        self._length = length
        each = max(1, len(input_ids) // self.rows)  # beams
        rows = input_ids[::each, self._start :]
        texts = self.tokenizer.batch_decode(rows if self._stage == 0 else rows[:1], skip_special_tokens=True)
        self.watch.report(Progress(self._stage, length - self._start, tuple(texts)))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Writing:
    """How a text is written: as of `blob_hf.inference.writing.write_texts`."""

    num_samples: int = 10
    seed: int = 0
    decoding: str = "predictive"
    temperature: float = 0.0
    max_new_tokens: int = 128


@dataclass(frozen=True)
class ClassAnswer:
    """The predictive's classes, those of the posterior mean, and what a visitor has to know besides.

    Attributes:
        promise: Of the decisions that were fitted to the adapter; None where none were.
    """

    prediction: Prediction
    mean: Prediction
    note: str
    promise: Promise | None = None


@dataclass(frozen=True)
class TextAnswer:
    """A text with what is known of it, and what a visitor has to know besides; `promise` as of `ClassAnswer`."""

    prediction: TextPrediction
    note: str
    promise: Promise | None = None


def check_adapter(adapter: str | Path, folder: Path, prompt: str | None) -> None:
    """Refuse what has no page, by an adapter's files alone: before anything is loaded or written.

    Args:
        adapter: As the user has named it.
        folder: Where its files are.
        prompt: Of a summarizer; None for none.

    Raises:
        BlobError: It tells classes of words, or something else; or the prompt is for nothing or has no place for the
            text.
    """
    chooses = ChoiceScoring.load(folder) is not None
    config = read_config(folder)
    name = (config.auto_mapping or {}).get("base_model_class") or _CLASSES.get(str(config.task_type or ""), "")
    if not chooses and "For" in name and not name.endswith(tuple(_KINDS)):
        raise BlobError(f"a page is for classifiers and models that write, not for {name} ({adapter})")
    if prompt is not None:
        kind = next((kind for end, kind in _KINDS.items() if name.endswith(end)), SUMMARIZER)
        if chooses or kind != SUMMARIZER:
            raise BlobError(f"a prompt is for summarizers; {adapter} is {f'for {CHOICES}' if chooses else f'a {kind}'}")
        Prompt(prompt)


class Engine:
    """An adapter that answers; requests of several visitors take turns, so that none sees another's samples.

    Args:
        adapter: Folder or Hub repo.
        prompt: Of a summarizer, with {dialogue}; default that which its decisions were fitted with, else its script's.
        device: Default a GPU if there is one.

    Raises:
        BlobError: It cannot be loaded, or is for something that has no page.
    """

    def __init__(self, adapter: str | Path, prompt: str | None = None, device: str | None = None) -> None:
        self.folder = resolve(adapter)
        check_adapter(adapter, self.folder, prompt)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_networks(self.folder).to(where)
        self.tokenizer = find_tokenizer(self.model)
        self._turn = threading.Lock()
        base: Any = self.model.get_base_model()
        scoring = self.model.companion(ChoiceScoring.slot)
        self.scoring = scoring if isinstance(scoring, ChoiceScoring) else None
        if self.scoring is not None:
            self.kind = CHOICES
        elif is_sequence_classifier(base):
            self.kind = CLASSIFIER
        elif base.config.is_encoder_decoder:
            self.kind = SUMMARIZER
        elif is_decoder(self.model):
            self.kind = CHAT
        else:
            raise BlobError(f"a page is for classifiers and models that write, not for {type(base).__name__}")
        self.rule = fitted_rule(self.model)
        then: Mapping[str, Any] = {} if self.rule is None else self.rule.fitted_to
        self.prompt = (prompt or then.get("prompt") or DEFAULT_PROMPT) if self.kind == SUMMARIZER else None
        self.beams: dict[str, Any] = {"num_beams": fitted_number(self.rule, "num_beams", MOST_BEAMS, 1) or 1}
        if self.beams["num_beams"] > 1:
            self.beams["length_penalty"] = then.get("length_penalty") or 1.0
        self.is_point = sampling_of(self.model, Sampling(1)).num_samples == 0  # no samples to draw
        if self.kind in (CLASSIFIER, CHOICES):  # what cannot be predicted is refused before there is a page
            self.classify(("a",) if self.scoring is None else questions.probe(self.scoring), 0)

    @property
    def class_names(self) -> list[str]:
        """Of a classifier, or the letters of choices, in the order of their ids."""
        config: Any = self.model.get_base_model().config
        return [str(config.id2label[index]) for index in range(config.num_labels)]

    @property
    def has_template(self) -> bool:
        """Whether its tokenizer can render conversations."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def classify(self, asked: tuple[str, ...] | questions.Question, num_samples: int, seed: int = 0) -> ClassAnswer:
        """The classes of a text or of a pair, or the choices of a question.

        Raises:
            BlobError: It does not fit the model.
        """
        sampling = sampling_as_fitted(self.rule, num_samples, seed)
        with self._turn:
            found = self.model.predict([asked], self.tokenizer, sampling)
            mean = self.model.predict([asked], self.tokenizer, 0)
            note = self._cut(asked, 0) if isinstance(asked, tuple) else self._cut_question(asked)
            promise = self._promise(sampling)
        assert isinstance(found, Prediction) and isinstance(mean, Prediction)
        return ClassAnswer(found, mean, note, promise)

    def write(self, asked: str | Conversation, how: Writing, watch: Watch | None = None) -> TextAnswer:
        """The answer to a text or a conversation.

        Raises:
            BlobError: As `BlobModel.predict`.
            Stopped: The watch was stopped.
        """
        watch = watch or Watch()
        follow = _Follow(watch, self.tokenizer, max(1, 0 if self.is_point else how.num_samples))
        text: Text = (asked,) if isinstance(asked, str) else asked
        room = how.max_new_tokens if self.kind == CHAT else 0
        sampling = sampling_as_fitted(self.rule, how.num_samples, how.seed)
        options: dict[str, Any] = {
            "decoding": how.decoding, "temperature": how.temperature, "max_new_tokens": how.max_new_tokens,
            **self.beams,
        }  # fmt: skip
        with self._own_turn(watch):
            found = self.model.predict(
                [asked], self.tokenizer, sampling, prompt=self.prompt, top_tokens=RUNNERS_UP,
                stopping_criteria=[follow], **options,
            )  # fmt: skip
            note = self._cut(text, room)
            promise = self._promise(sampling, how_written(self.model, self.prompt, options))
        assert isinstance(found, TextPrediction)
        return TextAnswer(found, note, promise)

    def _promise(self, sampling: Sampling, how: Mapping[str, object] | None = None) -> Promise | None:
        """Of the fitted decisions on an answer with these samples."""
        if self.rule is None:
            return None
        return promise_of(self.rule, self.model, sampling_of(self.model, sampling), how)

    @contextmanager
    def _own_turn(self, watch: Watch) -> Iterator[None]:
        """The model alone: tokens are drawn from torch's one random state, and memory is for one request."""
        if not self._turn.acquire(blocking=False):
            watch.report(Progress(-1))
            while not self._turn.acquire(timeout=_POLL):
                watch.check()
        try:
            watch.check()
            yield
        finally:
            self._turn.release()

    def _cut(self, text: Text, room: int) -> str:
        """What is said of a text that is longer than the model reads; "" of others."""
        limit = longest_input(self.model, self.tokenizer) - room
        ids: Sequence[int] = encode([text], self.tokenizer, self.prompt, _UNCUT, is_decoder(self.model))["input_ids"][0]
        return _left_out("text", len(ids), limit, "beginning" if is_decoder(self.model) else "end")

    def _cut_question(self, asked: questions.Question) -> str:
        """The same of a question."""
        assert self.scoring is not None
        count = max(len(self.tokenizer(text).input_ids) for text in questions.prompts(asked, self.scoring))
        return _left_out("question", count, self.scoring.max_length, "beginning")


def _left_out(what: str, count: int, limit: int, part: str) -> str:
    if count <= limit:
        return ""
    return f"The {what} has {count:,} tokens and the model reads {limit:,}: its {part} was left out."
