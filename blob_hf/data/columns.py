"""Which columns of a file hold the texts: the obvious ones, or those that are named; a second text is never guessed."""

from collections.abc import Collection, Sequence
from typing import Any

from datasets import Dataset, DatasetDict

from blob_hf.data.loading import require_columns
from blob_hf.utils.errors import BlobError

PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("passage", "question"), ("text1", "text2"), ("text_a", "text_b"), ("sentence_A", "sentence_B"),
)  # fmt: skip
SINGLES = ("text", "sentence")
IDS = ("id", "idx")  # what says which row a row is


def find_text_columns(rows: Dataset, others: Collection[str] = ()) -> tuple[str, ...]:
    """The one or two columns that can only be the texts: a known pair, a known single one, or the only one with text.

    Args:
        others: Columns that are not texts: the label's.

    Raises:
        BlobError: There are several, or none.
    """
    texts = [name for name, kind in rows.features.items() if _is_text(kind) and name not in (*others, *IDS)]
    pairs = [pair for pair in PAIRS if set(pair) <= set(texts)]
    singles = [name for name in SINGLES if name in texts and not any(name in pair for pair in pairs)]
    if len(pairs) + len(singles) == 1:
        return pairs[0] if pairs else (singles[0],)
    if len(texts) == 1:
        return (texts[0],)
    if not texts:
        raise BlobError(f"no column has texts, only {', '.join(rows.column_names)}; name it in text_columns")
    raise BlobError(
        f"several columns could be the texts: {', '.join(texts)}; name the one or two to read in text_columns"
    )


def chosen_columns(rows: Dataset, named: Sequence[str] | None, others: Collection[str] = ()) -> tuple[str, ...]:
    """The one or two columns to read: those that are named, else those of `find_text_columns`.

    Args:
        others: Columns that are not texts: the label's.

    Raises:
        BlobError: More than two are named; or none, and there are several that could be the texts, or none.
    """
    columns = tuple(named or find_text_columns(rows, others))
    if len(columns) > 2:
        raise BlobError(f"text_columns takes one or two columns, got {', '.join(columns)}")
    return columns


def check_texts(data: DatasetDict, columns: Sequence[str]) -> None:
    """Check that columns hold a text in every row of every split.

    Raises:
        BlobError: naming the first row that has none.
    """
    require_columns(data, columns, "text_columns")
    for split, rows in data.items():
        for column in columns:
            kind = rows.features[column]
            if not _is_text(kind) and str(getattr(kind, "dtype", "")) != "null":
                raise BlobError(
                    f"column {column!r} of {split} holds {getattr(kind, 'dtype', type(kind).__name__)}, not texts; "
                    "name the columns of the texts in text_columns"
                )
            missing = [index for index, text in enumerate(rows[column]) if not isinstance(text, str)]
            if missing:
                more = f" ({len(missing)} such rows)" if len(missing) > 1 else ""
                raise BlobError(f"row {missing[0]} of {split} has no text in column {column!r}{more}")


def _is_text(kind: Any) -> bool:
    return "string" in str(getattr(kind, "dtype", ""))
