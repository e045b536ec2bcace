"""How each class of a classifier fares, as Markdown: all of them, or of many the worst."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from blob_hf.reporting.tables import markdown_table

MANY = 20  # classes of which a whole confusion matrix can still be read
SHOWN = 10


def class_section(title: str, table: pd.DataFrame, confusion: NDArray[np.integer]) -> str:
    """A section of report.md: precision, recall, F1 and support of each class, and the confusion matrix.

    Of more than `MANY` classes the worst by F1, and the pairs that are confused most.

    Args:
        table: precision, recall, f1 and support by class (see `metrics.classification.ClassReport`).
        confusion: Counts `(classes, classes)`: true class by predicted class.
    """
    names = [class_cell(name) for name in table.index]
    if len(names) <= MANY:
        matrix = [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)]
        parts = [
            _class_table(table),
            "Rows are the true class, columns the predicted one:",
            markdown_table(["", *names], matrix, "l" + "r" * len(names)),
        ]
    else:
        worst = table[table["support"] > 0].sort_values("f1", kind="stable").head(SHOWN)
        parts = [f"The {len(worst)} classes of {len(names)} with the lowest F1:", _class_table(worst)]
        if pairs := _confused(confusion, names):
            head = ["true class", "predicted class", "examples", "of the true class"]
            parts += ["The pairs that are confused most:", markdown_table(head, pairs, "llrr")]
    return "\n\n".join([f"## {title}", *parts])


def _class_table(table: pd.DataFrame) -> str:
    rows = [
        [class_cell(name), *(f"{row[column]:.4f}" for column in ("precision", "recall", "f1")), int(row["support"])]
        for name, row in table.iterrows()
    ]
    return markdown_table(["class", "precision", "recall", "F1", "support"], rows, "lrrrr")


def _confused(confusion: NDArray[np.integer], names: Sequence[str]) -> list[list[object]]:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN]
    pairs = [divmod(int(index), len(names)) for index in order]
    return [
        [names[true], names[predicted], wrong[true, predicted], f"{wrong[true, predicted] / confusion[true].sum():.0%}"]
        for true, predicted in pairs
        if wrong[true, predicted]
    ]


def class_cell(name: object) -> str:
    """A name in a Markdown table."""
    return " ".join(str(name).replace("|", "\\|").split())
