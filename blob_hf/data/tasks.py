"""The classification tasks of GLUE and SuperGLUE by name, and why the others are not among them."""

from dataclasses import dataclass

from blob_hf.utils.errors import BlobError

_GLUE, _SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"


@dataclass(frozen=True)
class Task:
    """A named task: where it lives on the Hub and which columns hold its texts.

    Attributes:
        word_column: A word both texts are about, put before the first text (WiC).
        validation, test: Its splits of these meanings.
    """

    dataset: str
    text_columns: tuple[str, ...]
    word_column: str | None = None
    validation: str = "validation"
    test: str = "test"


PUBLISHED = ("rte", "mrpc", "cola", "wic", "boolq")
TASKS = {
    "rte": Task(_GLUE, ("sentence1", "sentence2")),
    "mrpc": Task(_GLUE, ("sentence1", "sentence2")),
    "cola": Task(_GLUE, ("sentence",)),
    "wic": Task(_SUPER_GLUE, ("sentence1", "sentence2"), word_column="word"),
    "boolq": Task(_SUPER_GLUE, ("passage", "question")),
    "sst2": Task(_GLUE, ("sentence",)),
    "qqp": Task(_GLUE, ("question1", "question2")),
    "mnli": Task(_GLUE, ("premise", "hypothesis"), validation="validation_matched", test="test_matched"),
    "qnli": Task(_GLUE, ("question", "sentence")),
    "wnli": Task(_GLUE, ("sentence1", "sentence2")),
    "cb": Task(_SUPER_GLUE, ("premise", "hypothesis")),
}
_MULTIPLE_CHOICE = "it is multiple choice: the answers differ from row to row, a classifier's classes do not"
_DIAGNOSTIC = "it has test rows alone and nothing to train on"
_LEFT_OUT = {
    "stsb": "it is regression: its labels are similarities from 0 to 5, not classes",
    "copa": _MULTIPLE_CHOICE,
    "multirc": _MULTIPLE_CHOICE,
    "record": _MULTIPLE_CHOICE,
    "wsc": "it asks about two spans of a text, which a classifier of texts does not see",
    "wsc.fixed": "it asks about two spans of a text, which a classifier of texts does not see",
    "ax": _DIAGNOSTIC,
    "axb": _DIAGNOSTIC,
    "axg": _DIAGNOSTIC,
}


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
        BlobError: There is none, or it is not one of classifying texts.
    """
    if name in _LEFT_OUT:
        raise BlobError(f"task_name {name} is no task for a classifier of texts: {_LEFT_OUT[name]}")
    if name not in TASKS:
        raise BlobError(f"task_name must be one of {', '.join(TASKS)}, got {name!r}; for own data use --train_file")
    return TASKS[name]
