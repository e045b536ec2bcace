"""Plots of active learning: metrics over the number of labelled rows."""

from collections.abc import Mapping
from os import PathLike

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from blob_hf.reporting.plots import metric_panels

_LINES = ("-", "--", ":", "-.")  # of methods
_MARKERS = ("o", "s", "^", "D")


def plot_learning(points: pd.DataFrame, metrics: Mapping[str, tuple[str, float]], path: str | PathLike[str]) -> Figure:
    """Learning curves of all arms: mean over seeds, with a band for its interval where that is finite.

    Of two seeds an interval is many times as wide as the curves are high: bands are cut where they leave the panel.

    Args:
        points: Rows of setting, arm (`method-strategy`), labelled, metric, value, low, high.
        metrics: Label and factor by metric; a row of panels each.
        path: PNG to write.
    """
    settings, arms = list(dict.fromkeys(points["setting"])), list(dict.fromkeys(points["arm"]))
    strategies = list(dict.fromkeys(arm.rpartition("-")[2] for arm in arms))
    methods = list(dict.fromkeys(arm.rpartition("-")[0] for arm in arms))
    colours = dict(zip(strategies, sns.color_palette("colorblind", len(strategies)), strict=True))
    labels = {metric: label for metric, (label, _) in metrics.items()}
    with metric_panels(settings, labels, (3.1, 2.6), (0.9, 0.8), "labelled rows", path) as (figure, panels):
        for (metric, setting), axis in panels.items():
            factor = metrics[metric][1]
            here = points[(points["setting"] == setting) & (points["metric"] == metric)]
            for arm in arms:
                part = here[here["arm"] == arm].sort_values("labelled")
                method, _, strategy = arm.rpartition("-")
                style = methods.index(method) % len(_LINES)
                axis.plot(
                    part["labelled"], factor * part["value"], _LINES[style], color=colours[strategy], label=arm,
                    marker=_MARKERS[style], markersize=3.5,
                )  # fmt: skip
                sure = part[np.isfinite(part["low"])]
                band = (factor * sure["low"], factor * sure["high"])
                axis.fill_between(sure["labelled"], *band, color=colours[strategy], alpha=0.08, linewidth=0)
            means = factor * here["value"]
            margin = 0.25 * (means.max() - means.min()) or 0.1
            axis.set_ylim(means.min() - margin, means.max() + margin)
    return figure
