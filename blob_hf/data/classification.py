"""Rows to classify: tasks by name, data sets of the Hub, or the user's own files."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from blob_hf.data import labels
from blob_hf.data.columns import IDS, check_texts, chosen_columns, find_text_columns
from blob_hf.data.loading import load_files, load_hub, named_file, require_columns
from blob_hf.data.tasks import TASKS, Task, find_task
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_MAY_LACK_LABELS = ("test", "ood", "shifted")  # is predicted, and scored only if there is something to score it by
_FEW = 10


@dataclass(frozen=True)
class ClassificationData:
    """Splits with their text columns and, where labels are known, an integer column `label` in range(len(label_names)).

    Attributes:
        label_names: Of the classes, in the order of their ids.
        word_column: A word that both texts are about.
        label_column: What the labels' column was called.
    """

    splits: DatasetDict
    text_columns: tuple[str, ...]
    label_names: list[str]
    word_column: str | None = None
    label_column: str = "label"

    def texts(self, split: str) -> list[str]:
        """The texts of each row, side by side, to show."""
        columns = (self.splits[split][column] for column in self.text_columns)
        return [" | ".join(parts) for parts in zip(*columns, strict=True)]

    def inputs(self, split: str) -> list[dict[str, Any]]:
        """What tells a row from others, to write beside its prediction: its id if it has one, and its texts."""
        rows = self.splits[split]
        names = [name for name in IDS if name in rows.column_names][:1]
        names += [name for name in (self.word_column, *self.text_columns) if name]
        return [dict(zip(names, values, strict=True)) for values in zip(*(rows[name] for name in names), strict=True)]

    def describe(self) -> str:
        """Columns, classes and numbers of rows, in a line."""
        texts = [name for name in (self.word_column, *self.text_columns) if name]
        ignored = {name for rows in self.splits.values() for name in rows.column_names}
        ignored -= {*texts, *IDS, "label", self.label_column}
        counts = ", ".join(
            f"{split} {len(rows)}" + (" (no labels)" if "label" not in rows.column_names else "")
            for split, rows in self.splits.items()
        )
        return "; ".join(
            [
                f"texts: {' and '.join(texts)}",
                f"labels: {self.label_column}, {len(self.label_names)} classes ({self._class_counts()})",
                f"rows: {counts}",
                *([f"not read: {', '.join(sorted(ignored))}"] if ignored else []),
            ]
        )

    def log(self) -> None:
        """Say what is read."""
        logger.info(self.describe())

    def _class_counts(self) -> str:
        """Names of the classes, and how many training rows each has."""
        names = self.label_names
        if "train" not in self.splits:
            return labels.shown(names)
        counts = Counter(self.splits["train"]["label"])
        if len(names) <= _FEW:
            return ", ".join(f"{name} {counts[index]}" for index, name in enumerate(names))
        sizes = [counts[index] for index in range(len(names))]
        return f"{labels.shown(names[:3])} ...; {min(sizes)} to {max(sizes)} training rows each"


def load_classification(
    task_name: str | None = None,
    files: Mapping[str, str] | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str = "label",
    *,
    dataset: tuple[str, str | None] | None = None,
    delimiter: str | None = None,
    classes: Sequence[str] | int | None = None,
    with_test: bool = False,
) -> ClassificationData:
    """Load a task by name, a data set, or files (with the task's columns when both are given).

    Args:
        task_name: A key of `TASKS`, or None for other data.
        files: Paths by split: train, validation, test, calibration.
        text_columns: One or two columns; default the task's, or the only ones that can be meant.
        dataset: A data set of the Hub or a folder of one, and its configuration.
        delimiter: Of csv files; default found in each.
        classes: Names of the classes that an adapter knows, or their number if it does not name them; None takes those
            of the data.
        with_test: Whether the test split of a named task is loaded (of other data it always is).

    Raises:
        BlobError: Unknown task; no data; unclear or missing columns; an empty split; a label missing or unknown.
    """
    task = None if task_name is None else find_task(task_name)
    files = dict(files or {})
    held_out = {split: path for split, path in files.items() if split == "calibration"}
    own = [split for split in files if split not in held_out]
    if dataset and (own or task_name):
        other = f"--{own[0]}_file" if own else "--task_name"
        raise BlobError(f"--dataset_name and {other} are both given; leave one of them out")
    if own:
        data = load_files(files, delimiter)
    else:
        data = _task_splits(task, task_name, with_test) if task is not None else _dataset_splits(dataset)
        data.update(load_files(held_out, delimiter))
    named = text_columns or (task.text_columns if task else None)
    columns = chosen_columns(next(iter(data.values())), named, [label_column])
    word = task.word_column if task and not text_columns else None
    check_texts(data, [*columns, *([word] if word else [])])
    splits, names = _with_ids(data, label_column, classes)
    return ClassificationData(splits, columns, names, word, label_column)


def _task_splits(task: Task, name: str | None, with_test: bool) -> DatasetDict:
    hub = load_hub(task.dataset, name, "--train_file and --validation_file")
    wanted = {"train": "train", "validation": task.validation, **({"test": task.test} if with_test else {})}
    return DatasetDict({split: hub[own] for split, own in wanted.items()})


def _dataset_splits(dataset: tuple[str, str | None] | None) -> DatasetDict:
    if dataset is None:
        raise BlobError(
            "nothing to train on: give --task_name, --dataset_name, --train_file and --validation_file, or --demo"
        )
    hub = load_hub(*dataset, "--train_file and --validation_file")
    found = {split: hub[split] for split in SPLITS if split in hub}
    if not found:
        raise BlobError(f"{dataset[0]} has none of the splits {', '.join(SPLITS)}, only {', '.join(hub)}")
    return DatasetDict(found)


def _with_ids(data: DatasetDict, column: str, classes: Sequence[str] | int | None) -> tuple[DatasetDict, list[str]]:
    """Splits with class ids in a column `label` where there are labels, and the names of the classes."""
    found = {}
    for split, rows in data.items():
        require_columns(DatasetDict({split: rows}), [] if split in _MAY_LACK_LABELS else [column], "--label_column")
        if column in rows.column_names:
            names = labels.read_names(rows, column, split)
            if any(name is not None for name in names) or split not in _MAY_LACK_LABELS:
                found[split] = _complete(names, column, split)
    if isinstance(classes, int) or classes is None:
        if found:
            of_data = labels.class_names(data, found, column)
            classes = of_data if classes is None else labels.settle_names(of_data, classes)
        elif classes is not None:
            logger.warning("neither the adapter nor the data names the classes: they are called by their ids")
            classes = labels.unnamed(classes)
        else:
            raise BlobError("there are no labels, so nobody knows the classes; give the file with them as --train_file")
    splits = {}
    for split, rows in data.items():
        feature = rows.features.get(column)
        # a column `label` beside another one that has the labels would be taken for class ids
        bare = rows.remove_columns([name for name in {column, "label"} if name in rows.column_names])
        if split in found:
            bare = bare.add_column("label", labels.encode(found[split], classes, split, feature))
        splits[split] = bare
    return DatasetDict(splits), list(classes)


def _complete(names: labels.Names, column: str, split: str) -> labels.Names:
    missing = [row for row, name in enumerate(names) if name is None]
    if missing:
        hint = " (rows to predict only are for --test_file)" if len(missing) == len(names) else ""
        count = "all" if len(missing) == len(names) else f"{len(missing)} of {len(names)}"
        raise BlobError(
            f"row {missing[0]} of {split} has no label in column {column!r} ({count} rows have none); fill them in or "
            f"remove the rows{hint}"
        )
    return names


def with_names(data: ClassificationData, names: Sequence[str] | None) -> ClassificationData:
    """Data with the classes of a base model that knows the same: in its order, or by its names where data has none.

    Args:
        names: Of the base model; None if it has no names, or nothing to say.
    """
    own = data.label_names
    if names is None or len(names) != len(own) or list(names) == own:
        return data
    if own == labels.unnamed(len(own)):
        logger.info("the base model names the classes: %s", labels.shown(names))
        return dataclasses.replace(data, label_names=list(names))
    if set(names) != set(own):
        return data
    splits = {
        split: rows.remove_columns("label").add_column("label", [names.index(own[label]) for label in rows["label"]])
        if "label" in rows.column_names
        else rows
        for split, rows in data.splits.items()
    }
    return dataclasses.replace(data, splits=DatasetDict(splits), label_names=list(names))


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
    given, path = "=" in specification, named_file(specification)[1]
    if not given and specification in TASKS:
        other = load_classification(specification)
        rows = other.splits["validation"]
        return specification, _without_labels(other, rows)
    if not given and "." not in Path(path).name and not Path(path).is_dir():
        raise BlobError(f"--ood_tasks must be among {', '.join(TASKS)}, got {path!r}; for own data use --ood_file")
    name = named_file(specification)[0]
    splits = DatasetDict(shifted=load_files({"ood": path})["ood"])
    if name in TASKS:
        task = TASKS[name]
        check_texts(splits, [*task.text_columns, *([task.word_column] if task.word_column else [])])
        other = ClassificationData(splits, task.text_columns, data.label_names, task.word_column)
        return name, _without_labels(other, splits["shifted"])
    own = [*data.text_columns, *([data.word_column] if data.word_column else [])]
    fits = set(own) <= set(splits["shifted"].column_names)
    columns = data.text_columns if fits else find_text_columns(splits["shifted"], [label_column])
    check_texts(splits, columns)
    word = data.word_column if fits else None
    splits, _ = _with_ids(splits, label_column, data.label_names)
    return name, ClassificationData(splits, columns, data.label_names, word, label_column)


def _without_labels(other: ClassificationData, rows: Dataset) -> ClassificationData:
    bare = rows.remove_columns("label") if "label" in rows.column_names else rows
    return dataclasses.replace(other, splits=DatasetDict(shifted=bare))


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
