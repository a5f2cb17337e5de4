"""How do the plots of the notebooks look?  Large enough for a talk, the same colours throughout."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cost_models.units import format_bytes, format_seconds

# Told apart by people who see few colours too: Okabe and Ito, jfly.uni-koeln.de/color.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)

plt.rcParams |= {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 14,
    "font.size": 13,
    "grid.color": "#DDDDDD",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 2.5,
}


def panels(title: str, count: int = 1, height: float = 4.8) -> tuple[Figure, list[Axes]]:
    """A figure that states its finding, and so many plots side by side."""
    figure, axes = plt.subplots(1, count, figsize=(11, height), squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    return figure, list(axes[0])


def byte_axis(axis: Axis, least: float, most: float, step: int = 16) -> None:
    """A logarithmic axis in bytes, with a mark at every power of `step`."""
    _marks(axis, least, most, step)
    axis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(x)))


def second_axis(axis: Axis, least: float, most: float) -> None:
    """A logarithmic axis in seconds, with a mark at every power of ten."""
    _marks(axis, least, most, 10)
    axis.set_major_formatter(FuncFormatter(lambda x, _: format_seconds(x)))


def size_axis(axis: Axis, sizes: Sequence[float]) -> None:
    """A logarithmic axis with a mark at each of these sizes."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(FixedLocator(list(sizes)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _marks(axis: Axis, least: float, most: float, step: int) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    first, last = (round(np.log(x) / np.log(step)) for x in (least, most))
    axis.set_major_locator(FixedLocator([float(step) ** k for k in range(first, last + 1)]))
    axis.set_minor_locator(NullLocator())


def heat_map(
    ax: Axes,
    values: np.ndarray,
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> None:
    """Values [row, column] by logarithm, dark where small; NaN is hatched: it does not fit."""
    ax.set_facecolor("#EEEEEE")
    ax.patch.set(hatch="///", edgecolor="#AAAAAA")
    shown = np.ma.masked_invalid(np.log(values))
    ax.imshow(shown, cmap="viridis", aspect="auto")
    middle = (shown.min() + shown.max()) / 2
    for (i, j), value in np.ndenumerate(np.log(values)):
        dark = value < middle
        ax.text(j, i, texts[i][j], ha="center", va="center", fontsize=11,
                color="white" if dark else "black")  # fmt: skip
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    ax.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=2)
    ax.tick_params(which="both", length=0)
