"""Classification tasks: the five of the paper by name, or the user's own files."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from blob_hf.data.loading import load_files, load_hub, require_columns
from blob_hf.utils.errors import BlobError


@dataclass(frozen=True)
class Task:
    """A named task: where it lives on the Hub and which columns hold its texts.

    Attributes:
        word_column: A word both texts are about, put before the first text (WiC).
    """

    dataset: str
    text_columns: tuple[str, ...]
    word_column: str | None = None


TASKS = {
    "rte": Task("nyu-mll/glue", ("sentence1", "sentence2")),
    "mrpc": Task("nyu-mll/glue", ("sentence1", "sentence2")),
    "cola": Task("nyu-mll/glue", ("sentence",)),
    "wic": Task("aps/super_glue", ("sentence1", "sentence2"), word_column="word"),
    "boolq": Task("aps/super_glue", ("passage", "question")),
}


@dataclass(frozen=True)
class ClassificationData:
    """Splits with their text columns and an integer column `label` in range(len(label_names))."""

    splits: DatasetDict
    text_columns: tuple[str, ...]
    label_names: list[str]
    word_column: str | None = None

    def texts(self, split: str) -> list[str]:
        """The texts of each row, side by side, to show."""
        columns = (self.splits[split][column] for column in self.text_columns)
        return [" | ".join(parts) for parts in zip(*columns, strict=True)]


def load_classification(
    task_name: str | None = None,
    files: dict[str, str] | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str = "label",
) -> ClassificationData:
    """Load a task by name, or from files (with the task's columns when both are given).

    Args:
        task_name: A key of `TASKS`, or None for files of another task.
        files: Paths by split, `train` and `validation`.
        text_columns: One or two columns; default the task's, else sentence1/sentence2, else the first text columns.

    Raises:
        BlobError: Unknown task; no data; a missing column; an empty split; a label outside the range.
    """
    if task_name is not None and task_name not in TASKS:
        raise BlobError(
            f"task_name must be one of {', '.join(TASKS)}, got {task_name!r}; for own data use --train_file"
        )
    task = TASKS[task_name] if task_name is not None else None
    files = files or {}
    held_out = {split: path for split, path in files.items() if split == "calibration"}
    if len(files) > len(held_out):
        data = load_files(files)
    elif task is not None and task_name is not None:
        hub = load_hub(task.dataset, task_name, "--train_file and --validation_file")
        data = DatasetDict({name: hub[name] for name in ("train", "validation")})
        data.update(load_files(held_out))
    else:
        raise BlobError("nothing to train on: give --task_name, --train_file and --validation_file, or --demo")
    columns = tuple(text_columns) if text_columns else task.text_columns if task else _guess_columns(data, label_column)
    if not 1 <= len(columns) <= 2:
        raise BlobError(f"--text_columns takes one or two columns, got {', '.join(columns) or 'none'}")
    word = task.word_column if task and not text_columns else None
    require_columns(data, [*columns, *([word] if word else [])], "--text_columns")
    require_columns(data, [label_column], "--label_column")
    for split, rows in data.items():
        for column in columns:
            missing = [index for index, text in enumerate(rows[column]) if not isinstance(text, str)]
            if missing:
                raise BlobError(f"row {missing[0]} of {split} has no text in column {column!r}")
    names = _label_names(data, label_column)
    return ClassificationData(_encode_labels(data, label_column, names), columns, names, word)


def load_shifted(
    specifications: Sequence[str], data: ClassificationData, label_column: str = "label"
) -> dict[str, ClassificationData]:
    """Data from elsewhere by name, to see how a classifier takes it (see `load_one_shifted`).

    Raises:
        BlobError: Two have the same name, or as `load_one_shifted`.
    """
    found: dict[str, ClassificationData] = {}
    for specification in specifications:
        name, other = load_one_shifted(specification, data, label_column)
        if name in found:
            raise BlobError(f"two sets of shifted data are called {name!r}; name them: --ood_file {name}2=path")
        found[name] = other
    return found


def load_one_shifted(
    specification: str, data: ClassificationData, label_column: str = "label"
) -> tuple[str, ClassificationData]:
    """Data from elsewhere, to see how a classifier takes it: a split `shifted`, with labels only if they mean the same.

    Args:
        specification: A task's name (its validation split from the Hub), `task=file`, `name=file` or a file. The labels
            of a file that is not another task's, if it has any, are classes of `data`.
        data: What the classifier was trained for.

    Returns:
        A name, and the data.

    Raises:
        BlobError: As `load_classification`.
    """
    name, _, path = specification.partition("=") if "=" in specification else ("", "", specification)
    if not name and specification in TASKS:
        other = load_classification(specification)
        rows = other.splits["validation"]
        return specification, _without_labels(other, rows)
    if not name and "." not in Path(path).name:
        raise BlobError(f"--ood_tasks must be among {', '.join(TASKS)}, got {path!r}; for own data use --ood_file")
    name = name or Path(path).name.split(".")[0]
    if name in TASKS:
        other = load_classification(name, {"ood": path}, label_column=label_column)
        return name, _without_labels(other, other.splits["ood"])
    splits = DatasetDict(shifted=load_files({"ood": path})["ood"])
    own = [*data.text_columns, *([data.word_column] if data.word_column else [])]
    fits = set(own) <= set(splits["shifted"].column_names)
    columns = data.text_columns if fits else _guess_columns(splits, label_column)
    require_columns(splits, columns, "--text_columns")
    word = data.word_column if fits else None
    if label_column in splits["shifted"].column_names:
        splits = _encode_labels(splits, label_column, data.label_names)
    return name, ClassificationData(splits, columns, data.label_names, word)


def _without_labels(other: ClassificationData, rows: Dataset) -> ClassificationData:
    return dataclasses.replace(other, splits=DatasetDict(shifted=rows.remove_columns("label")))


def _guess_columns(data: DatasetDict, label_column: str) -> tuple[str, ...]:
    rows = next(iter(data.values()))
    if {"sentence1", "sentence2"} <= set(rows.column_names):
        return ("sentence1", "sentence2")
    texts = [name for name, feature in rows.features.items() if name != label_column and "string" in str(feature.dtype)]
    return tuple(texts[:2])


def _label_names(data: DatasetDict, column: str) -> list[str]:
    """Names of the classes: the dataset's own, the strings in train, or the integers up to the largest in train."""
    rows = data["train"] if "train" in data else next(iter(data.values()))
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = set(rows[column])
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if not all(isinstance(value, int) for value in values):
        raise BlobError(f"labels must be integers or strings, got {sorted(map(repr, values))[0]} in column {column!r}")
    if min(values) < 0:
        raise BlobError(f"a label is outside the range: {min(values)} in column {column!r}; labels start at 0")
    return [str(value) for value in range(max(max(values) + 1, 2))]


def _encode_labels(data: DatasetDict, column: str, names: list[str]) -> DatasetDict:
    ids = {name: index for index, name in enumerate(names)}
    splits = {}
    for split, rows in data.items():
        labels = [ids.get(value) if isinstance(value, str) else value for value in rows[column]]
        for row, (value, label) in enumerate(zip(rows[column], labels, strict=True)):
            if label is None or not 0 <= label < len(names):
                raise BlobError(
                    f"a label is outside the range: {value!r} in row {row} of {split}, "
                    f"but the {len(names)} classes are {', '.join(names[:10])}"
                )
        splits[split] = rows.remove_columns(column).add_column("label", labels)
    return DatasetDict(splits)


def tokenize_classification(
    data: ClassificationData, tokenizer: PreTrainedTokenizerBase, max_length: int, **mapping: Any
) -> DatasetDict:
    """Token ids of each row's one or two texts, truncated to `max_length`, with its `label` and nothing else.

    Args:
        mapping: For `Dataset.map` (`num_proc`, `load_from_cache_file`).
    """
    first, *second = data.text_columns
    if getattr(tokenizer, "pad_token", "") is None:
        raise BlobError("the tokenizer has no pad token, which batches need; choose a model that has one")
    max_length = min(max_length, getattr(tokenizer, "model_max_length", max_length))

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = batch[first]
        if data.word_column:
            texts = [f"{word}: {text}" for word, text in zip(batch[data.word_column], texts, strict=True)]
        return tokenizer(texts, *(batch[name] for name in second), truncation=True, max_length=max_length)

    splits = {}
    for split, rows in data.splits.items():
        extra = [name for name in rows.column_names if name != "label"]
        splits[split] = rows.map(encode, batched=True, remove_columns=extra, desc=f"Tokenizing {split}", **mapping)
    return DatasetDict(splits)
