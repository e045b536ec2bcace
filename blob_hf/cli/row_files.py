"""Rows of text files: read from any format, appended in blocks, gone on with where a killed run stopped."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from blob_hf.data.columns import IDS, check_texts, chosen_columns
from blob_hf.data.conversations import is_conversation, prompt_column
from blob_hf.data.loading import load_files
from blob_hf.inference.texts import prompts_of
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

Row = dict[str, Any]

LABELS = ("label", "labels")  # of a file that was trained on
_RAGGED = ("prediction_set", "choices")  # lists of another length in each row
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


# ----- reading ---------------------------------------------------------------------------------------------------


def load_rows(path: str, delimiter: str | None, split: str) -> Dataset:
    """The rows of a file, read once by each process."""
    written = Path(path).stat().st_mtime_ns if Path(path).exists() else None
    return _load_once(path, delimiter, split, written)


@lru_cache(maxsize=2)
def _load_once(path: str, delimiter: str | None, split: str, written: int | None) -> Dataset:
    return load_files({split: path}, delimiter)[split]


@dataclass(frozen=True)
class TextFile:
    """A file of texts, of any format that `load_files` reads, that was looked through once.

    Attributes:
        columns: The one or two that hold the texts.
        id_column: `id` or `idx`, if there is one.
        count: Rows.
        fingerprint: Changes with the contents.
    """

    path: str
    delimiter: str | None
    split: str
    columns: tuple[str, ...]
    id_column: str | None
    count: int
    fingerprint: str

    @classmethod
    def survey(
        cls,
        path: str,
        columns: Sequence[str] | None = None,
        delimiter: str | None = None,
        split: str = "input",
        prompts: bool = False,
    ) -> "TextFile":
        """Read a file: count its rows, find its texts, and refuse what would fail later.

        Args:
            columns: Default those that can only be meant.
            split: What it is, for messages.
            prompts: Whether they are of a causal model: then the column may be that of its prompts or conversations
                (`blob_hf.data.conversations`), as it is wherever that holds messages.

        Raises:
            BlobError: No such file, of another format, or a row that cannot be read or has no text.
        """
        rows = load_rows(path, delimiter, split)
        own = prompt_column(rows.column_names)
        own = own if own and (prompts or is_table_of_messages(rows, own)) else None
        chosen = chosen_columns(rows, columns or ([own] if own else None), LABELS)
        if len(chosen) == 1 and is_table_of_messages(rows, chosen[0]):
            prompts_of(rows, chosen)
        else:
            check_texts(DatasetDict({split: rows}), chosen)
        id_column = next((name for name in IDS if name in rows.column_names), None)
        return cls(path, delimiter, split, chosen, id_column, len(rows), digest(Path(path)))

    def rows(self, start: int = 0) -> Iterator[Row]:
        """From row `start` on: `id` (the id column, else the index) and the texts by column."""
        rows = load_rows(self.path, self.delimiter, self.split)
        for index in range(start, self.count):
            row = rows[index]
            name = index if self.id_column is None else row[self.id_column]
            yield {"id": name, **{column: row[column] for column in self.columns}}


def is_table_of_messages(rows: Dataset, column: str) -> bool:
    """Whether a column has lists in it, and not texts."""
    return column in rows.column_names and any(isinstance(value, list) for value in rows[column])


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder."""
    digest = hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file():
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# ----- writing ---------------------------------------------------------------------------------------------------


class RowFile:
    """A jsonl, csv or tsv file that rows are appended to; every row is on the disk before `append` returns.

    Raises:
        BlobError: Another format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.suffix not in (*_DELIMITERS, ".jsonl"):
            raise BlobError(f"--output must be a .jsonl, .csv or .tsv file, got {path}")
        self._delimiter = _DELIMITERS.get(self.path.suffix)

    def go_on(self) -> int:
        """Drop what follows the last complete row; the number of complete rows."""
        if not self.path.is_file():
            return 0
        records, end, position, quotes = 0, 0, 0, 0
        with self.path.open("rb") as file:
            for line in file:
                position += len(line)
                quotes += line.count(b'"') if self._delimiter else 0
                if line.endswith(b"\n") and quotes % 2 == 0:  # a quoted text may hold line ends
                    records, end = records + 1, position
        if end < position:
            os.truncate(self.path, end)
        return max(records - 1, 0) if self._delimiter else records

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows at the end (csv: behind a header), and have them on the disk.

        Raises:
            BlobError: It cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._text(rows, header=file.tell() == 0))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise BlobError(
                f"cannot write {self.path} ({error.strerror}); rows before are kept, run it again"
            ) from error

    def write(self, rows: Sequence[Row]) -> None:
        """Have these rows alone in the file, all of them or, where that fails, what was there before.

        Raises:
            BlobError: It cannot be written.
        """
        files.write_text(self.path, self._text(rows, header=True, ragged=True))

    def _text(self, rows: Sequence[Row], header: bool, ragged: bool = False) -> str:
        if self._delimiter is None:
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        flat = [flattened(row) for row in rows]
        text = io.StringIO()
        # lists of several lengths, where these are all rows; what is appended must fit the header that is there
        names = list(dict.fromkeys(name for row in flat for name in row)) if ragged else list(flat[0])
        writer = csv.DictWriter(text, names, delimiter=self._delimiter, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()


def flattened(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without nesting: `probabilities_yes`, `samples_1` ...; truth values as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}_{key}": inner for key, inner in value.items()}
        elif is_conversation(value) or name in _RAGGED:
            flat[name] = json.dumps(value, ensure_ascii=False)  # of any number of messages or classes
        elif isinstance(value, (list, tuple)):
            flat |= {f"{name}_{number}": inner for number, inner in enumerate(value, start=1)}
        else:
            flat[name] = str(value).lower() if isinstance(value, bool) else value
    return flat
