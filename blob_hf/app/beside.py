"""What lies beside an adapter in its run's folder: settings, saved predictions, examples of the data.

Other files that decisions can be made from (a calibrated threshold, prediction sets) belong here, too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blob_hf.cli.folders import SETTINGS_FILE
from blob_hf.cli.row_files import Row, TextFile
from blob_hf.data.columns import IDS
from blob_hf.inference.predict import calibration_of
from blob_hf.metrics.selective import Selection, select
from blob_hf.metrics.uncertainty import predictive_entropy
from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError

EXAMPLES = 12
SPLITS = ("validation", "test")
_ROW_KEYS = {"index", *IDS}


def read_rows(path: Path) -> list[Row]:
    """The rows of a jsonl file of a run.

    Raises:
        BlobError: A line is damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise BlobError(f"cannot read {path} ({' '.join(str(error).split())})") from error


def run_settings(folder: Path) -> dict[str, Any]:
    """What a run was started with; empty if that is not known."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BlobError(f"cannot read {path} ({error})") from error
    return found if isinstance(found, dict) else {}


def texts_in(row: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a saved prediction of a classifier by column: what stands before the prediction, but ids."""
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
    for split, prefix in zip(SPLITS, ("eval", "predict"), strict=True):
        path = folder / f"{split}_predictions.jsonl"
        rows = [row for row in read_rows(path) if "label" in row] if path.is_file() else []
        if not rows:
            continue
        try:
            log_probs = np.array([row["log_probs"] for row in rows], dtype=np.float64)
            labels = np.array([row["label"] for row in rows], dtype=np.int64)
        except (KeyError, ValueError, TypeError) as error:
            raise BlobError(f"{path} has rows without log_probs or with a damaged label; evaluate again") from error
        if log_probs.ndim != 2 or log_probs.shape[1] != config.num_labels:
            raise BlobError(f"{path} is not of the {config.num_labels} classes of the adapter; evaluate again")
        count = _num_samples(folder, prefix)
        calibration = calibration_of(model)
        if calibration is not None:
            log_probs = calibration.calibrated(log_probs, sampled=count != 0)
        return Evaluation(split, count, predictive_entropy(log_probs[:, None]), log_probs.argmax(axis=1) != labels)
    return None


def _num_samples(folder: Path, prefix: str) -> int | None:
    path = folder / f"{prefix}_results.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get(f"{prefix}_num_samples")
    except (OSError, ValueError):
        return None
    return None if value is None else int(value)


# ----- examples ---------------------------------------------------------------------------------------------------


def examples_of_file(path: str, prompts: bool = False) -> list[tuple[Any, ...]]:
    """The first rows of a file of texts: a text, a pair, or a conversation each.

    Raises:
        BlobError: As `TextFile.survey`.
    """
    source = TextFile.survey(path, split="examples", prompts=prompts)
    rows = [row for row, _ in zip(source.rows(), range(EXAMPLES), strict=False)]
    return [tuple(row[name] for name in source.columns) for row in rows]


def saved_examples(folder: Path) -> list[tuple[str, ...]]:
    """Texts of the evaluation set of a run: from its saved predictions, or the files that it names, if they are there.

    Returns:
        At most `EXAMPLES`: those spread evenly over the uncertainty of a classifier's rows, or the first ones.
    """
    for split in SPLITS:
        path = folder / f"{split}_predictions.jsonl"
        rows = [row for row in read_rows(path) if texts_in(row)] if path.is_file() else []
        if rows:
            chosen = np.unique(np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).astype(int))
            by_doubt = sorted(rows, key=lambda row: float(row.get("probability", 1.0)))
            return [tuple(texts_in(by_doubt[index]).values()) for index in chosen]
    texts: list[tuple[str, ...]] = [(text,) for text in dict.fromkeys(source_texts(folder).values())]
    return texts[:EXAMPLES]


def source_texts(folder: Path) -> dict[str, str]:
    """Texts of a summarizer's evaluation files by id, of the files that its run names and that are still there."""
    settings = run_settings(folder)
    column = settings.get("text_column")
    found: dict[str, str] = {}
    for name in ("validation_file", "test_file"):
        path = settings.get(name)
        if column and path and Path(path).is_file():
            source = TextFile.survey(path, [column], settings.get("delimiter"), split=name)
            found |= {str(row["id"]): row[column] for row in source.rows()}
    return found
