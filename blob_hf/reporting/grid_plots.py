"""Plots of a grid of runs: its methods side by side."""

from collections.abc import Mapping
from os import PathLike

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from blob_hf.reporting.plots import legend_below, plot_style


def plot_methods(results: pd.DataFrame, metrics: Mapping[str, str], path: str | PathLike[str]) -> Figure:
    """Metrics of every method on every task: a point a seed, a bar at their mean.

    Args:
        results: Rows of task, method, N, seed and the metrics.
        metrics: Label by metric.
        path: PNG to write.
    """
    tasks = list(dict.fromkeys(results["task"]))
    kinds = list(dict.fromkeys(zip(results["method"], results["N"], strict=True)))
    colours = sns.color_palette("colorblind", len(kinds))
    with plot_style():
        width = max(7.0, 1.5 + 1.1 * len(tasks) * max(1.0, len(kinds) / 3))
        figure = Figure(figsize=(width, 6.2), layout="constrained", facecolor="white")
        axes = figure.subplots(2, (len(metrics) + 1) // 2, squeeze=False)
        spacing = 0.8 / len(kinds)
        half = min(0.06, 0.4 * spacing)  # of a bar: neighbours do not touch
        for axis, (name, label) in zip(axes.flat, metrics.items(), strict=False):
            for index, ((method, count), colour) in enumerate(zip(kinds, colours, strict=True)):
                places = np.arange(len(tasks)) + (index - (len(kinds) - 1) / 2) * spacing
                part = results[(results["method"] == method) & (results["N"] == count)]
                for place, task in zip(places, tasks, strict=True):
                    values = part.loc[part["task"] == task, name]
                    axis.plot([place] * len(values), values, "o", color=colour, markersize=4, alpha=0.7)
                    axis.hlines(values.mean(), place - half, place + half, color=colour, linewidth=2.5)
                axis.plot([], [], "o", color=colour, label=f"{method}, N={count}")
            axis.set_xticks(range(len(tasks)), tasks)
            axis.set_ylabel(label.replace("[%]", "").strip())
            sns.despine(ax=axis)
        legend_below(figure, axes.flat[0], 3)
        figure.savefig(path, dpi=150, format="png")
    return figure
