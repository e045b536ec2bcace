"""Plots of a classifier's predictions: is it as sure as it is right, and does it know when it is wrong?"""

import textwrap
from collections.abc import Mapping, Sized
from os import PathLike

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from blob_hf.reporting.curves import Confidence, NLLCurve, Reliability, RiskCoverage
from blob_hf.reporting.plots import BLUE, GREY, ORANGE, least_span, legend_below, plot_style
from blob_hf.utils.errors import BlobError

LEAST_NATS, LEAST_SHARE = 0.02, 0.05  # differences of an NLL, in nats and of its size, that fill a plot at the least


def plot_reliability(panels: Mapping[str, Reliability], path: str | PathLike[str]) -> Figure:
    """Reliability diagrams side by side, with the number of examples per bin of confidence below.

    Args:
        panels: Bins and ECE (`metrics.reliability`) by title, for example of N=0 and of N=10.
        path: PNG to write.

    Returns:
        The figure; its axes are the diagrams from left to right, then the histograms.

    Raises:
        BlobError: No panels.
    """
    _require_panels(panels)
    with plot_style():
        figure = Figure(figsize=(max(5.0, 4 * len(panels)), 5.4), layout=ConstrainedLayoutEngine(wspace=0.06))
        axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
        for (upper, lower), (name, panel) in zip(axes.T, panels.items(), strict=True):
            _reliability(upper, lower, panel)
            upper.set_title(f"{textwrap.fill(name, 40)}\nECE = {100 * panel.ece:.1f} %")
        axes[0, 0].set_ylabel("accuracy in bin")
        axes[1, 0].set_ylabel("examples")
        legend_below(figure, axes[0, 0], 3)
        figure.savefig(path, dpi=150, format="png")
    return figure


def _require_panels(panels: Sized) -> None:
    if not panels:
        raise BlobError("there are no predictions to plot; give one panel or more by title")


def _reliability(upper: Axes, lower: Axes, bins: Reliability) -> None:
    width, centres = bins.edges[1], (bins.edges[:-1] + bins.edges[1:]) / 2
    filled = bins.count > 0
    confidence, accuracy = bins.confidence[filled], bins.accuracy[filled]
    upper.bar(centres[filled], accuracy, width, color=BLUE, edgecolor="white", label="accuracy")
    # A bin of accuracy 0 has no bar; the point at its mean confidence still shows it.
    upper.plot(confidence, accuracy, "o", color="black", markersize=4, clip_on=False, label="at mean confidence")
    upper.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="perfectly calibrated")
    upper.set(xlim=(0, 1), ylim=(0, 1))
    lower.bar(centres[filled], bins.count[filled], width, color=GREY, edgecolor="white")
    lower.set_xlabel("confidence")
    lower.set_xticks(np.linspace(0, 1, 6))
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    for axis in (upper, lower):
        sns.despine(ax=axis)


