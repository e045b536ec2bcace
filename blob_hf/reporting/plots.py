"""The look of all plots: legible in print and on a dark page."""

from collections.abc import Iterator
from contextlib import contextmanager

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
