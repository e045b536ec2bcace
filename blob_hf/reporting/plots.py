"""Plots of a run: the KL over its steps, and reliability diagrams."""

from collections.abc import Mapping
from os import PathLike

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from blob_hf.metrics.calibration import ece, reliability_bins

_STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3}
_BLUE, _ORANGE, _GREEN, _GREY = sns.color_palette("colorblind")[0], *sns.color_palette("colorblind")[1:3], "0.4"
_SMALLEST = 1e-12  # pi_t below this is drawn at the bottom: the geometric schedule underflows


def plot_kl(history: pd.DataFrame | str | PathLike[str], path: str | PathLike[str]) -> Figure:
    """KL, its weight pi_t and the mean posterior std over optimizer steps.

    Args:
        history: kl_history.csv or its table (columns of `blob_hf.history.COLUMNS`).
        path: PNG to write.
    """
    table = history if isinstance(history, pd.DataFrame) else pd.read_csv(history)
    with sns.axes_style("white", rc=_STYLE):
        figure = Figure(figsize=(7, 6.5), layout="constrained", facecolor="white")
        kl_axis, weight_axis, std_axis = figure.subplots(3, 1, sharex=True)
    _line(kl_axis, table, "kl", "KL(q || p) [nats]", _BLUE)
    _line(std_axis, table, "posterior_std", "mean posterior std", _GREEN)
    weights = table["kl_weight"]
    if (weights > 0).any():
        clipped = table.assign(kl_weight=weights.clip(lower=_SMALLEST))
        _line(weight_axis, clipped, "kl_weight", "KL weight $\\pi_t$", _ORANGE)
        weight_axis.set_yscale("log")
        weight_axis.set_ylim(_SMALLEST / 2, 2 * max(1.0, weights.max()))
        note = f"sum of $\\pi_t$ = {weights.sum():.3g}"
    else:
        weight_axis.set_ylabel("KL weight $\\pi_t$")
        weight_axis.set_yticks([])
        note = "$\\pi_t$ = 0 in every step: the KL was not applied"
    weight_axis.set_title(note, loc="right", color=_GREY)
    std_axis.set_xlabel("optimizer step")
    std_axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)
    return figure


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
        log_probs: Log-probabilities `(examples, classes)` by title, for example of N=0 and of N=10.
        labels: Class ids `(examples,)`.
        path: PNG to write.
    """
    with sns.axes_style("white", rc=_STYLE):
        figure = Figure(figsize=(4 * len(log_probs), 4.8), layout="constrained", facecolor="white")
        axes = figure.subplots(2, len(log_probs), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for column, (title, scores) in enumerate(log_probs.items()):
        bins = reliability_bins(scores, labels, num_bins)
        width, centres = 1 / num_bins, (bins.edges[:-1] + bins.edges[1:]) / 2
        filled = bins.count > 0
        upper, lower = axes[0, column], axes[1, column]
        upper.bar(centres[filled], bins.accuracy[filled], width, color=_BLUE, edgecolor="white", label="accuracy")
        upper.plot(bins.confidence[filled], bins.accuracy[filled], "o", color="black", markersize=3)
        upper.plot([0, 1], [0, 1], "--", color=_GREY, linewidth=1, label="perfectly calibrated")
        upper.set(title=f"{title}: ECE = {100 * ece(scores, labels, num_bins):.1f} %", xlim=(0, 1), ylim=(0, 1))
        lower.bar(centres[filled], bins.count[filled], width, color=_GREY, edgecolor="white")
        lower.set_xlabel("confidence")
        lower.set_xticks(np.linspace(0, 1, 6))
        lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        for axis in (upper, lower):
            sns.despine(ax=axis)
    axes[0, 0].set_ylabel("accuracy in bin")
    axes[1, 0].set_ylabel("examples")
    axes[0, 0].legend(loc="upper left", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    return figure
