"""Beside the floors, rows: classification tasks, dialogue summaries, and the embedded demo."""

from blob_hf.data.classification import (
    ClassificationData,
    load_classification,
    load_shifted,
    tokenize_classification,
)
from blob_hf.data.loading import first_rows, hold_out, load_files
from blob_hf.data.summarization import (
    Dialogue,
    Prompt,
    generation_rows,
    group_dialogues,
    load_summaries,
    scoring_rows,
    single_references,
)
from blob_hf.data.tasks import TASKS

__all__ = [
    "TASKS",
    "ClassificationData",
    "Dialogue",
    "Prompt",
    "first_rows",
    "generation_rows",
    "group_dialogues",
    "hold_out",
    "load_classification",
    "load_files",
    "load_shifted",
    "load_summaries",
    "scoring_rows",
    "single_references",
    "tokenize_classification",
]
