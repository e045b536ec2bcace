"""Datasets from the Hub or from the user's files, with errors a user can act on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetsError

from blob_hf.utils.errors import BlobError
from blob_hf.utils.hub import fetching

NOT_TEXTS = ("id", "idx", "index", "label", "labels")  # columns that are not what a model reads
_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json"}


def load_files(files: Mapping[str, str]) -> DatasetDict:
    """Read csv, json or jsonl files (optionally .gz) into splits.

    Args:
        files: Path by split name.

    Raises:
        BlobError: A file is missing, of another format, unreadable or empty.
    """
    splits = {}
    for split, path in files.items():
        suffixes = [suffix for suffix in Path(path).suffixes if suffix != ".gz"]
        kind = _FORMATS.get(suffixes[-1]) if suffixes else None
        if kind is None:
            raise BlobError(f"--{split}_file must be a .csv, .json or .jsonl file (or .gz of one), got {path}")
        if not Path(path).is_file():
            raise BlobError(f"--{split}_file {path} does not exist")
        if Path(path).stat().st_size == 0:
            raise BlobError(f"--{split}_file {path} is empty")
        try:
            splits[split] = load_dataset(kind, data_files=path, split="train")
        except (DatasetsError, ValueError, OSError) as error:
            cause = error.__cause__ or error
            raise BlobError(f"cannot read {path} as {kind}: {str(cause).splitlines()[0]}") from error
    return DatasetDict(splits)


def load_hub(name: str, config: str | None, local_flag: str) -> DatasetDict:
    """All splits of a Hub dataset (or a local dataset folder)."""
    with fetching("dataset", name, local_flag):
        return load_dataset(name, config)


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


def text_columns(rows: Dataset) -> list[str]:
    """The one or two columns that a model reads: sentence1 and sentence2, or the only one with texts.

    Raises:
        BlobError: It is not clear which.
    """
    kinds = (Value("string"), Value("large_string"))
    return guess_text_columns([name for name, kind in rows.features.items() if kind in kinds], rows.column_names)


def guess_text_columns(texts: Sequence[str], columns: Sequence[str]) -> list[str]:
    """As `text_columns`, from the names of the columns that hold texts and of all columns."""
    if {"sentence1", "sentence2"} <= set(texts):
        return ["sentence1", "sentence2"]
    texts = [name for name in texts if name not in NOT_TEXTS]
    if len(texts) != 1:
        raise BlobError(f"which columns are the texts? name them with text_columns; there are {', '.join(columns)}")
    return list(texts)


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