def plot_confidence(panels: Mapping[str, Confidence], path: str | PathLike[str]) -> Figure:
    """Histograms of the confidence, right and wrong predictions stacked, with the mean confidence and the accuracy.

    Args:
        panels: Confidence and correctness of every prediction (`metrics.confidence`) by title.
        path: PNG to write.

    Raises:
        BlobError: No panels.
    """
    _require_panels(panels)
    with plot_style():
        figure = Figure(figsize=(max(5.0, 4 * len(panels)), 4.0), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (name, panel) in zip(axes, panels.items(), strict=True):
            confidence, correct = panel.confidence, panel.correct
            parts = [confidence[correct], confidence[~correct]]
            edges = np.linspace(1 / panel.num_classes, 1, 21)
            axis.hist(
                parts, bins=edges, stacked=True, color=[BLUE, ORANGE], edgecolor="white", label=["right", "wrong"]
            )
            axis.axvline(confidence.mean(), color="black", linewidth=1.2, label="mean confidence")
            axis.axvline(correct.mean(), color="black", linewidth=1.2, linestyle="--", label="accuracy")
            axis.set_title(textwrap.fill(name, 40))
            axis.set_xlabel("confidence: largest probability")
            axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            sns.despine(ax=axis)
        axes[0].set_ylabel("examples")
        legend_below(figure, axes[0], 4)
        figure.savefig(path, dpi=150, format="png")
    return figure


def plot_rejection(curves: Mapping[str, RiskCoverage], path: str | PathLike[str]) -> Figure:
    """Accuracy of what remains when the least certain inputs are rejected.

    Args:
        curves: Risk-coverage curves of the error (risk 1 where the prediction is wrong), by name of the score.
        path: PNG to write.
    """
    with plot_style():
        figure = Figure(figsize=(6.5, 4.8), layout="constrained", facecolor="white")
        axis = figure.subplots()
        for (name, curve), colour in zip(curves.items(), sns.color_palette("colorblind", len(curves)), strict=True):
            look = {"color": GREY, "linestyle": ":"} if name == "oracle" else {"color": colour}
            shown = "best possible: the wrong ones first" if name == "oracle" else name
            label = f"{shown} (area {1 - curve.area:.3f})"
            axis.plot(1 - curve.coverage, 1 - curve.risk, label=label, linewidth=1.4, **look)
        axis.set_xlabel("share of the inputs rejected, least certain first")
        axis.set_ylabel("accuracy of the rest")
        # the accuracy of the last few inputs jumps between 0 and 1: it says nothing, and would set the scale
        axis.set_xlim(0, 0.95)
        lowest = min(float((1 - curve.risk)[curve.coverage >= 0.05].min()) for curve in curves.values())
        axis.set_ylim(max(0.0, lowest - 0.05), 1.01)
        legend_below(figure, axis, 2)
        sns.despine(ax=axis)
        figure.savefig(path, dpi=150, format="png")
    return figure


def plot_nll_curve(curve: NLLCurve, mean_nll: float, path: str | PathLike[str], unit: str = "example") -> Figure:
    """NLL of the predictive over the number of samples, beside that of the posterior mean (N=0).

    Args:
        curve: From `nll_curve`.
        mean_nll: NLL of the posterior mean, nats.
        path: PNG to write.
        unit: What the NLL is the mean over.
    """
    with plot_style():
        figure = Figure(figsize=(6.5, 4.0), layout="constrained", facecolor="white")
        axis = figure.subplots()
        axis.plot(curve.samples, curve.nll, "o-", color=BLUE, markersize=4, label="average of n posterior samples")
        if (curve.spread > 0).any():
            band = curve.nll - curve.spread, curve.nll + curve.spread
            axis.fill_between(curve.samples, *band, color=BLUE, alpha=0.2, linewidth=0, label="std over choices of n")
        axis.axhline(mean_nll, color=ORANGE, linestyle="--", linewidth=1.4, label="posterior mean (N=0)")
        axis.axvline(
            curve.enough, color=GREY, linestyle=":", linewidth=1.2, label=f"within 1 % from n = {curve.enough}"
        )
        least_span(axis, max(LEAST_NATS, LEAST_SHARE * abs(mean_nll)))
        axis.set_xlabel("number n of posterior samples that are averaged")
        axis.set_ylabel(f"NLL [nats per {unit}], lower is better")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.legend(frameon=False, fontsize=9)
        sns.despine(ax=axis)
        figure.savefig(path, dpi=150, format="png")
    return figure


def plot_shift(
    inside: Mapping[str, ArrayLike],
    outside: Mapping[str, ArrayLike],
    names: tuple[str, str],
    path: str | PathLike[str],
    label: str = "entropy of the predictive [nats]",
) -> Figure:
    """Histograms of an uncertainty in nats, of in- and of out-of-distribution inputs.

    Args:
        inside, outside: Entropies `(n,)` and `(m,)` by title.
        names: What the two sets are called.
        path: PNG to write.
        label: What the uncertainty is.
    """
    with plot_style():
        figure = Figure(figsize=(max(5.0, 4 * len(inside)), 3.8), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(inside), sharey=True, squeeze=False)[0]
        for axis, (title, values) in zip(axes, inside.items(), strict=True):
            sets = np.asarray(values), np.asarray(outside[title])
            edges = np.histogram_bin_edges(np.concatenate(sets), bins=25)
            for one, name, colour in zip(sets, names, (BLUE, ORANGE), strict=True):
                weights = np.full(len(one), 1 / len(one))
                axis.hist(one, bins=edges, weights=weights, color=colour, alpha=0.55, label=f"{name} ({len(one)})")
            axis.set_title(textwrap.fill(title, 40))
            axis.set_xlabel(label)
            sns.despine(ax=axis)
        axes[0].set_ylabel("share of the inputs")
        legend_below(figure, axes[0], 2)
        figure.savefig(path, dpi=150, format="png")
    return figure
