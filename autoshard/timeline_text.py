"""How does a timeline read as text?  A line for each device, a character for each bit of time.

A task is F, B, W or BW, its microbatch, after a dot its chunk if not the first, and dashes, as long
as it takes. Where some are too short for that, all of their kind are letters only. Idle time is
blank.

>>> from passes.pipeline.generators import one_f_one_b
>>> from passes.pipeline.stage_costs import even
>>> from passes.pipeline.timeline import simulate
>>> timeline = simulate(one_f_one_b(2, 3), even(2, 2, 1, 1, 1))
>>> print("\\n".join(lines(timeline, 60)))
device 0 |F0--F1--        BW0-----F2--BW1-----    BW2-----|
device 1 |    F0--BW0-----F1--BW1-----F2--BW2-----        |
          0                                             12
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from passes.pipeline.timeline import Row, Timeline

LEGEND = (
    ("F", "forward"),
    ("B", "gradients of inputs"),
    ("W", "gradients of weights"),
    ("BW", "both as one"),
)
_LEAST = 20  # characters of time, however narrow the terminal


@dataclass(frozen=True, slots=True)
class Run:
    """Characters of one line that have one colour. kind: of the task, or nothing."""

    text: str
    kind: str = ""


def lines(timeline: Timeline, width: int, latency: float | None = None) -> list[str]:
    """The runs of each line, joined."""
    return ["".join(run.text for run in line) for line in runs(timeline, width, latency)]


def runs(timeline: Timeline, width: int, latency: float | None = None) -> list[list[Run]]:
    """A line per device and one with the times, at most so wide.

    latency: what fills the whole width, so that several timelines have the same scale.
    """
    heads = [f"device {d} |" for d in range(timeline.schedule.devices)]
    margin, scale = max(map(len, heads)), _scale(timeline, width, latency)
    by_device = {d: list(own) for d, own in groupby(timeline.rows, lambda row: row.device)}
    numbered, end = _numbered(timeline, scale), round(timeline.latency * scale)
    out = []
    for device, head in enumerate(heads):
        body = _tasks(by_device.get(device, []), scale, numbered, end)
        out.append([Run(f"{head:>{margin}}"), *body, Run("|")])
    return [*out, [Run(" " * margin + _axis(timeline.latency, end))]]


def _scale(timeline: Timeline, width: int, latency: float | None) -> float:
    """Characters per unit of time: as many for each, where times are whole and it fills a line."""
    room = max(_LEAST, width - len(f"device {timeline.schedule.devices - 1} ||"))
    latency = latency or timeline.latency
    costs = timeline.costs
    times = (*costs.forward, *costs.backward, *costs.weight, costs.send)
    if 2 * latency <= room and all(float(each).is_integer() for each in times):
        return float(room // latency)
    return room / latency


def shows_all(timeline: Timeline, width: int, latency: float | None = None) -> bool:
    """Whether every task that takes time has a character."""
    scale = _scale(timeline, width, latency)
    ends = (_ends(row, scale) for row in timeline.rows if row.end > row.start)
    return all(last > first for first, last in ends)


def _ends(row: Row, scale: float) -> tuple[int, int]:
    # Ends are rounded, not lengths: tasks that follow each other do so in the picture too.
    return round(row.start * scale), round(row.end * scale)


def _numbered(timeline: Timeline, scale: float) -> frozenset[str]:
    """The kinds of tasks that have room for their names, each of them: else none is named."""
    short = set()
    for row in timeline.rows:
        first, last = _ends(row, scale)
        if last - first < len(str(row.task)):
            short.add(row.kind)
    return frozenset({kind for kind, _ in LEGEND} - short)


def _tasks(rows: Sequence[Row], scale: float, numbered: frozenset[str], end: int) -> list[Run]:
    out, at = [], 0
    for row in rows:
        first, last = _ends(row, scale)
        if first > at:
            out.append(Run(" " * (first - at)))
        if last > first:
            name = str(row.task) if row.kind in numbered else row.kind
            out.append(Run(f"{name[: last - first]:-<{last - first}}", row.kind))
        at = max(at, last)
    return [*out, Run(" " * (end - at))]


def _axis(latency: float, end: int) -> str:
    return f"0{time(latency):>{max(end - 1, 0)}}"


def time(amount: float) -> str:
    """Six digits, and all that stand before the point.

    >>> time(12.3456789), time(12345678.9), time(3.0)
    ('12.3457', '12345679', '3')
    """
    return f"{amount:.0f}" if 1e6 <= amount < 1e15 else f"{amount:.6g}"


def legend(kinds: Sequence[str]) -> list[Run]:
    """What the letters of these kinds mean."""
    out: list[Run] = []
    for kind, meaning in LEGEND:
        if kind in kinds:
            out += [Run("  " if out else ""), Run(kind, kind), Run(f" {meaning}")]
    return out
