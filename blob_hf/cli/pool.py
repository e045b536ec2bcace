"""A pool of unlabelled rows: the file as it is, and what a model reads of each row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from peft import TaskType

from blob_hf.cli.question_files import questions_of
from blob_hf.cli.row_files import LABELS, Row
from blob_hf.data.columns import IDS, check_texts, chosen_columns
from blob_hf.data.loading import load_files
from blob_hf.inference.choices import ChoiceScoring
from blob_hf.tuner.adapter_files import read_config
from blob_hf.utils.errors import BlobError


@dataclass(frozen=True)
class Pool:
    """Rows to choose from, on the disk where their format allows it.

    Attributes:
        rows: As the file has them, with all columns.
        columns: The one or two that hold the texts; none of questions.
        questions: Of multiple choice, row by row; None of texts.
    """

    rows: Dataset
    columns: tuple[str, ...]
    questions: Dataset | None = None

    @classmethod
    def read(
        cls, folder: Path, path: str, columns: Sequence[str] | None = None, delimiter: str | None = None
    ) -> "Pool":
        """The rows of a file for the adapter in a folder; labels are not read.

        Args:
            columns: Of the texts; default those that can only be meant.

        Raises:
            BlobError: An adapter that writes texts; a file that cannot be read, has no rows, or not what the adapter
                reads in each of them.
        """
        scoring = ChoiceScoring.load(folder)
        if scoring is None and read_config(folder).task_type != TaskType.SEQ_CLS:
            raise BlobError("acquire is for adapters of classifiers and of multiple choice; this one writes texts")
        rows = load_files({"pool": path}, delimiter)["pool"]
        if len(rows) == 0:
            raise BlobError(f"--pool {path} has no rows")
        if scoring is not None:
            questions = questions_of(rows, path)
            scoring.check_width(max(map(len, questions["choices"])))
            return cls(rows, (), questions)
        own = chosen_columns(rows, columns, LABELS)
        check_texts(DatasetDict({"pool": rows}), own)
        return cls(rows, own)

    def __len__(self) -> int:
        return len(self.rows)

    def inputs(self, start: int, stop: int) -> list[Any]:
        """What `BlobModel.predict` takes of these rows."""
        if self.questions is not None:
            return self.questions.select(range(start, min(stop, len(self)))).to_list()
        part = self.rows[start:stop]
        return list(zip(*(part[name] for name in self.columns), strict=True))

    def row(self, index: int) -> Row:
        """A row for a file: all its columns, before them its index as `id` where it has no name of its own."""
        found = {name: _plain(value) for name, value in self.rows[index].items()}
        return found if any(name in found for name in IDS) else {"id": index, **found}


def _plain(value: Any) -> Any:
    """A value as JSON has it; of other kinds (dates, bytes) its text."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)
