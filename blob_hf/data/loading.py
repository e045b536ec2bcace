"""Datasets from the Hub or from the user's files, with errors a user can act on."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from blob_hf.data.delimited import check_delimiter, decode, read_delimited
from blob_hf.utils.errors import BlobError
from blob_hf.utils.hub import fetching

FORMATS = "csv, tsv, json, jsonl (or .gz of these), parquet, or a folder of save_to_disk"
_DELIMITED = {".csv": None, ".tsv": "\t"}
_LOADED = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
# What commands call their files by, and not by the splits of a run.
_COMMANDS = ("input", "data", "eval_data", "pool", "examples")
_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")  # how datasets says it of json and parquet
_VALIDATION = ("valid", "val", "dev", "eval")  # what else a validation split is called


def load_files(files: Mapping[str, str], delimiter: str | None = None) -> DatasetDict:
    """Read files of texts into splits; column names without blanks around them.

    Args:
        files: Path by split name: csv, tsv, json, jsonl (or .gz of these), parquet, or a folder of `save_to_disk`.
        delimiter: Of csv and tsv files; None finds it in a csv file, and is a tab in a tsv file.

    Raises:
        BlobError: A file is missing, of another format, unreadable or empty.
    """
    if delimiter is not None:
        check_delimiter(delimiter)
        kinds = {split: _suffix(path) for split, path in files.items()}
        if not set(_DELIMITED) & set(kinds.values()):
            raise BlobError(f"a delimiter is of csv and tsv files, got {', '.join(files.values()) or 'no file'}")
    return DatasetDict({split: _load_file(split, path, delimiter) for split, path in files.items()})


def _load_file(split: str, path: str, delimiter: str | None) -> Dataset:
    flag = f"--{split}" if split in _COMMANDS else f"--{split}_file"
    file, suffix = Path(path), _suffix(path)
    if file.is_dir():
        return _trimmed(_saved_split(split, path, flag), path)
    if suffix not in (*_DELIMITED, *_LOADED):
        raise BlobError(f"{flag} must be a .csv, .json or .jsonl file, or another of {FORMATS}; got {path}")
    if not file.is_file():
        raise BlobError(f"{flag} {path} does not exist")
    if file.stat().st_size == 0:
        raise BlobError(f"{flag} {path} is empty")
    try:
        if suffix == ".parquet":
            rows = _read("parquet", path)
        else:
            content = _content(file)
            text = decode(content, path)
            if not text.strip():
                raise BlobError(f"{flag} {path} is empty")
            if suffix in _DELIMITED:
                return read_delimited(text, path, delimiter or _DELIMITED[suffix])
            rows = _read("json", path)
    except BlobError:
        raise
    except (DatasetsError, ValueError, OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        if any(words in _reason(error) for words in _NO_ROWS):
            raise BlobError(f"{flag} {path} has no rows") from error
        raise BlobError(
            f"cannot read {path} as {suffix[1:]}: {_first_fault(file, suffix) or _reason(error)}"
        ) from error
    return _trimmed(rows, path)


def _read(kind: str, path: str) -> Dataset:
    """The library's reader, without its log of an error that is raised as well."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return load_dataset(kind, data_files=path, split="train")
    finally:
        datasets.logging.set_verbosity(verbosity)


def _suffix(path: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def _content(file: Path) -> bytes:
    if file.suffix.lower() == ".gz":
        with gzip.open(file) as stream:
            return stream.read()
    return file.read_bytes()


def _first_fault(file: Path, suffix: str) -> str | None:
    """The first line of a JSON Lines file that is not an object."""
    if suffix == ".json" or _LOADED.get(suffix) != "json":
        return None
    try:
        lines = decode(_content(file), file).splitlines()
    except (OSError, EOFError, zlib.error):
        return None
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                return f"line {number} is not a JSON object"
        except ValueError as error:
            return f"line {number} is not JSON ({error})"
    return None


def _reason(error: BaseException) -> str:
    return next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), type(error).__name__)


