"""Plots of the study: metrics over passes, and mean ranks with their critical difference."""

from collections.abc import Mapping
from os import PathLike
from typing import Protocol

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blob_hf.reporting.plots import BLUE, GREY, ORANGE, metric_panels, plot_style

_LOOKS = {"lora": (ORANGE, "-"), "blob, N=0": (BLUE, "--"), "blob": (BLUE, "-")}


class Ranks(Protocol):
    """Mean ranks by method, and from what distance on two of them differ."""

    @property
    def ranks(self) -> dict[str, float]: ...
    @property
    def critical_difference(self) -> float: ...


def plot_curves(
    curves: pd.DataFrame, passes_per_step: Mapping[str, float], metrics: Mapping[str, str], path: str | PathLike[str]
) -> Figure:
    """Test metrics while LoRA and BLoB train: mean over seeds, and a band from the least to the largest.

    Args:
        curves: Rows of setting, method, seed, step and the metrics.
        passes_per_step: Of each setting.
        metrics: Label by metric; a row of panels each.
        path: PNG to write.
    """
    settings = list(passes_per_step)
    with metric_panels(settings, metrics, (2.3, 2.2), (0.8, 0.6), "passes", path) as (figure, panels):
        for (metric, setting), axis in panels.items():
            for method, (colour, line) in _LOOKS.items():
                part = curves[(curves["setting"] == setting) & (curves["method"] == method)]
                if len(part):
                    groups = part.groupby("step")[metric]
                    x = np.array(list(groups.groups)) * passes_per_step[setting]
                    axis.plot(x, groups.mean(), line, color=colour, label=method)
                    axis.fill_between(x, groups.min(), groups.max(), color=colour, alpha=0.15, linewidth=0)
            axis.set_ylim(bottom=0)
    return figure


def plot_ranks(panels: Mapping[str, Ranks], path: str | PathLike[str]) -> Figure:
    """Critical-difference diagrams: methods on an axis of mean ranks, a bar over those that are not told apart.

    Args:
        panels: Ranks by the name of a metric.
        path: PNG to write.
    """
    count = max(len(panel.ranks) for panel in panels.values())
    with plot_style():
        size = (7.6, (0.19 * count + 1.1) * len(panels))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        for axis, (title, panel) in zip(
            figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
        ):
            _ranks(axis, panel)
            axis.set_title(f"{title}: mean rank, 1 is best (grey: not told apart from the best)", loc="left")
        figure.savefig(path, dpi=150, format="png")
    return figure


def _ranks(axis: Axes, panel: Ranks) -> None:
    ordered = sorted(panel.ranks.items(), key=lambda item: item[1])
    best = ordered[0][1]
    limit = best + panel.critical_difference
    axis.axvspan(best, min(limit, len(ordered)), color="0.92", linewidth=0)
    for place, (name, rank) in enumerate(ordered):
        colour = BLUE if name.startswith("blob") else ORANGE if name.startswith("lora") else GREY
        axis.plot(rank, place, "o", color=colour, markersize=5)
        axis.annotate(f"{name}  {rank:.1f}", (rank, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    axis.set_xlim(1, len(ordered) * 1.25)
    axis.set_yticks([])
    sns.despine(ax=axis, left=True)
