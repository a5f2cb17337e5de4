"""How does a timeline look as a picture?  Tasks over time, and what activations take below.

A line for each device; F, B, W and BW in colours that people tell apart who see few of them (Okabe
and Ito, jfly.uni-koeln.de/color), every second chunk lighter, the microbatch where it fits, idle
time white. Several timelines share one axis of time. matplotlib draws them; it is an extra:
`pip install autoshard[plots]`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoshard.timeline_text import time
from passes.pipeline.timeline import Row, Timeline

if TYPE_CHECKING:  # only those who ask for a picture need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
COLOURS = {"F": "#56B4E9", "B": "#E69F00", "W": "#009E73", "BW": "#D55E00"}
_LABELS = {"F": "forward", "B": "backward", "W": "weights", "BW": "backward and weights"}

_WIDTH_IN, _DEVICE_IN, _MEMORY_IN, _FONT_PT = 12.0, 0.3, 1.4, 7.0
_DIGIT_PT, _MARGIN_PT = 0.65 * _FONT_PT, 1.5


class PictureError(ValueError):
    """A picture that can not be drawn."""


def picture(timelines: Sequence[Timeline], suffix: str) -> bytes:
    """An SVG or PNG file, by its suffix. The same timelines give the same picture."""
    check(suffix)
    from matplotlib import style

    # No clock, no chance and no settings of the user's, and letters that can be searched.
    ours = {"svg.hashsalt": "autoshard", "svg.fonttype": "none"}
    metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
    out = io.BytesIO()
    with style.context(["default", ours]):
        figure(timelines).savefig(out, format=suffix[1:], metadata=metadata, dpi=150)
    return out.getvalue()


def check(suffix: str) -> None:
    """PictureError where there is no such format, or no matplotlib."""
    if suffix not in FORMATS:
        raise PictureError(
            f"a picture is {' or '.join(FORMATS)}, not {suffix or 'without a suffix'}"
        )
    _figure_class()


def figure(timelines: Sequence[Timeline]) -> Figure:
    """The picture as matplotlib has it, for notebooks."""
    devices = [timeline.schedule.devices for timeline in timelines]
    heights = [h for many in devices for h in (_DEVICE_IN * many + 0.4, _MEMORY_IN)]
    whole = _figure_class()(figsize=(_WIDTH_IN, sum(heights) + 0.8), layout="constrained")
    axes = whole.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    latency = max(timeline.latency for timeline in timelines)
    for k, timeline in enumerate(timelines):
        _draw_tasks(axes[2 * k], timeline, latency)
        _draw_memory(axes[2 * k + 1], timeline)
    axes[-1].set(xlabel="time", xlim=(0, latency))
    return whole


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise PictureError(
            "a picture needs matplotlib, which is not installed: pip install autoshard[plots]"
        ) from error
    return Figure


def _draw_tasks(ax: Axes, timeline: Timeline, latency: float) -> None:
    for kind, colour in COLOURS.items():
        rows = [row for row in timeline.rows if row.kind == kind]
        for device in range(timeline.schedule.devices):
            own = [row for row in rows if row.device == device]
            ax.broken_barh(
                [(row.start, row.end - row.start) for row in own],
                (device - 0.45, 0.9),
                facecolors=[(colour, 0.6 if row.chunk % 2 else 1.0) for row in own],
                edgecolor="white",
                lw=0.4,
            )
        if rows:
            ax.broken_barh([(0, 0)], (0, 0), color=colour, label=_LABELS[kind])
        if rows and _all_fit(rows, 72 * (_WIDTH_IN - 1) / latency):
            for row in rows:
                ax.text((row.start + row.end) / 2, row.device, _number(row), **_CENTRED)
    _name(ax, timeline)
    _bare(ax)


def _all_fit(rows: Sequence[Row], points: float) -> bool:
    """Whether every task of a kind has room for its number. points: for each unit of time."""
    return all(
        (row.end - row.start) * points > _DIGIT_PT * len(_number(row)) + _MARGIN_PT for row in rows
    )


def _name(ax: Axes, timeline: Timeline) -> None:
    counted = f"makespan {time(timeline.makespan)}, bubble {timeline.bubble:.1%}"
    ax.set_title(f"{timeline.schedule.name}: {counted}", loc="left")
    ax.set(
        ylabel="device",
        ylim=(timeline.schedule.devices - 0.5, -0.5),
        yticks=range(timeline.schedule.devices),
    )
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, borderaxespad=0.1)


_CENTRED: dict[str, Any] = {
    "ha": "center",
    "va": "center",
    "fontsize": _FONT_PT,
    "clip_on": True,
}


def _number(row: Row) -> str:
    """The microbatch, and which chunk if not the first."""
    return f"{row.microbatch}" + f".{row.chunk}" * (row.chunk > 0)


def _draw_memory(ax: Axes, timeline: Timeline) -> None:
    """What activations take, a line per device: from blue, the first, to yellow, the last."""
    last = max(1, timeline.schedule.devices - 1)
    import matplotlib as mpl

    shades = mpl.colormaps["cividis"]
    for device, line in enumerate(timeline.memory):
        times, held = zip(*line, (timeline.latency, line[-1][1]), strict=True)
        ax.step(times, held, where="post", color=shades(device / last), lw=1.2,
                label=f"device {device}" if device in (0, last) else None)  # fmt: skip
    ax.set(ylabel="activations", ylim=(0, None))
    ax.legend(loc="lower center", ncols=2, frameon=False)
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.grid(False)
    ax.spines[["top", "right"]].set_visible(False)
