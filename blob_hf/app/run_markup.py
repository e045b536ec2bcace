"""A run's saved predictions and plots as HTML."""

import math
from collections.abc import Sequence
from pathlib import Path

from blob_hf.app.markup import card, escape, figure, nats, table
from blob_hf.app.run_view import CLASSES, LEAST_CERTAIN, WORST, SavedPredictions, SavedRow

TOP = 5
_ONE_LINE, _SHORT = 40, 400  # characters of a text in a list


def plots_html(plots: dict[str, Path]) -> str:
    """All plots, or that there are none."""
    if not plots:
        return "<p>This run has drawn no plots.</p>"
    return f'<div class="blob-figures">{"".join(figure(path, name) for name, path in plots.items())}</div>'


def top_html(saved: SavedPredictions) -> str:
    """The worst and the least certain inputs."""
    worst = [row for row in saved.ordered(WORST) if not math.isnan(row.risk)][:TOP]
    lists = [(f"The {len(worst)} worst", worst)] if worst else []
    doubted = saved.ordered(LEAST_CERTAIN)[:TOP] if saved.scores else []
    lists += [(f"The {len(doubted)} least certain", doubted)] if doubted else []
    parts = "".join(card(title, rows_html(saved, rows, f"{title} ({saved.split})")) for title, rows in lists)
    return f'<div class="blob-cards blob-wide">{parts}</div>'


def rows_html(saved: SavedPredictions, rows: Sequence[SavedRow], caption: str) -> str:
    """Saved predictions as a table."""
    with_mean = any(row.mean_answer for row in rows)
    with_text = any(row.asked for row in rows)
    with_set, with_rule = any(row.prediction_set for row in rows), any(row.rule for row in rows)
    risk = "-log p(truth), nats" if saved.kind == CLASSES else "1 - ROUGE-L"
    header = ["id", *(["input"] if with_text else []), "answer", *(["posterior mean"] if with_mean else [])]
    header += [*(["prediction set"] if with_set else []), *(["fitted rule"] if with_rule else [])]
    header += ["truth", *(name.replace("_", " ") for name in saved.scores), risk]

    def cells_of(row: SavedRow) -> list[str]:
        decided = [*([escape(row.prediction_set)] if with_set else []), *([escape(row.rule)] if with_rule else [])]
        return _row(saved, row, with_text, with_mean, decided)

    return table(caption, header, map(cells_of, rows), "blob-rows")


def _row(saved: SavedPredictions, row: SavedRow, with_text: bool, with_mean: bool, decided: Sequence[str]) -> list[str]:
    answer = escape(row.answer)
    if saved.kind == CLASSES:
        kind, mark = ("blob-class blob-wrong", "✗ ") if row.is_wrong else ("blob-class", "")
        answer = f'<span class="{kind}">{mark}{answer}</span>'
    texts = [_shortened(row.asked)] if with_text else []
    means = [_shortened(row.mean_answer)] if with_mean else []
    return [
        escape(row.name), *texts, answer, *means, *decided, _shortened(row.truth),
        *(nats(row.uncertainty[name]) if name in row.uncertainty else "" for name in saved.scores),
        "" if math.isnan(row.risk) else nats(row.risk),
    ]  # fmt: skip


def _shortened(text: str) -> str:
    """A text; of a long one the beginning, and all of it on demand."""
    if len(text) <= _ONE_LINE:
        return escape(text)
    if len(text) <= _SHORT:
        return f'<div class="blob-long">{escape(text)}</div>'
    start = escape(text[:_SHORT])
    return f'<details class="blob-long"><summary>{start} ...</summary>{escape(text)}</details>'
