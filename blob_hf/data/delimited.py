"""csv and tsv files: the delimiter found in the file, every row of the header's length, nothing guessed about a cell.

Texts stay as they are written ("NA", "null" and "007" too); only an empty cell has no value. A column is of numbers or
of booleans if all of its cells are.
"""

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset

from blob_hf.utils.errors import BlobError

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_SNIFFED = 500  # rows that have to agree on the delimiter
_NONE = "\x1f"  # a character that no text has: the whole line is one cell
_NAMED = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "bar": "|", "pipe": "|", "space": " "}
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d{0,14})(\.\d*)?|\.\d+)([eE][+-]?\d+)?")  # not 007, nor longer than a float holds
_BOOLEANS = {"true": True, "false": False}

Cell: TypeAlias = str | int | float | bool | None


class _Ragged(Exception):
    """A row that is not as long as the header, or a quote that is not closed."""


def decode(content: bytes, path: str | Path) -> str:
    """UTF-8 text, with or without a byte order mark, or UTF-16 with one.

    Raises:
        BlobError: It is in another encoding, which cannot be told from the bytes.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BlobError(
            f"{path} is not UTF-8 (byte 0x{content[error.start]:02x} in line {line}); convert it, for example with: "
            "iconv -f latin1 -t utf-8 FILE > NEW"
        ) from error


def check_delimiter(delimiter: str) -> str:
    """The character that a user means, who may write a tab as a word.

    Raises:
        BlobError: It is not one character.
    """
    found = _NAMED.get(delimiter.lower(), delimiter)
    if len(found) != 1 or found in '"\r\n':
        raise BlobError(f"the delimiter must be one character (or tab), got {delimiter!r}")
    return found


def read_delimited(text: str, path: str | Path, delimiter: str | None = None) -> Dataset:
    """The rows of a csv or tsv file.

    Args:
        text: Its contents.
        path: Its name, for messages.
        delimiter: Between the cells; None finds it in the file.

    Raises:
        BlobError: No rows, rows that are not as long as the header, or names that are not different.
    """
    given = None if delimiter is None else check_delimiter(delimiter)
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than the library's 128 KiB
    try:
        rows = _parse(text, given or _sniff(text))
    except _Ragged as error:
        hint = "put texts with the delimiter into quotes" + ("" if given else ", or name the delimiter")
        raise BlobError(f"{path}: {error}; {hint}") from error
    finally:
        csv.field_size_limit(limit)
    names = [name.strip() for name in rows[0]] if rows else []
    kept = [position for position, name in enumerate(names) if name]  # pandas writes its index under no name
    if len({names[position] for position in kept}) < len(kept):
        twice = next(name for name in names if name and names.count(name) > 1)
        raise BlobError(f"{path} has two columns called {twice!r}; rename one")
    if len(rows) < 2:
        raise BlobError(f"{path} has a header ({', '.join(names)}) and no rows")
    return Dataset.from_dict({names[position]: _typed([row[position] for row in rows[1:]]) for position in kept})


def _parse(text: str, delimiter: str) -> list[list[str]]:
    """The rows, quotes read as csv has them, or as part of the text where that is the only reading that fits."""
    lines = [line.split(delimiter) for line in _lines(text) if line.strip()]
    plain_fits = len({len(line) for line in lines}) == 1
    try:
        rows = list(_rows(text, delimiter))
    except _Ragged:
        if plain_fits and '"' in text:
            return lines
        raise
    swallowed = delimiter == "\t" and plain_fits and len(rows) != len(lines)  # whole lines, by a quote in a tsv file
    return lines if swallowed else rows


def _lines(text: str) -> list[str]:
    """The lines as csv has them: `str.splitlines` would also break texts at other characters."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _rows(text: str, delimiter: str) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            header = header or row
            if len(row) > len(header) and not any(row[len(header) :]):
                row = row[: len(header)]
            if len(row) != len(header):
                names = ", ".join(name.strip() for name in header)
                raise _Ragged(
                    f"line {reader.line_num} has {len(row)} cells, but the header has {len(header)} ({names})"
                )
            yield row
    except csv.Error as error:
        raise _Ragged(f"line {reader.line_num} cannot be read ({error})") from error


def _sniff(text: str) -> str:
    """The delimiter under which the first rows are all as long as the header; of several the one with most columns."""
    header = next((line for line in _lines(text) if line.strip()), "")
    found = {}
    for delimiter in DELIMITERS:
        columns = len(next(csv.reader([header], delimiter=delimiter), []))
        if columns > 1:
            found[delimiter] = (_fits(text, delimiter), columns)
    return max(found, key=lambda delimiter: found[delimiter]) if found else _NONE


def _fits(text: str, delimiter: str) -> bool:
    try:
        for number, _ in enumerate(_rows(text, delimiter)):
            if number == _SNIFFED:
                break
    except _Ragged:
        lengths = {line.count(delimiter) for line in _lines(text)[:_SNIFFED] if line.strip()}
        return '"' in text and len(lengths) == 1
    return True


def _typed(cells: Sequence[str]) -> list[Cell]:
    """Cells as numbers or booleans, if all that have a value are."""
    filled = [stripped for cell in cells if (stripped := cell.strip())]
    kinds: list[tuple[Callable[[str], object], Callable[[str], Cell]]] = [
        (_INTEGER.fullmatch, int),
        (_NUMBER.fullmatch, float),
        (lambda cell: cell.lower() in _BOOLEANS, lambda cell: _BOOLEANS[cell.lower()]),
    ]
    for matches, convert in kinds:
        if filled and all(matches(cell) for cell in filled):
            return [convert(cell.strip()) if cell.strip() else None for cell in cells]
    return [cell if cell.strip() else None for cell in cells]
