"""Questions with choices: tasks by name, data sets of the Hub, or the user's own files, and how they are asked.

All become rows of `question`, `choices` (a list), `label` (an index) and, where there is one, `passage`.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from blob_hf.data.loading import load_files, load_hub
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)
Row = Mapping[str, Any]
MOST_CHOICES = len(ascii_uppercase)
MAX_PASSAGE = 1024  # characters, as in the authors' code


# ----- how a question is asked ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """Templates of a question.

    Attributes:
        letter: What precedes the letter; fields question, passage, lettered (choices, one a line).
        text: What precedes a choice's text; fields question, passage.
        separator: Between that and the text.
        answers: The words that stand for the choices where the letter would be; none: letters.
        fills_blank: Whether the text of a choice stands for the blank `_` in the question, and the words after that are
            scored, the same ones under each choice (Trinh & Le, 2018; lm-evaluation-harness does WinoGrande so).
    """

    letter: str
    text: str = "Question: {question}\nAnswer:"
    separator: str = " "
    answers: tuple[str, ...] = ()
    fills_blank: bool = False

    def answer_words(self, count: int) -> tuple[str, ...]:
        """What the model answers with for each of so many choices, in their order."""
        return self.answers or tuple(ascii_uppercase[:count])


# Prompts of Wang et al. (github Wang-ML-Lab/bayesian-peft), choices as "A) text"
_LABEL_OF_ANSWER = (
    "Return the label of the correct answer for the question below.\n\n"
    "Question: {question}\nChoices:\n{lettered}\nAnswer:"
)
_OF_PASSAGE = (
    "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
    "Passage: {passage}\nQuestion: {question}\nAnswer (true or false):"
)
PUBLISHED = Asking(_LABEL_OF_ANSWER)
READING = Asking(_OF_PASSAGE, "{passage}\nQuestion: {question}?\nAnswer:", answers=("false", "true"))
BLANK = Asking(_LABEL_OF_ANSWER, fills_blank=True)
CONTINUED = Asking(_LABEL_OF_ANSWER, "{question}")  # OpenBookQA's stems are to be continued


@dataclass(frozen=True)
class ChoiceTask:
    """A named task.

    Attributes:
        dataset, config: On the Hub.
        read: From a row there to a row of ours.
        asking: How it is asked.
        test: Its split of unseen labelled questions, if it has one.
    """

    dataset: str
    config: str | None
    read: Callable[[Row], dict[str, Any]]
    asking: Asking = PUBLISHED
    test: str | None = "test"


def _read_arc(row: Row) -> dict[str, Any]:
    question = row.get("question") or row.get("question_stem")
    answer = str(row.get("answerKey") or "")
    if not isinstance(row["choices"], Mapping):
        return {"question": question, "choices": row["choices"], "label": answer}
    labels = [str(label) for label in row["choices"]["label"]]
    return {
        "question": question, "choices": row["choices"]["text"], "label": labels.index(answer) if answer else None,
    }  # fmt: skip


def _read_winogrande(row: Row) -> dict[str, Any]:
    answer = str(row.get("answer") or "")
    label = int(answer) - 1 if answer else None
    return {"question": row["sentence"], "choices": [row["option1"], row["option2"]], "label": label}


def _read_boolq(row: Row) -> dict[str, Any]:
    answer = row.get("answer", row.get("label"))
    return {
        "question": row["question"], "passage": row["passage"][:MAX_PASSAGE], "choices": ["false", "true"],
        "label": None if answer in (None, "") else int(answer),
    }  # fmt: skip


_ARC, _WINOGRANDE = "allenai/ai2_arc", "allenai/winogrande"
TASKS = {
    "arc_challenge": ChoiceTask(_ARC, "ARC-Challenge", _read_arc),
    "arc_easy": ChoiceTask(_ARC, "ARC-Easy", _read_arc),
    "openbookqa": ChoiceTask("allenai/openbookqa", "main", _read_arc, CONTINUED),
    "winogrande_s": ChoiceTask(_WINOGRANDE, "winogrande_s", _read_winogrande, BLANK, test=None),
    "winogrande_m": ChoiceTask(_WINOGRANDE, "winogrande_m", _read_winogrande, BLANK, test=None),
    "boolq": ChoiceTask("google/boolq", None, _read_boolq, READING, test=None),
}


def find_task(name: str) -> ChoiceTask:
    """The task of a name.

    Raises:
        BlobError: There is none.
    """
    if name not in TASKS:
        raise BlobError(f"task_name must be one of {', '.join(TASKS)}, got {name!r}; for own data use --train_file")
    return TASKS[name]


# ----- loading ----------------------------------------------------------------------------------------------------


def load_choices(
    task_name: str | None = None, files: Mapping[str, str] | None = None, dataset: tuple[str, str | None] | None = None
) -> DatasetDict:
    """Questions by split.

    Args:
        task_name: A key of `TASKS`: where the data is unless files are given, and how it is asked.
        files: Paths by split: train, validation, test, calibration.
        dataset: A data set of the Hub or a folder of one, and its configuration.

    Raises:
        BlobError: Nothing to load; a column missing; a question with an empty choice, fewer than 2 or more than 26, or
            a label that is none of them.
    """
    task = None if task_name is None else find_task(task_name)
    own = {split: path for split, path in (files or {}).items() if split != "calibration"}
    if own or (task is None and dataset is None):
        if not own:
            raise BlobError("no data: give --task_name, --train_file, --validation_file or --dataset_name")
        data = load_files(dict(files or {}))
    else:
        name, config = dataset or (task.dataset, task.config)  # type: ignore[union-attr]
        data = load_hub(name, config, "--train_file and --validation_file")
        data.update(load_files({split: path for split, path in (files or {}).items() if split == "calibration"}))
    return DatasetDict({split: _rows(split, rows, _reader(split, rows, task)) for split, rows in data.items()})


def require_answers(splits: Mapping[str, Dataset], *names: str) -> None:
    """Refuse questions without labels where something is learned from them.

    Args:
        names: Of such splits; those that are not there are passed over.

    Raises:
        BlobError: One has no labels.
    """
    for name in names:
        if name in splits and "label" not in splits[name].column_names:
            raise BlobError(
                f"the {name} split has no labels, which it needs: add the column label (index, letter or text)"
            )


def questions(rows: Dataset, labelled: bool = True) -> Dataset:
    """Questions in any of the forms that `load_choices` reads.

    Args:
        labelled: Whether labels are read; else all may have one, none, or some.

    Raises:
        BlobError: As `load_choices`.
    """
    return _rows("inputs", rows, _reader("inputs", rows, None), labelled)


def holds_questions(columns: Collection[str]) -> bool:
    """Whether a table with these columns is in one of the forms that `load_choices` reads by themselves."""
    return _form_of(columns) is not None


def _form_of(columns: Collection[str]) -> Callable[[Row], dict[str, Any]] | None:
    """The reader of the first form that has these columns."""
    return next((read for form, read in _FORMS if form <= set(columns)), None)


def _reader(split: str, rows: Dataset, task: ChoiceTask | None) -> Callable[[Row], dict[str, Any]]:
    """The reader of a named task for a split in its own columns, else that of the form that it has."""
    columns = rows.column_names
    if task is not None and not {"question", "choices", "label"} <= set(columns):
        return task.read
    found = _form_of(columns)
    if found is None:
        missing = next((name for name in ("question", "choices") if name not in columns), None)
        if missing is not None:
            raise BlobError(
                f"the {split} split has no column {missing!r}, only {', '.join(columns)}; questions have the columns "
                "question, choices and label"
            )
    return found or _read_own


def _read_own(row: Row) -> dict[str, Any]:
    found = {"question": row["question"], "choices": row["choices"], "label": row.get("label")}
    return found | ({"passage": row["passage"]} if row.get("passage") is not None else {})


_FORMS: tuple[tuple[set[str], Callable[[Row], dict[str, Any]]], ...] = (  # the first that fits counts
    ({"sentence", "option1", "option2"}, _read_winogrande),
    ({"choices", "answerKey"}, _read_arc),
    ({"question", "choices"}, _read_own),
    ({"question", "passage"}, _read_boolq),
)


def _rows(split: str, rows: Dataset, read: Callable[[Row], dict[str, Any]], labelled: bool = True) -> Dataset:
    found = []
    for number, row in enumerate(rows, start=1):
        where = f"{split}, question {number}"
        try:
            one = read(row)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BlobError(f"{where}: cannot be read as a question with choices ({error!r})") from error
        one["choices"] = _choices(one["choices"], where)
        one["label"] = _label(one["label"], one["choices"], where) if labelled else None
        if not isinstance(one["question"], str) or not one["question"].strip():
            raise BlobError(f"{where} is empty")
        found.append({**({"id": row["id"]} if "id" in row else {}), **one})
    if len({type(one["id"]) for one in found if one.get("id") is not None}) > 1:  # a column has one type
        found = [{**one, "id": None if one["id"] is None else str(one["id"])} for one in found]
    if not found:
        raise BlobError(f"{split} has no questions")
    if all(one["label"] is None for one in found):
        for one in found:
            del one["label"]
    elif any(one["label"] is None for one in found):
        missing = next(number for number, one in enumerate(found, start=1) if one["label"] is None)
        raise BlobError(f"{split}, question {missing} has no label, but others have; leave all out, or none")
    return table(found)


def table(rows: Sequence[Row]) -> Dataset:
    """Rows as a data set with the columns that any of them has; `Dataset.from_list` knows those of the first alone."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list([{name: row.get(name) for name in columns} for row in rows])


