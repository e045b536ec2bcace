"""What lies beside an adapter in its run's folder: saved predictions, results, examples of the data."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from blob_hf.app.questions import question_texts
from blob_hf.cli.folders import SETTINGS_FILE, run_settings
from blob_hf.cli.question_files import QuestionFile
from blob_hf.cli.row_files import Row, TextFile
from blob_hf.data.columns import IDS
from blob_hf.inference.predict import calibration_of
from blob_hf.metrics.selective import Selection, select
from blob_hf.metrics.uncertainty import predictive_entropy
from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError

EXAMPLES = 12
PREDICTIONS = "_predictions.jsonl"  # what the names of such files end with
CLASS_FILES = {split: f"{split}{PREDICTIONS}" for split in ("validation", "test")}
TEXT_FILES = {"validation": f"eval_generated{PREDICTIONS}", "test": f"generated{PREDICTIONS}"}
RESULT_FILES = {split: f"{prefix}_results.json" for split, prefix in (("validation", "eval"), ("test", "predict"))}
PAGE_SETTINGS = ("prompt", "max_new_tokens", "max_target_length")  # of a run, that the page of its adapter reads
_ROW_KEYS = {"index", *IDS}
_DAMAGES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)

Read = TypeVar("Read")


def read_rows(path: Path, read: Callable[[Row], Read]) -> list[Read]:
    """The rows of a jsonl file of a run.

    Args:
        read: Makes of a row what is asked for.

    Raises:
        BlobError: The file cannot be read, or a line is damaged: no JSON object, or one that `read` fails on.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other line ends stand inside of texts
    except (OSError, ValueError) as error:
        raise BlobError(f"cannot read {path} ({' '.join(str(error).split())})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no JSON object")
            found.append(read(row))
        except _DAMAGES as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise BlobError(f"line {number} of {path} is damaged ({said}); evaluate again") from error
    return found


def log_probs_of(row: Row) -> NDArray[np.float64]:
    """The log-probabilities of a saved prediction, nats, `(classes,)`.

    Raises:
        LookupError, TypeError, ValueError: It has none.
    """
    found = np.array(row["log_probs"], dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError("log_probs is no list of numbers")
    return found


def label_of(row: Row, classes: int) -> int | None:
    """The label of a saved prediction; None where the truth is unknown.

    Raises:
        TypeError, ValueError: It is not the number of a class.
    """
    label = row.get("label")
    if label is None:
        return None
    if int(label) != label or not 0 <= label < classes:
        raise ValueError(f"label {label} is none of {classes} classes")
    return int(label)


def longest_answer(settings: Mapping[str, Any]) -> int:
    """How many tokens a run's answers may have; 128 if that is not known.

    Raises:
        BlobError: The settings say what is no number of tokens.
    """
    name = next((one for one in PAGE_SETTINGS[1:] if settings.get(one) is not None), None)
    value = 128 if name is None else settings[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BlobError(f"{name} in {SETTINGS_FILE} must be a whole number from 1 on, got {value!r}")
    return value


def texts_in(row: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a saved prediction of classes by column: what stands before the prediction, but ids.

    (Of a question its parts, choices one a line.)
    """
    if asked := question_texts(row):
        return asked
    names = list(row)[: list(row).index("prediction")] if "prediction" in row else []
    return {name: row[name] for name in names if name not in _ROW_KEYS and isinstance(row[name], str)}


# ----- what was measured on the evaluation set --------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Saved predictions with their truth: what a threshold would do to them.

    Attributes:
        split: Which rows.
        num_samples: Networks that were drawn for them; None if that was not kept.
        entropy: Of each row, as `model.predict` gives it, nats, `(rows,)`.
        wrong: Whether the likeliest class is not the label, `(rows,)`.
    """

    split: str
    num_samples: int | None
    entropy: NDArray[np.float64]
    wrong: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.entropy)

    def at(self, threshold: float) -> Selection:
        """What is answered at a threshold on the entropy (risk: share of wrong answers)."""
        return select(self.entropy, self.wrong, threshold)


def saved_evaluation(folder: Path, model: BlobModel) -> Evaluation | None:
    """The saved predictions beside an adapter, with its calibration; None if there are none with labels.

    Raises:
        BlobError: They are damaged, or of other classes.
    """
    config: Any = model.get_base_model().config
    classes = int(config.num_labels)

    def scored(row: Row) -> tuple[NDArray[np.float64], int | None]:
        found = log_probs_of(row)
        if len(found) != classes:
            raise ValueError(f"it is not of the {classes} classes of the adapter")
        return found, label_of(row, classes)

    for split, name in CLASS_FILES.items():
        path = folder / name
        rows = [row for row in read_rows(path, scored) if row[1] is not None] if path.is_file() else []
        if not rows:
            continue
        log_probs, labels = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype=np.int64)
        count = _num_samples(folder, split)
        calibration = calibration_of(model)
        if calibration is not None:
            log_probs = calibration.calibrated(log_probs, sampled=count != 0)
        return Evaluation(split, count, predictive_entropy(log_probs[:, None]), log_probs.argmax(axis=1) != labels)
    return None


def _num_samples(folder: Path, split: str) -> int | None:
    path = folder / RESULT_FILES[split]
    name = path.name.replace("results.json", "num_samples")
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))[name])
    except (OSError, *_DAMAGES):  # it is said besides: a page without it is right
        return None


