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
    """The legend of one axis for the whole figure, below it; one column where labels are long and would be cut off."""
    handles, labels = axis.get_legend_handles_labels()
    columns = columns if max(map(len, labels), default=0) <= 45 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


@contextmanager
def plot_style() -> Iterator[None]:
    """Inside the block plots have our look, whatever the program's own; afterwards nothing has changed."""
    # From matplotlib's defaults: a plot saved by a program with a dark style would have pale text on white.
    with mpl.rc_context():
        mpl.rcdefaults()
        with sns.axes_style("white"), mpl.rc_context(_STYLE):  # type: ignore[arg-type]
            yield