def _choices(choices: Any, where: str) -> list[str]:
    if not isinstance(choices, (list, tuple)) or not all(isinstance(one, str) for one in choices):
        raise BlobError(f"{where}: choices must be a list of texts, got {str(choices)[:60]!r}")
    if not 2 <= len(choices) <= MOST_CHOICES:
        raise BlobError(f"{where} has {len(choices)} choices; it must have 2 to {MOST_CHOICES}")
    if any(not one.strip() for one in choices):
        raise BlobError(f"{where}: choice {ascii_uppercase[[bool(c.strip()) for c in choices].index(False)]} is empty")
    return [one.strip() for one in choices]


def _label(label: Any, choices: Sequence[str], where: str) -> int | None:
    """An index, or the letter or the text of a choice, as an index."""
    if label is None or label == "" or label != label:  # NaN is what pandas writes for none
        return None
    if isinstance(label, str):
        label, letter = label.strip(), label.strip().upper()
        if label in choices:
            return choices.index(label)
        if re.fullmatch("[A-Z]", letter) and ascii_uppercase.index(letter) < len(choices):
            return ascii_uppercase.index(letter)
    elif isinstance(label, (int, float)) and label in range(len(choices)):
        return int(label)
    raise BlobError(
        f"{where}: the label {label!r} is none of its {len(choices)} choices (index from 0, letter or text)"
    )