# ----- examples ---------------------------------------------------------------------------------------------------


def examples_of_file(path: str, columns: Sequence[str] | None = None, prompts: bool = False) -> list[tuple[Any, ...]]:
    """The first rows of a file of texts: a text, a pair, or a conversation each.

    Args:
        columns: That hold the texts; default those that can only be meant.
        prompts: As of `TextFile.survey`.

    Raises:
        BlobError: As `TextFile.survey`.
    """
    source = TextFile.survey(path, columns, split="examples", prompts=prompts)
    rows = [row for row, _ in zip(source.rows(), range(EXAMPLES), strict=False)]
    return [tuple(row[name] for name in source.columns) for row in rows]


def examples_of_questions(path: str) -> list[tuple[str, ...]]:
    """The first questions of a file: question, choices one a line, and the passage where there is one.

    Raises:
        BlobError: As `QuestionFile.of`.
    """
    source = QuestionFile.of(path, None, split="examples")
    return [tuple(question_texts(row).values()) for row, _ in zip(source.rows(), range(EXAMPLES), strict=False)]


def saved_examples(folder: Path) -> list[tuple[str, ...]]:
    """Texts of the evaluation set of a run: from its saved predictions, or the files that it names, if they are there.

    Returns:
        At most `EXAMPLES`: those spread evenly over the uncertainty of a classifier's rows, or the first ones.
    """

    def doubted(row: Row) -> tuple[float, tuple[str, ...]]:
        return float(row.get("probability", 1.0)), tuple(texts_in(row).values())

    for name in CLASS_FILES.values():
        path = folder / name
        rows = [row for row in read_rows(path, doubted) if row[1]] if path.is_file() else []
        if rows:
            chosen = np.unique(np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).astype(int))
            by_doubt = sorted(rows, key=lambda row: row[0])
            return [by_doubt[index][1] for index in chosen]
    texts: list[tuple[str, ...]] = [(text,) for text in dict.fromkeys(source_texts(folder).values())]
    return texts[:EXAMPLES]


def source_texts(folder: Path) -> dict[str, str]:
    """Texts of a summarizer's evaluation files by id, of the files that its run names and that are still there.

    Raises:
        BlobError: One of them has changed so that it cannot be read.
    """
    settings = run_settings(folder)
    column = settings.get("text_column")
    found: dict[str, str] = {}
    for split in CLASS_FILES:
        path = settings.get(f"{split}_file")
        if not (column and path and Path(path).is_file()):
            continue
        try:
            source = TextFile.survey(path, [column], settings.get("delimiter"), split)
        except BlobError as error:
            raise BlobError(
                f"the texts of the run in {folder} cannot be shown, which {SETTINGS_FILE} says are in {path}: {error}"
            ) from error
        found |= {str(row["id"]): row[column] for row in source.rows()}
    return found
