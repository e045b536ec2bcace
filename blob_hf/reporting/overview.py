"""The picture that README opens with: how far confidence is to be believed, and a summary with its unsure words."""

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from blob_hf.reporting.curves import Reliability
from blob_hf.reporting.plots import BLUE, GREY, ORANGE, plot_style

_COLUMNS = 66  # characters of a line of text
_SIZE = 8.5  # points
_FEWEST = 10  # rows of a bin that is drawn


def plot_overview(
    panels: Mapping[str, Reliability],
    title: str,
    dialogue: str,
    words: Sequence[str],
    shares: ArrayLike,
    path: str | PathLike[str],
) -> Figure:
    """Reliability of two methods on the left; on the right a dialogue and its summary, unsure words marked.

    Args:
        panels: Bins by method, the one to compare with first.
        title: Of the left panel.
        words, shares: Of the summary, and the share of the networks that agree on each word.
        path: PNG to write.
    """
    with plot_style():
        figure = Figure(figsize=(10.4, 3.9), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.55))
        left.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        for (name, bins), colour in zip(panels.items(), (ORANGE, BLUE), strict=False):
            filled = bins.count >= _FEWEST
            sizes = 120 * bins.count[filled] / bins.count.max() + 12
            label = f"{name}: ECE {100 * bins.ece:.1f} %"
            left.plot(bins.confidence[filled], bins.accuracy[filled], "-", color=colour, linewidth=1.5)
            left.scatter(bins.confidence[filled], bins.accuracy[filled], sizes, color=colour, label=label, alpha=0.8)
        left.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        left.set_title(title, loc="left")
        left.legend(loc="upper left", frameon=False)
        sns.despine(ax=left)
        right.axis("off")
        right.set(ylim=(1, 0))
        right.set_title("What a summarizer is unsure of: the share of sampled networks that agree", loc="left")
        figure.canvas.draw()  # settles the layout, so that the width of a character is known
        probe = right.text(0, 0, "M" * 10, family="monospace", size=_SIZE)
        extent = probe.get_window_extent().transformed(right.transData.inverted())
        probe.remove()
        right.set(xlim=(0, 10 / extent.width))  # in characters
        _write(right, dialogue, words, np.asarray(shares, dtype=float))
        figure.savefig(path, dpi=150, format="png")
    return figure


def _write(axis: Axes, dialogue: str, words: Sequence[str], shares: np.ndarray) -> None:
    """The dialogue in grey, and below it the summary, word by word."""
    lines = [part for line in dialogue.splitlines() for part in textwrap.wrap(line, _COLUMNS)]
    step = 1 / (len(lines) + 8)
    row = step
    for line in lines:
        axis.text(0, row, line, color=GREY, family="monospace", size=_SIZE, va="top")
        row += step
    row += step
    column = 0
    for word, share in zip(words, shares, strict=True):
        if column + len(word) > _COLUMNS:
            column, row = 0, row + 1.6 * step
        box = {"facecolor": ORANGE, "alpha": 0.25 + 0.6 * (1 - share), "edgecolor": "none", "pad": 1.5}
        unsure = share < 1
        axis.text(
            column, row, word, family="monospace", size=_SIZE, va="top", weight="bold" if unsure else "normal",
            bbox=box if unsure else None,
        )  # fmt: skip
        if unsure:
            axis.text(column, row + 0.85 * step, f"{share:.0%}", size=6, color=ORANGE, va="top")
        column += len(word) + 1
