"""The look of all plots: legible in print and on a dark page."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_STYLE = {"font.size": 10, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
BLUE, ORANGE, GREEN = sns.color_palette("colorblind")[:3]
GREY = "0.4"


def legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    """The legend of one axis for the whole figure, below it, in as many columns as its width has room for."""
    handles, labels = axis.get_legend_handles_labels()
    inches = 0.075 * max(map(len, labels), default=0) + 0.6  # of a column: the text at 9 points, and its handle
    columns = max(1, min(columns, int(figure.get_figwidth() / inches)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def least_span(axis: Axes, span: float) -> None:
    """Have the y axis span at least so much, so that what is less is seen to be little."""
    low, high = axis.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        axis.set_ylim(middle - span / 2, middle + span / 2)


@contextmanager
def plot_style() -> Iterator[None]:
    """Inside the block plots have our look, whatever the program's own; afterwards nothing has changed."""
    # From matplotlib's defaults: a plot saved by a program with a dark style would have pale text on white.
    with mpl.rc_context():
        mpl.rcdefaults()
        with sns.axes_style("white"), mpl.rc_context(_STYLE):  # type: ignore[arg-type]
            yield


@contextmanager
def metric_panels(
    settings: Sequence[str],
    metrics: Mapping[str, str],
    panel: tuple[float, float],
    room: tuple[float, float],
    x_label: str,
    path: str | PathLike[str],
) -> Iterator[tuple[Figure, dict[tuple[str, str], Axes]]]:
    """A row of panels for each metric and a column for each setting; saved, with one legend, at the block's end.

    Args:
        metrics: Label by metric.
        panel: Width and height of one, inches.
        room: Width and height beside all of them, inches.
        path: PNG to write.
    """
    with plot_style():
        size = (panel[0] * len(settings) + room[0], panel[1] * len(metrics) + room[1])
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axes = figure.subplots(len(metrics), len(settings), squeeze=False, sharex="col")
        yield figure, {(name, one): axes[i, j] for i, name in enumerate(metrics) for j, one in enumerate(settings)}
        for row, label in zip(axes, metrics.values(), strict=True):
            row[0].set_ylabel(label)
        for axis, setting in zip(axes[0], settings, strict=True):
            axis.set_title(setting)
        for axis in axes[-1]:
            axis.set_xlabel(x_label)
        for axis in axes.flat:
            sns.despine(ax=axis)
        legend_below(figure, axes[0, 0], 3)
        figure.savefig(path, dpi=150, format="png")
