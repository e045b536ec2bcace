"""How rows are chosen, tokenized and batched, as arguments."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from blob_hf.data.loading import first_rows
from blob_hf.inference.predict import IGNORED_LABEL
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)
Batch = dict[str, Any]


@dataclass
class RowArguments:
    """How rows are chosen, tokenized and batched."""

    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for prediction."})
    shuffle_train_dataset: bool = field(
        default=False, metadata={"help": "Shuffle the training rows before the first ones are taken."}
    )
    shuffle_seed: int = field(default=42, metadata={"help": "Seed of --shuffle_train_dataset."})
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad every batch to the longest length allowed, for fixed shapes; else to its longest row."},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again what has been tokenized before."})

    def __post_init__(self) -> None:
        if self.preprocessing_num_workers is not None and self.preprocessing_num_workers < 1:
            raise BlobError(f"--preprocessing_num_workers must be >= 1, got {self.preprocessing_num_workers}")

    def limit(self, split: str) -> int | None:
        """At most so many rows of a split are used."""
        limits = {"train": self.max_train_samples, "test": self.max_predict_samples, "calibration": None}
        return limits.get(split, self.max_eval_samples)

    def chosen(self, rows: Dataset, split: str) -> Dataset:
        """The rows of a split that are used."""
        if split == "train" and self.shuffle_train_dataset:
            rows = rows.shuffle(seed=self.shuffle_seed)
        return first_rows(rows, self.limit(split))

    def mapping(self) -> dict[str, Any]:
        """What `Dataset.map` takes."""
        return {"num_proc": self.preprocessing_num_workers, "load_from_cache_file": not self.overwrite_cache}


def split_names(columns: Sequence[str] | None) -> list[str] | None:
    """Column names, also where they are written with commas: `a b`, `a,b` and `a, b` are the same."""
    if columns is None:
        return None
    return [name for part in columns for name in (one.strip() for one in part.split(",")) if name]


def require_split(splits: Mapping[str, Any], split: str) -> None:
    """Raise a BlobError when a split that is needed is not there."""
    if split not in splits:
        raise BlobError(f"there is no {split} split, only {', '.join(splits)}; give --{split}_file")


def asked_splits(args: TrainingArguments, splits: Collection[str]) -> list[tuple[str, str]]:
    """What a run is to evaluate: the prefix of the results, and the split, of each that is asked for and there.

    Args:
        splits: That there are.
    """
    asked = {("eval", "validation"): args.do_eval, ("predict", "test"): args.do_predict}
    return [(prefix, split) for (prefix, split), wanted in asked.items() if wanted and split in splits]


class FixedLengths:
    """A collator that pads every batch to the same lengths.

    Args:
        collate: Of rows of equal lengths.
        max_length: Of the inputs, in tokens.
        max_target_length: Of labels that are tokens.
    """

    def __init__(
        self, collate: Callable[[list[Batch]], Any], tokenizer: PreTrainedTokenizerBase, max_length: int,
        max_target_length: int | None = None,
    ) -> None:  # fmt: skip
        self.collate, self.tokenizer = collate, tokenizer
        self.max_length, self.max_target_length = max_length, max_target_length

    def __call__(self, rows: list[Mapping[str, Any]]) -> Any:
        return self.collate([self._padded(dict(row)) for row in rows])

    def _padded(self, row: Batch) -> Batch:
        inputs = {name: row[name] for name in self.tokenizer.model_input_names if name in row}
        padded = self.tokenizer.pad(inputs, padding="max_length", max_length=self.max_length)
        row.update({name: list(values) for name, values in padded.items()})
        if self.max_target_length is not None and "labels" in row:
            labels = list(row["labels"])
            row["labels"] = labels + [IGNORED_LABEL] * (self.max_target_length - len(labels))
        return row
