"""What the page shows of a run's folder: report, plots, and its saved predictions in any order; without HTML."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blob_hf.app.beside import PREDICTIONS, TEXT_FILES, label_of, log_probs_of, read_rows, source_texts, texts_in
from blob_hf.app.questions import lettered, question_texts
from blob_hf.cli.artifacts import EVALUATION
from blob_hf.cli.row_files import Row
from blob_hf.inference.choices import LETTERS
from blob_hf.metrics.uncertainty import predictive_entropy
from blob_hf.reporting.report import REPORT
from blob_hf.utils.errors import BlobError

CLASSES, SUMMARIES = "classes", "summaries"
ANSWER, ASK = "answer", "ask a person"
LEAST_CERTAIN, WORST = "least certain first", "worst first"
MOST_CERTAIN, AS_SAVED = "most certain first", "as saved"
_IMAGE = re.compile(r"^!\[.*\]\(plots/.*\)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class SavedRow:
    """A saved prediction.

    Attributes:
        name: Its id.
        asked: The input, as far as it is known.
        answer, mean_answer, truth: What was predicted, what the posterior mean says, and what is right ("" unknown).
        uncertainty: By name, higher is less certain.
        risk: How bad the answer is: the negative log-probability of the true class in nats, or 1 - ROUGE-L; NaN where
            the truth is unknown.
        is_wrong: Of classes, whether the answer is not the truth.
        prediction_set: The classes that could not be ruled out, where sets were fitted.
        rule: What the fitted rule says: `ANSWER` or `ASK`; "" where none was fitted.
    """

    name: str
    asked: str
    answer: str
    mean_answer: str
    truth: str
    uncertainty: dict[str, float]
    risk: float
    is_wrong: bool
    prediction_set: str = ""
    rule: str = ""


@dataclass(frozen=True)
class SavedPredictions:
    """The saved predictions of a split.

    Attributes:
        kind: `CLASSES` or `SUMMARIES`.
        scores: Names of the uncertainties, the first is what "least certain" means.
    """

    split: str
    kind: str
    rows: tuple[SavedRow, ...]
    scores: tuple[str, ...]

    def ordered(self, order: str, score: str | None = None) -> list[SavedRow]:
        """The rows in an order; those that it says nothing of come last.

        Args:
            order: `LEAST_CERTAIN`, `MOST_CERTAIN`, `WORST` or `AS_SAVED`.
            score: By which uncertainty, default the first.

        Raises:
            BlobError: There is no such order or score.
        """
        if order == AS_SAVED:
            return list(self.rows)
        if order == WORST:
            return _by(self.rows, [row.risk for row in self.rows], down=True)
        name = score or next(iter(self.scores), "")
        if order not in (LEAST_CERTAIN, MOST_CERTAIN) or name not in self.scores:
            raise BlobError(f"there is no order {order!r} by {name!r}")
        values = [row.uncertainty.get(name, math.nan) for row in self.rows]
        return _by(self.rows, values, down=order == LEAST_CERTAIN)


def _by(rows: Sequence[SavedRow], values: Sequence[float], down: bool) -> list[SavedRow]:
    known = [index for index, value in enumerate(values) if not math.isnan(value)]
    known.sort(key=lambda index: -values[index] if down else values[index])
    return [rows[index] for index in [*known, *(i for i, value in enumerate(values) if math.isnan(value))]]


@dataclass(frozen=True)
class RunView:
    """A run's folder.

    Attributes:
        report: Markdown, without its plots.
        plots: PNG files, by what they are called.
        predictions: Of each split that has any.
    """

    name: str
    report: str
    plots: dict[str, Path]
    predictions: tuple[SavedPredictions, ...]


def run_view(folder: Path) -> RunView:
    """What a run has left.

    Raises:
        BlobError: It is no run's folder, or a file is damaged.
    """
    if not folder.is_dir():
        raise BlobError(f"there is no folder {folder}; give the output folder of a run")
    reports = [folder / name for name in (REPORT, EVALUATION) if (folder / name).is_file()]
    plots = {path.stem.replace("_", " "): path for path in sorted(folder.glob("plots/*.png"))}
    predictions = tuple(_predictions(folder))
    if not reports and not predictions:
        raise BlobError(f"{folder} has neither report.md nor predictions: give the output folder of a run")
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in reports)
    return RunView(folder.resolve().name, _IMAGE.sub("", text).replace("## Plots", ""), plots, predictions)


def _predictions(folder: Path) -> Iterable[SavedPredictions]:
    found = folder.glob(f"*{PREDICTIONS}")
    for path in sorted(found, key=lambda path: (not path.name.startswith("val"), path)):
        if "generated" not in path.name and any("log_probs" in row for row in read_rows(path, dict)):
            rows = tuple(read_rows(path, _of_class))
            yield SavedPredictions(path.name.removesuffix(PREDICTIONS), CLASSES, rows, ("entropy",))
    texts: dict[str, str] | None = None
    for split, name in TEXT_FILES.items():
        if not (folder / name).is_file():
            continue
        texts = source_texts(folder) if texts is None else texts
        rows = tuple(read_rows(folder / name, partial(_of_summary, texts=texts)))
        if rows:
            scores = tuple(dict.fromkeys(name for row in rows for name in row.uncertainty))
            yield SavedPredictions(split, SUMMARIES, rows, scores)


def _of_class(row: Row) -> SavedRow:
    log_probs = log_probs_of(row)
    label = label_of(row, len(log_probs))
    entropy = float(predictive_entropy(log_probs[None, None])[0])
    truth = "" if label is None else str(row.get("label_name", label))
    risk = math.nan if label is None else -float(log_probs[label])
    wrong = bool(truth) and truth != str(row["prediction"])
    answer = f"{row['prediction']} ({100 * float(row['probability']):.1f}\N{NO-BREAK SPACE}%)"
    texts = texts_in(row)
    if question_texts(row):
        del texts["choices"]
        if str(row["prediction"]) in LETTERS:  # else they are always the same words
            texts["question"] += "\n" + "\n".join(lettered(row["choices"]))
    asked = "\n".join(texts.values())
    name = str(next((row[key] for key in ("id", "idx", "index") if key in row), ""))
    chosen = row.get("prediction_set")
    own = "" if chosen is None else ", ".join(map(str, chosen)) or "none"
    return SavedRow(name, asked, answer, "", truth, {"entropy": entropy}, risk, wrong, own, _rule(row))


def _rule(row: Row) -> str:
    abstains = row.get("abstain")
    return "" if abstains is None else ASK if abstains else ANSWER


def _of_summary(row: Row, texts: dict[str, str]) -> SavedRow:
    doubts = row.get("uncertainty") or {}
    scores = row.get("summary_scores") or row.get("mean_scores") or {}
    risk = 1 - float(scores["rougeL"]) if "rougeL" in scores else math.nan
    name = str(row.get("id", ""))
    return SavedRow(
        name, texts.get(name, ""), str(row.get("summary", "")), str(row.get("mean_summary", "")),
        "\n".join(row.get("references") or []), {key: float(value) for key, value in doubts.items()}, risk, False,
        rule=_rule(row),
    )  # fmt: skip