# ----- asking -----------------------------------------------------------------------------------------------------


def letter_prompt(row: Row, asking: Asking) -> str:
    """A question up to the letter of its answer."""
    lettered = "\n".join(f"{letter}) {text}" for letter, text in zip(ascii_uppercase, row["choices"], strict=False))
    return asking.letter.format(question=row["question"], passage=row.get("passage") or "", lettered=lettered).lstrip()


def continuations(row: Row, asking: Asking) -> Iterator[tuple[str, str]]:
    """What precedes each choice's text, and the text that is scored.

    Raises:
        BlobError: A question that is asked by its blank has none.
    """
    before, blank, after = row["question"].partition("_") if asking.fills_blank else ("", "", "")
    if asking.fills_blank and not blank:
        raise BlobError(f"{row['question'][:40]!r} has no blank _ for its choices")
    for choice in row["choices"]:
        if blank:
            yield before + choice, f" {after.strip()}"
        else:
            context = asking.text.format(question=row["question"], passage=row.get("passage") or "").lstrip()
            yield context, asking.separator + choice


@dataclass
class _Cut:
    """Questions that were too long, and lost their beginning."""

    count: int = 0


def tokenize_choices(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, asking: Asking, scoring: str, max_length: int,
    normalization: str = "none", **mapping: Any,
) -> Dataset:  # fmt: skip
    """Rows for `blob_hf.inference.choices.ChoiceCollator`; what is too long loses its beginning, and the log counts it.

    Raises:
        BlobError: A choice's text alone is longer than allowed.
    """
    cut = _Cut()

    def shortened(ids: list[int]) -> list[int]:
        cut.count += len(ids) > max_length
        return ids[-max_length:]

    def encode(row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {"num_choices": len(row["choices"])}
        if row.get("label") is not None:
            found["labels"] = row["label"]
        if scoring == "letter":
            return found | {"input_ids": shortened(tokenizer(letter_prompt(row, asking)).input_ids)}
        pairs = list(continuations(row, asking))
        parts = [_encoded(tokenizer, *pair) for pair in pairs]
        if any(len(text) >= max_length for _, text in parts):  # nothing would be left to continue
            raise BlobError(f"a choice of {row['question'][:40]!r} alone is longer than max_length {max_length}")
        lengths = {"none": lambda i: 1.0, "characters": lambda i: float(len(pairs[i][1].strip()))}
        length = lengths.get(normalization, lambda i: float(len(parts[i][1])))
        return found | {
            "input_ids": [shortened(context + text) for context, text in parts],
            "choice_tokens": [len(text) for _, text in parts],
            "choice_lengths": [length(index) for index in range(len(parts))],
        }

    mapping.setdefault("load_from_cache_file", False)  # the count below is made on the way
    tokenized = rows.map(encode, remove_columns=rows.column_names, **mapping)
    if cut.count:
        logger.warning("%d of the prompts are longer than %d tokens and lose their beginning", cut.count, max_length)
    return tokenized


def _encoded(tokenizer: PreTrainedTokenizerBase, context: str, text: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows, encoded together, as lm-evaluation-harness does."""
    stripped = context.rstrip()
    context, text = stripped, context[len(stripped) :] + text
    whole, start = tokenizer(context + text).input_ids, tokenizer(context).input_ids
    return whole[: len(start)], whole[len(start) :]
