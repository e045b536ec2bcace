"""Files of questions with choices, for `blob predict` with an adapter that answers such."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blob_hf.cli.row_files import Row, TextFile, digest, load_rows
from blob_hf.data.columns import IDS
from blob_hf.data.multiple_choice import questions
from blob_hf.inference.choices import ChoiceScoring

CHOICES = "choices"  # the column by which rows are told to be questions
_COLUMNS = ("question", CHOICES, "passage")
_MARKS = ({CHOICES}, {"sentence", "option1", "option2"}, {"question", "passage"})  # of the forms that are read


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
        asked = questions(rows)
        columns = tuple(name for name in _COLUMNS if name in asked.column_names)
        id_column = next((name for name in IDS if name in rows.column_names), None)
        return cls(path, delimiter, split, columns, id_column, len(rows), digest(Path(path)))

    def rows(self, start: int = 0) -> Iterator[Row]:
        rows = load_rows(self.path, self.delimiter, self.split)
        asked = questions(rows)
        for index in range(start, self.count):
            name = index if self.id_column is None else rows[index][self.id_column]
            yield {"id": name, **{column: asked[index][column] for column in self.columns}}


def is_of_questions(path: str, delimiter: str | None, split: str, folder: Path) -> bool:
    """Whether an adapter answers questions with choices, and a file has them."""
    if ChoiceScoring.load(folder) is None:
        return False
    found = set(load_rows(path, delimiter, split).column_names)
    return any(marks <= found for marks in _MARKS)
