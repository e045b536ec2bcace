"""Files of questions with choices, for commands with an adapter that answers such."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from blob_hf.cli.row_files import Row, TextFile, digest, load_rows
from blob_hf.data.columns import IDS
from blob_hf.data.multiple_choice import holds_questions, questions
from blob_hf.utils.errors import BlobError

CHOICES = "choices"
_COLUMNS = ("question", CHOICES, "passage")


def questions_of(rows: Dataset, path: str, labelled: bool = False) -> Dataset:
    """The questions of a file for an adapter that answers multiple choice.

    Args:
        labelled: Whether labels are read.

    Raises:
        BlobError: It has none, or one cannot be read.
    """
    if not holds_questions(rows.column_names):
        raise BlobError(
            f"{path} has no questions: the adapter answers multiple choice, which needs the columns question and "
            f"choices, but it has {', '.join(rows.column_names)}"
        )
    return questions(rows, labelled)


@dataclass(frozen=True)
class QuestionFile(TextFile):
    """A file of questions, in any of the forms that are trained on; labels are not read."""

    @classmethod
    def of(cls, path: str, delimiter: str | None, split: str = "input") -> "QuestionFile":
        """Read a file, and refuse what would fail later.

        Raises:
            BlobError: No such file, or a row that is no question.
        """
        rows = load_rows(path, delimiter, split)
        asked = questions_of(rows, path)
        columns = tuple(name for name in _COLUMNS if name in asked.column_names)
        id_column = next((name for name in IDS if name in rows.column_names), None)
        return cls(path, delimiter, split, columns, id_column, len(rows), digest(Path(path)))

    def rows(self, start: int = 0) -> Iterator[Row]:
        rows = load_rows(self.path, self.delimiter, self.split)
        asked = questions(rows, labelled=False)
        for index in range(start, self.count):
            name = index if self.id_column is None else rows[index][self.id_column]
            yield {"id": name, **{column: asked[index][column] for column in self.columns}}
