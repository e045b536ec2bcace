"""Texts of another kind than a summarizer was trained on, to see whether its uncertainty tells them apart."""

import logging
from collections.abc import Sequence

from datasets import Dataset, DatasetDict

from blob_hf.data.columns import check_texts, find_text_columns
from blob_hf.data.loading import load_files, named_file
from blob_hf.data.summarization import Dialogue, group_dialogues
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

_SPLIT = "ood"


def load_shifted_texts(
    specifications: Sequence[str], text_column: str, summary_column: str, limit: int | None = None
) -> dict[str, list[Dialogue]]:
    """Texts from elsewhere by name, with their summaries where a file has any.

    Args:
        specifications: `name=path` or a path.
        text_column: Read where a file has it; else the one or two columns that can only be the texts, of which the
            second is read below the first.
        limit: At most so many texts of each file.

    Raises:
        BlobError: A file cannot be read, it is not clear where its texts are, or two have the same name.
    """
    found: dict[str, list[Dialogue]] = {}
    for specification in specifications:
        name, path = named_file(specification)
        if name in found:
            raise BlobError(f"two files of other texts are called {name!r}; give one another name: {name}2=path")
        rows = load_files({_SPLIT: path})[_SPLIT]
        found[name] = group_dialogues(_as_dialogues(rows, text_column, summary_column), limit)
    return found


def _as_dialogues(rows: Dataset, text_column: str, summary_column: str) -> Dataset:
    """The columns id, dialogue and summary; None where there is no summary."""
    named = text_column in rows.column_names
    columns = (text_column,) if named else find_text_columns(rows, (summary_column, "label"))
    check_texts(DatasetDict({_SPLIT: rows}), columns)
    texts = ["\n".join(parts) for parts in zip(*(rows[column] for column in columns), strict=True)]
    names = [str(value) for value in rows["id"]] if "id" in rows.column_names else list(map(str, range(len(rows))))
    summaries = list(rows[summary_column]) if summary_column in rows.column_names else [None] * len(rows)
    missing = [not (isinstance(summary, str) and summary.strip()) for summary in summaries]
    if any(missing):
        if not all(missing):
            logger.warning("row %d of the other texts has no summary: none of that file is scored", missing.index(True))
        summaries = [None] * len(rows)
    return Dataset.from_dict({"id": names, "dialogue": texts, "summary": summaries})
