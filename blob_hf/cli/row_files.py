"""Rows of text files of any length: read one by one, appended in blocks, gone on with where a killed run stopped."""

import csv
import gzip
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from blob_hf.data.loading import guess_text_columns
from blob_hf.utils.errors import BlobError

Row = dict[str, Any]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON = (".json", ".jsonl")
_PEEKED = 50  # rows that tell which columns hold texts
_IDS = ("id", "idx")


def _suffix(path: str | os.PathLike[str], flag: str, kinds: Sequence[str]) -> str:
    suffixes = [suffix for suffix in Path(path).suffixes if suffix != ".gz"]
    if not suffixes or suffixes[-1] not in kinds:
        raise BlobError(f"{flag} must be a {', '.join(kinds)} file, got {path}")
    return suffixes[-1]


# ----- reading ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFile:
    """A csv, tsv, json or jsonl file (or .gz of one) that was read through once.

    Attributes:
        columns: The one or two that hold the texts.
        id_column: `id` or `idx`, if there is one.
        count: Rows.
        sha256: Of the file.
    """

    path: Path
    columns: tuple[str, ...]
    id_column: str | None
    count: int
    sha256: str

    @classmethod
    def survey(
        cls, path: str | os.PathLike[str], columns: Sequence[str] | None = None, flag: str = "--input"
    ) -> "TextFile":
        """Read a file once: count its rows, find its texts, and refuse what would fail later.

        Args:
            columns: Default sentence1 and sentence2, or the only column with texts.

        Raises:
            BlobError: No such file, of another format, or a row that cannot be read or has no text.
        """
        path = Path(path)
        _suffix(path, flag, (*_DELIMITERS, *_JSON))
        if not path.is_file():
            raise BlobError(f"{flag} {path} does not exist")
        first = list(islice(read_rows(path), _PEEKED))
        if not first:
            raise BlobError(f"{flag} {path} has no rows")
        names = list(first[0])
        chosen = tuple(columns or guess_text_columns([n for n in names if _holds_texts(n, first)], names))
        if not 1 <= len(chosen) <= 2:
            raise BlobError(f"--text_columns takes one or two columns, got {', '.join(chosen)}")
        for name in chosen:
            if name not in names:
                raise BlobError(f"{path} has no column {name!r}, only {', '.join(names)}; set --text_columns")
        count = 0
        for count, row in enumerate(read_rows(path), start=1):
            for name in chosen:
                if not isinstance(row.get(name), str):
                    raise BlobError(f"row {count - 1} of {path} has no text in column {name!r}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path, chosen, next((name for name in _IDS if name in names), None), count, digest)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """From row `start` on: `id` (the id column, else the index) and the texts by column."""
        for index, row in enumerate(islice(read_rows(self.path), start, None), start=start):
            yield {
                "id": index if self.id_column is None else row.get(self.id_column),
                **{n: row[n] for n in self.columns},
            }


def _holds_texts(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]  # what is missing is found when all are read
    words = [value for value in values if not _is_number(str(value))]
    return bool(words) and all(isinstance(value, str) for value in values)


def _is_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def read_rows(path: Path) -> Iterator[Row]:
    """Every row by column, one at a time (a .json file that is one array is read whole).

    Raises:
        BlobError: naming the row that cannot be read.
    """
    suffix, index = _suffix(path, "--input", (*_DELIMITERS, *_JSON)), 0
    try:
        with _opened(path) as file:
            rows = _delimited(file, _DELIMITERS[suffix]) if suffix in _DELIMITERS else _json_rows(file)
            for row in rows:
                index += 1
                yield row
    except (
        ValueError,
        csv.Error,
        EOFError,
        gzip.BadGzipFile,
    ) as error:  # UnicodeDecodeError and JSON's are ValueErrors
        raise BlobError(f"cannot read row {index} of {path}: {str(error).splitlines()[0]}") from error


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _delimited(file: IO[str], delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's default of 128 kB
    reader = csv.DictReader(file, delimiter=delimiter)
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"it has not {len(reader.fieldnames or ())} fields, as the header")
        yield row


def _json_rows(file: IO[str]) -> Iterator[Row]:
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    rows: Iterable[Any] = json.load(file) if start == "[" else (json.loads(line) for line in file if line.strip())
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError("it is not a JSON object")
        yield row


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

    def _text(self, rows: Sequence[Row], header: bool) -> str:
        if self._delimiter is None:
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        flat = [flattened(row) for row in rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(flat[0]), delimiter=self._delimiter, lineterminator="\n")
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
        elif isinstance(value, (list, tuple)):
            flat |= {f"{name}_{number}": inner for number, inner in enumerate(value, start=1)}
        else:
            flat[name] = str(value).lower() if isinstance(value, bool) else value
    return flat
