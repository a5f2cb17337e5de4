"""How does a timeline look in ui.perfetto.dev or chrome://tracing?  As JSON in their trace format.

A schedule is a process, a device a thread of it, a task a complete event ("ph": "X"), and what the
activations of a device take a counter ("ph": "C"). A unit of time is shown as a millisecond; the
format counts microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from passes.pipeline.timeline import Timeline

MICROSECONDS = 1000.0  # for each unit of time

_NAMES = {
    "F": "forward",
    "B": "backward",
    "W": "weights",
    "BW": "backward and weights",
    "O": "offload",
    "R": "reload",
}
# Of the palette that trace viewers have.
_COLOURS = {
    "F": "thread_state_running",
    "B": "thread_state_iowait",
    "W": "good",
    "BW": "olive",
    "O": "grey",
    "R": "white",
}


def as_trace(timelines: Sequence[Timeline]) -> str:
    """The trace of several schedules, one below the other."""
    events = [event for pid, timeline in enumerate(timelines) for event in _events(pid, timeline)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}) + "\n"


def _events(pid: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield _meta(pid, 0, "process_name", name=timeline.schedule.name)
    yield _meta(pid, 0, "process_sort_index", sort_index=pid)
    for device in range(timeline.schedule.devices):
        yield _meta(pid, device, "thread_name", name=f"device {device}")
        yield _meta(pid, device, "thread_sort_index", sort_index=device)
    if timeline.transfers:
        for device in range(timeline.schedule.devices):
            tid = timeline.schedule.devices + device
            yield _meta(pid, tid, "thread_name", name=f"host link of device {device}")
            yield _meta(pid, tid, "thread_sort_index", sort_index=tid)
    for row in (*timeline.rows, *timeline.transfers):
        link = timeline.schedule.devices if row.kind in ("O", "R") else 0
        yield {
            "ph": "X",
            "pid": pid,
            "tid": row.device + link,
            "name": str(row.task),
            "cat": _NAMES[row.kind],
            "cname": _COLOURS[row.kind],
            "ts": row.start * MICROSECONDS,
            "dur": (row.end - row.start) * MICROSECONDS,
            "args": {"task": row.kind, "microbatch": row.microbatch, "chunk": row.chunk},
        }
    for device, line in enumerate(timeline.memory):
        for time, held in line:
            yield {
                "ph": "C",
                "pid": pid,
                "tid": device,
                "name": f"activations of device {device}",
                "ts": time * MICROSECONDS,
                "args": {"microbatches of a stage": held},
            }


def _meta(pid: int, tid: int, what: str, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": args}