def _saved(path: str) -> Dataset | DatasetDict | None:
    """What `save_to_disk` has put into a folder; None for another folder."""
    if not any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    try:
        return load_from_disk(path)
    except (DatasetsError, ValueError, OSError, KeyError, pyarrow.ArrowException) as error:
        raise BlobError(f"cannot read the data set in {path}: {_reason(error)}; save it again") from error


def _saved_split(split: str, path: str, flag: str) -> Dataset:
    saved = _saved(path)
    if saved is None:
        raise BlobError(
            f"{flag} {path} is a folder, but not of save_to_disk; name a file, or give it to --dataset_name"
        )
    if isinstance(saved, Dataset):
        return saved
    saved = with_validation(saved)
    if split not in saved:
        raise BlobError(
            f"{flag} {path} has the splits {', '.join(saved)}, but not {split}; name the folder of one split"
        )
    return saved[split]


def _trimmed(rows: Dataset, path: str) -> Dataset:
    """Column names without blanks and byte order marks around them."""
    names = {name: name.strip().strip("\ufeff").strip() for name in rows.column_names}
    if len(set(names.values())) < len(names):
        raise BlobError(f"{path} has two columns of one name but for blanks: {', '.join(map(repr, names))}; rename one")
    changed = {old: new for old, new in names.items() if old != new}
    return rows.rename_columns(changed) if changed else rows


def named_file(specification: str) -> tuple[str, str]:
    """Name and path of `name=path`, or of a path, whose name is its file's up to the first dot."""
    name, given, path = specification.partition("=")
    return (name, path) if given else (Path(specification).name.split(".")[0], specification)


def with_validation(splits: DatasetDict) -> DatasetDict:
    """Splits in which the one to evaluate on is called validation, if there is just one that can be meant."""
    others = [name for name in _VALIDATION if name in splits]
    if "validation" in splits or len(others) != 1:
        return splits
    return DatasetDict({"validation" if name == others[0] else name: rows for name, rows in splits.items()})


def load_hub(name: str, config: str | None, local_flag: str) -> DatasetDict:
    """All splits of a Hub data set, of a folder of its files, or of a folder of `save_to_disk`."""
    saved = _saved(name) if Path(name).is_dir() else None
    if saved is None:
        with fetching("dataset", name, local_flag):
            saved = load_dataset(name, config)
    elif config is not None:
        raise BlobError(
            f"--dataset_config_name is of data sets on the Hub, but {name} is a folder of one; leave it out"
        )
    splits = DatasetDict(train=saved) if isinstance(saved, Dataset) else with_validation(saved)
    return DatasetDict({split: _trimmed(rows, name) for split, rows in splits.items()})


def require_columns(data: DatasetDict, columns: Sequence[str], flag: str) -> None:
    """Check that every split has rows and the columns.

    Raises:
        BlobError: naming the split, the column and the columns there are.
    """
    for split, rows in data.items():
        if len(rows) == 0:
            raise BlobError(f"the {split} split is empty")
        for column in columns:
            if column not in rows.column_names:
                raise BlobError(
                    f"the {split} split has no column {column!r}, only {', '.join(rows.column_names)}; set {flag}"
                )


def check_limit(limit: int | None) -> None:
    """Refuse a number of samples below 1."""
    if limit is not None and limit < 1:
        raise BlobError(f"a limit on the number of samples must be >= 1, got {limit}")


def hold_out(splits: DatasetDict, count: int | None) -> None:
    """Move some training rows into a split `calibration`, in place; always the same rows of the same data.

    Args:
        count: How many; default a tenth, at most 500.

    Raises:
        BlobError: There is no training split, or nothing would be left of it.
    """
    if "train" not in splits:
        raise BlobError(
            f"calibration needs training rows to hold out, but there is no train split; only {', '.join(splits)}"
        )
    size = len(splits["train"])
    count = min(500, size // 10) if count is None else count
    if not 0 < count < size:
        raise BlobError(f"cannot hold out {count} of {size} training rows for calibration; set --calibration_samples")
    parts = splits["train"].train_test_split(test_size=count, seed=0)
    splits["train"], splits["calibration"] = parts["train"], parts["test"]


def first_rows(rows: Dataset, limit: int | None) -> Dataset:
    """At most `limit` rows from the start."""
    check_limit(limit)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))
