"""Plots of a run: the KL over its steps, and reliability diagrams."""

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from blob_hf.errors import BlobError
from blob_hf.metrics.calibration import ReliabilityBins, ece, reliability_bins

_STYLE = {"font.size": 10, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
_BLUE, _ORANGE, _GREEN = sns.color_palette("colorblind")[:3]
_GREY = "0.4"
_SMALLEST = 1e-12  # pi_t below this is drawn here: the geometric schedule falls to 0 and a log axis has none
_KL_COLUMNS = ("step", "kl", "kl_weight", "posterior_std")


@contextmanager
def plot_style() -> Iterator[None]:
    """The look of all plots: legible in print and on a dark page."""
    # From matplotlib's defaults: a plot saved by a program with a dark style would have pale text on white.
    with mpl.rc_context():
        mpl.rcdefaults()
        with sns.axes_style("white"), mpl.rc_context(_STYLE):  # type: ignore[arg-type]
            yield


def plot_kl(history: pd.DataFrame | str | PathLike[str], path: str | PathLike[str]) -> Figure:
    """KL, its weight pi_t and the mean posterior std over optimizer steps.

    Args:
        history: kl_history.csv or its table (columns of `blob_hf.history.COLUMNS`; KL in nats).
        path: PNG to write.

    Returns:
        The figure, with axes of KL, pi_t (log scale) and std from top to bottom.

    Raises:
        BlobError: The table lacks a column.
    """
    table = history if isinstance(history, pd.DataFrame) else pd.read_csv(history)
    missing = [column for column in _KL_COLUMNS if column not in table]
    if missing:
        raise BlobError(f"the KL history lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    with plot_style():
        figure = Figure(figsize=(7, 6.5), layout="constrained", facecolor="white")
        kl_axis, weight_axis, std_axis = figure.subplots(3, 1, sharex=True)
        _line(kl_axis, table, "kl", "KL(q || p) [nats]", _BLUE)
        _weights(weight_axis, table)
        _line(std_axis, table, "posterior_std", "mean posterior std", _GREEN)
        figure.align_ylabels([kl_axis, weight_axis, std_axis])
        std_axis.set_xlabel("optimizer step")
        std_axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(table) == 1:
            std_axis.set_xlim(table["step"].iloc[0] - 1, table["step"].iloc[0] + 1)
        figure.savefig(path, dpi=150, format="png")
    return figure


def _weights(axis: Axes, table: pd.DataFrame) -> None:
    weights = table["kl_weight"]
    if (weights > 0).any():
        _line(axis, table.assign(kl_weight=weights.clip(lower=_SMALLEST)), "kl_weight", "KL weight $\\pi_t$", _ORANGE)
        axis.set_yscale("log")
        axis.set_ylim(_SMALLEST / 3, 3 * max(1.0, weights.max()))
        note = f"sum of $\\pi_t$ = {weights.sum():.3g}"
        if (weights < _SMALLEST).any():
            note += "; below $10^{-12}$ drawn at $10^{-12}$"
        axis.set_title(note, loc="right", color=_GREY, fontsize=9)
        return
    axis.set_ylabel("KL weight $\\pi_t$")
    axis.set_yticks([])
    sns.despine(ax=axis)
    note = "$\\pi_t$ = 0 in every step: the KL was not applied" if len(table) else "no steps were recorded"
    axis.text(0.5, 0.5, note, transform=axis.transAxes, ha="center", va="center", fontsize=11,
              bbox={"facecolor": "white", "edgecolor": "none"})  # fmt: skip


def _line(axis: Axes, table: pd.DataFrame, column: str, label: str, color: object) -> None:
    marker = "o" if len(table) == 1 else None
    axis.plot(table["step"], table[column], color=color, linewidth=1.2, marker=marker)
    axis.set_ylabel(label)
    axis.margins(x=0.01)
    sns.despine(ax=axis)


def plot_reliability(
    log_probs: Mapping[str, ArrayLike], labels: ArrayLike, path: str | PathLike[str], num_bins: int = 15
) -> Figure:
    """Reliability diagrams side by side, with the number of examples per bin of confidence below.

    Args:
        log_probs: Log-probabilities `(examples, classes)`, nats, by title, for example of N=0 and of N=10.
        labels: Class ids `(examples,)`.
        path: PNG to write.
        num_bins: Equal-width bins of confidence, those of the ECE in the title.

    Returns:
        The figure; its axes are the diagrams from left to right, then the histograms.

    Raises:
        BlobError: No panels, or predictions that `ece` rejects.
    """
    if not log_probs:
        raise BlobError("there are no log-probabilities to plot; give one array or more by title")
    with plot_style():
        figure = Figure(figsize=(max(5.0, 4 * len(log_probs)), 5.4), layout=ConstrainedLayoutEngine(wspace=0.06))
        axes = figure.subplots(2, len(log_probs), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
        for (upper, lower), (name, scores) in zip(axes.T, log_probs.items(), strict=True):
            _reliability(upper, lower, reliability_bins(scores, labels, num_bins))
            upper.set_title(f"{textwrap.fill(name, 40)}\nECE = {100 * ece(scores, labels, num_bins):.1f} %")
        axes[0, 0].set_ylabel("accuracy in bin")
        axes[1, 0].set_ylabel("examples")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.savefig(path, dpi=150, format="png")
    return figure


def _reliability(upper: Axes, lower: Axes, bins: ReliabilityBins) -> None:
    width, centres = bins.edges[1], (bins.edges[:-1] + bins.edges[1:]) / 2
    filled = bins.count > 0
    confidence, accuracy = bins.confidence[filled], bins.accuracy[filled]
    upper.bar(centres[filled], accuracy, width, color=_BLUE, edgecolor="white", label="accuracy")
    # A bin of accuracy 0 has no bar; the point at its mean confidence still shows it.
    upper.plot(confidence, accuracy, "o", color="black", markersize=4, clip_on=False, label="at mean confidence")
    upper.plot([0, 1], [0, 1], "--", color=_GREY, linewidth=1, label="perfectly calibrated")
    upper.set(xlim=(0, 1), ylim=(0, 1))
    lower.bar(centres[filled], bins.count[filled], width, color=_GREY, edgecolor="white")
    lower.set_xlabel("confidence")
    lower.set_xticks(np.linspace(0, 1, 6))
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    for axis in (upper, lower):
        sns.despine(ax=axis)
