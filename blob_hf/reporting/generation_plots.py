"""Plots of generated texts: densities of scores, what more samples buy, risk against coverage."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from blob_hf.reporting.curves import RiskCoverage
from blob_hf.reporting.plots import least_span, legend_below, plot_style
from blob_hf.utils.errors import BlobError

# Colour says whose weights and whether they are sampled, the dash says how tokens are chosen.
_FAMILIES = ("blob-mean", "blob-sample", "lora", "mc_dropout-sample", "ensemble-sample", "tfb-sample")
_COLOURS = dict(zip(_FAMILIES, sns.color_palette("colorblind")[: len(_FAMILIES)], strict=True))

# In words: what an uncertainty of a generated text says
SCORES = {
    "dissimilarity": "how much the sampled texts differ",
    "cluster_entropy": "entropy over groups of like texts",
    "random": "answered in random order",
    "oracle": "best possible: the best ones first",
}


def _look(arm: str) -> dict[str, Any]:
    family = next((name for name in _COLOURS if arm.startswith(name)), None)
    return {"color": _COLOURS.get(family or "", "0.3"), "linestyle": "--" if arm.endswith("sampling") else "-"}


def plot_densities(table: pd.DataFrame, columns: Mapping[str, str], note: str, path: str | PathLike[str]) -> Figure:
    """Kernel density of each score over all summaries of an arm (scipy's Gaussian kernel, Scott's bandwidth).

    Args:
        table: Rows with `arm` and the columns.
        columns: Label by column.
        note: What the scores are, for the title.
        path: PNG to write.
    """
    if table.empty or not columns:
        raise BlobError("there are no scores to plot")
    arms = list(dict.fromkeys(table["arm"]))
    with plot_style():
        figure = Figure(figsize=(9, 3.2 * ((len(columns) + 1) // 2) + 0.8), layout="constrained", facecolor="white")
        axes = np.atleast_1d(figure.subplots((len(columns) + 1) // 2, 2)).flatten()
        for axis, (column, label) in zip(axes, columns.items(), strict=False):
            for arm in arms:
                values = table.loc[table["arm"] == arm, column]
                if values.nunique() > 1:
                    sns.kdeplot(x=values, ax=axis, cut=0, bw_method="scott", **_look(arm))
                axis.axvline(values.mean(), linewidth=0.8, alpha=0.6, **_look(arm))
            axis.set_xlabel(label)
            axis.set_ylabel("density")
        for axis in axes[len(columns) :]:
            axis.set_visible(False)
        handles = [Line2D([], [], **_look(arm)) for arm in arms]
        figure.legend(handles, arms, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"Scores of single summaries, {note} (thin lines: means)", fontsize=11)
        figure.savefig(path, dpi=150, format="png")
    return figure


def plot_curves(curves: pd.DataFrame, label: str, path: str | PathLike[str]) -> Figure:
    """Score of the best of n samples and of minimum Bayes risk's choice, over n (columns of `sample_curves`)."""
    with plot_style():
        figure = Figure(figsize=(9, 3.9), layout="constrained", facecolor="white")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, kind, title in zip(
            axes, ("best", "mbr"), ("best of n (knows the references)", "minimum Bayes risk of n"), strict=True
        ):
            part = curves[curves["kind"] == kind]
            for arm, rows in part.groupby("arm", sort=False):
                axis.plot(rows["samples"], rows["value"], marker="o", markersize=4, label=arm, **_look(str(arm)))
            axis.set_title(title)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel("samples n")
        axes[0].set_ylabel(label)
        handles, labels = axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=150, format="png")
    return figure


def plot_risk_coverage(curves: Mapping[str, RiskCoverage], risk_label: str, path: str | PathLike[str]) -> Figure:
    """Risk-coverage curves by name of the uncertainty score; "random" and "oracle" are drawn as references."""
    with plot_style():
        figure = Figure(figsize=(6.5, 4.2), layout="constrained", facecolor="white")
        axis = figure.subplots()
        palette = iter(sns.color_palette("colorblind"))
        for name, curve in curves.items():
            look: dict[str, Any] = {"color": "0.4", "linestyle": ":" if name == "oracle" else "--"}
            look = look if name in ("random", "oracle") else {"color": next(palette), "linestyle": "-"}
            axis.plot(curve.coverage, curve.risk, label=f"{SCORES.get(name, name)} (area {curve.area:.3f})", **look)
        axis.set_xlabel("share of the inputs answered, most certain first")
        axis.set_ylabel(risk_label)
        least_span(axis, 0.05)
        legend_below(figure, axis, 2)
        sns.despine(ax=axis)
        figure.savefig(path, dpi=150, format="png")
    return figure
