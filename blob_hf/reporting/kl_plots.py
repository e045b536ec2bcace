"""Plots of the KL: over the steps of a run, over the runs of a grid, and the posterior that it left."""

import math
import re
from collections.abc import Mapping
from os import PathLike

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blob_hf.reporting.curves import LayerStd
from blob_hf.reporting.plots import BLUE, GREEN, GREY, ORANGE, legend_below, plot_style
from blob_hf.utils.errors import BlobError

_SMALLEST = 1e-12  # pi_t below this is drawn here: the geometric schedule falls to 0 and a log axis has none
_ALIKE = 0.05  # stds of layers that differ by less than 5 % are the same to the eye
_KL_COLUMNS = ("step", "kl", "kl_weight", "posterior_std")


def plot_kl(history: pd.DataFrame | str | PathLike[str], path: str | PathLike[str]) -> Figure:
    """KL, its weight pi_t and the mean posterior std over optimizer steps.

    Args:
        history: kl_history.csv or its table (columns step, kl, kl_weight, posterior_std; KL in nats).
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
        _line(kl_axis, table, "kl", "KL(q || p) [nats]", BLUE)
        _weights(weight_axis, table)
        _line(std_axis, table, "posterior_std", "mean posterior std", GREEN)
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
        least = max(_SMALLEST, 10.0 ** math.floor(math.log10(weights[weights > 0].min()) - 1))
        _line(axis, table.assign(kl_weight=weights.clip(lower=least)), "kl_weight", "KL weight $\\pi_t$", ORANGE)
        axis.set_yscale("log")
        axis.set_ylim(least / 3, 3 * max(1.0, weights.max()))
        note = f"sum of $\\pi_t$ = {weights.sum():.3g}"
        if (weights < least).any():
            power = f"$10^{{{round(math.log10(least))}}}$"
            note += f"; below {power} drawn at {power}"
        axis.set_title(note, loc="right", color=GREY, fontsize=9)
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


def plot_posterior_std(layers: Mapping[str, LayerStd], prior_std: float, path: str | PathLike[str]) -> Figure:
    """Heat map of each layer's mean posterior std over the prior's: depth downwards, kinds of layers side by side.

    Args:
        layers: `posterior_statistics(...).layers`, by layer name.
        prior_std: sigma_p; 1 in the map is the prior's std.
        path: PNG to write; one sentence where all layers have nearly the same.
    """
    if not layers:
        raise BlobError("there are no layers to plot")
    rows = [(*_depth_and_kind(name), layer.mean_std / prior_std) for name, layer in layers.items()]
    long = pd.DataFrame(rows, columns=["depth", "kind", "ratio"])
    kinds = list(dict.fromkeys(long["kind"]))
    least, most = float(long["ratio"].min()), float(long["ratio"].max())
    if most - least < _ALIKE * most:
        return _all_alike(len(long), least, most, path)
    table = long.pivot_table(index="depth", columns="kind", values="ratio", sort=False)[kinds]
    with plot_style(), mpl.rc_context({"axes.grid": False}):
        size = (max(4.5, 1.3 * len(kinds) + 2.2), max(2.6, 0.36 * len(table) + 2.2))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axis = figure.subplots()
        sns.heatmap(
            table, ax=axis, vmin=0, vmax=float(long["ratio"].max()), cmap="viridis", annot=True, fmt=".3f",
            annot_kws={"fontsize": 8}, linewidths=0.5, linecolor="white",
            cbar_kws={"label": "mean posterior std / prior std"},
        )  # fmt: skip
        axis.set_xlabel("")
        axis.set_ylabel("layer")
        axis.tick_params(axis="x", rotation=30 if len(kinds) > 2 else 0)
        axis.tick_params(axis="y", rotation=0)
        for label in axis.get_xticklabels():
            label.set_horizontalalignment("right" if len(kinds) > 2 else "center")
        figure.savefig(path, dpi=150, format="png")
    return figure


def _all_alike(count: int, least: float, most: float, path: str | PathLike[str]) -> Figure:
    """One sentence in the place of a map whose cells are all the same."""
    with plot_style():
        figure = Figure(figsize=(6.5, 1.0), facecolor="white")
        layers = "The one layer has" if count == 1 else f"All {count} layers have nearly"
        text = f"{layers} the same mean posterior std: {least:.3f} to {most:.3f} of the prior's"
        figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=10)
        figure.savefig(path, dpi=150, format="png")
    return figure


def _depth_and_kind(name: str) -> tuple[str, str]:
    """`bert.encoder.layer.0.attention.self.query` is ("0", "self.query"); BART's halves stay apart."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    if match is None:
        return "-", name.removeprefix("model.")
    half = next((half for half in ("decoder", "encoder") if f"{half}.layers." in name or f"{half}.block." in name), "")
    return f"{half} {match[1]}".strip(), ".".join(match[2].split(".")[-2:])


def plot_trajectories(
    runs: Mapping[str, pd.DataFrame],
    path: str | PathLike[str],
    styles: Mapping[str, Mapping[str, object]] | None = None,
) -> Figure:
    """KL, pi_t and ELBO over the steps of several runs (figures 3 and 4 of [K]).

    Args:
        runs: kl_history.csv of each run, by its label.
        path: PNG to write.
        styles: Line settings by label, for example colour by beta and dash by gamma.

    Returns:
        The figure, with axes of KL, pi_t, sum of pi_t and ELBO.
    """
    if not runs:
        raise BlobError("there are no runs to plot")
    colours = sns.color_palette("colorblind", len(runs))
    with plot_style():
        figure = Figure(figsize=(10, 7.2), layout="constrained", facecolor="white")
        axes = figure.subplots(2, 2, sharex=True)
        for (label, table), colour in zip(runs.items(), colours, strict=True):
            look = {"color": colour, "linewidth": 1.3, "label": label, **(styles or {}).get(label, {})}
            weights = table["kl_weight"].clip(lower=_SMALLEST)
            sums = table["kl_weight"].cumsum().clip(lower=_SMALLEST)
            for axis, values in zip(axes.flat, (table["kl"], weights, sums, table["elbo"]), strict=True):
                axis.plot(table["step"], values, **look)
        titles = (
            "KL(q || p) [nats]",
            "KL weight $\\pi_t$",
            "sum of $\\pi_t$ so far",
            "ELBO as logged: NLL + KL [nats]",
        )
        for axis, title in zip(axes.flat, titles, strict=True):
            axis.set_ylabel(title)
            axis.margins(x=0.01)
            sns.despine(ax=axis)
        for axis in (axes[0, 1], axes[1, 0]):
            axis.set_yscale("log")
            axis.set_ylim(bottom=_SMALLEST / 3)
        for axis in axes[1]:
            axis.set_xlabel("optimizer step")
        axes[0, 1].set_title("below $10^{-12}$ drawn at $10^{-12}$", loc="right", color=GREY, fontsize=9)
        legend_below(figure, axes[0, 0], 3)
        figure.savefig(path, dpi=150, format="png")
    return figure
