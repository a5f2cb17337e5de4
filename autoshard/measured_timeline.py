"""When did each task of a controller's step really run?  `measured(controller, flat)`.

A step is run once to compile it, and a second time under jax's profiler. XLA's runtime on CPU
records each operation that a device executes: its beginning and end by one clock of the machine,
the program it is of, the run of that program, and the device. A task's program is named after its
stage and kind (`stage2_B`), runs of one program are numbered in the order in which they were
started, and that the controller knows: so each operation belongs to a task of a microbatch. A task
begins with the first of its operations on any device of its stage, and ends with the last.

What is measured is the work of the devices, with the time that they wait for a core of the machine.
It is not the sending between stages, nor what comes before and after the loop. That the call has
returned is a mark on the same clock. Recording costs about a microsecond for each operation.

Times are in milliseconds, from the beginning of the first task. The same table with these tasks'
mean times, simulated, tells what the controller and the machine have added: `predicted`.

A task of the table that has no operations takes no time, after the one that the device did before
it. BW is one row, from the beginning of B to the end of W.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileOptions, TraceAnnotation

from autoshard.controller import Controller
from autoshard.stage_programs import program_name
from passes.pipeline.schedule import Schedule
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import Row, Timeline, simulate

_CALL = "autoshard: the controller's call"
_MS = 1e-6  # of a nanosecond


class NotMeasured(RuntimeError):
    """A step of which the profiler does not tell when its tasks ran."""


@dataclass(frozen=True)
class Measured:
    """Milliseconds. called, returned: when the controller's call began, and when it was back.

    highest: per device of the schedule the most microbatches' activations, by piece, that the
    controller counted.
    """

    timeline: Timeline
    predicted: Timeline
    called: float
    returned: float
    highest: tuple[int, ...]

    @property
    def returned_after(self) -> float:
        """The part of the step, from the call to the end of the last task, that the call took."""
        last = max(row.end for row in self.timeline.rows)
        return (self.returned - self.called) / (last - self.called)


class Span(NamedTuple):
    """When a run of a program was executed, in nanoseconds."""

    start: float
    end: float


def measured(run: Controller, flat: Sequence[Any]) -> Measured:
    """One step of a controller on these arguments, as it really ran. Raises NotMeasured."""
    jax.block_until_ready(run(*flat))
    with tempfile.TemporaryDirectory() as folder:
        options = ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            with TraceAnnotation(_CALL):
                results = run(*flat)
            jax.block_until_ready(results)
        files = sorted(Path(folder).rglob("*.trace.json.gz"))
        call, spans = _read(json.loads(gzip.decompress(files[0].read_bytes())) if files else {})
    done = dict(_tasks(run, spans))
    start = min(span.start for span in done.values())
    timeline = _timeline(run.schedule, done, start)
    predicted = simulate(dataclasses.replace(run.schedule, transfers=()), timeline.costs)
    called, returned = ((t - start) * _MS for t in call)
    return Measured(timeline, predicted, called, returned, tuple(run.flight.highest))


def busy_together(timeline: Timeline, stages: int = 2) -> float:
    """For how long devices of at least so many different stages were busy at the same time."""
    schedule = timeline.schedule
    changes = sorted(
        change
        for row in timeline.rows
        if row.end > row.start
        for at in [(row.device, schedule.piece(row.device, row.task))]
        for change in ((row.start, 1, at), (row.end, -1, at))
    )
    busy: dict[tuple[int, int], int] = {}
    out = before = 0.0
    for time, step, at in changes:
        working = [at for at, tasks in busy.items() if tasks]
        if min(len({d for d, _ in working}), len({s for _, s in working})) >= stages:
            out += time - before
        busy[at] = busy.get(at, 0) + step
        before = time
    return out


# What the profiler says


def _read(trace: Mapping[str, Any]) -> tuple[Span, dict[tuple[str, int], dict[int, Span]]]:
    """When the call was made, and per program and device its runs, by their numbers.

    trace: in Chrome's format, times in microseconds. (`jax.profiler.ProfileData`, which would read
    the profile itself, ends the process in jax 0.12.0.)
    """
    call, spans = None, dict[tuple[str, int], dict[int, Span]]()
    for event in trace.get("traceEvents", ()):
        if event.get("ph") != "X":
            continue
        span = Span(event["ts"] * 1e3, (event["ts"] + event.get("dur", 0.0)) * 1e3)
        if event.get("name") == _CALL:
            call = span
            continue
        stats = event.get("args", {})
        if all(key in stats for key in _KEYS):
            module, run, device = (stats[key] for key in _KEYS)
            runs = spans.setdefault((str(module), int(device)), {})
            old = runs.get(int(run), span)
            runs[int(run)] = Span(min(old.start, span.start), max(old.end, span.end))
    if call is None or not spans:
        raise NotMeasured(
            f"jax's profiler records no operations of {jax.default_backend()} devices with the "
            "programs that they are of: measure a step on CPU devices"
        )
    return call, spans


_KEYS = ("hlo_module", "run_id", "device_ordinal")


def _in_order(runs: Mapping[int, Span]) -> list[Span]:
    """Runs in the order of their numbers: 32 bits, which may pass their end meanwhile."""
    first = min(runs, key=lambda number: runs[number].start)
    half = 1 << 31
    numbers = sorted(runs, key=lambda number: (number - first + half) % (1 << 32))
    return [runs[number] for number in numbers]


def _tasks(
    run: Controller, spans: Mapping[tuple[str, int], Mapping[int, Span]]
) -> Iterator[tuple[tuple[str, int, int], Span]]:
    """Per kind, microbatch and piece when the task ran."""
    schedule = run.schedule
    started: dict[tuple[int, int, str], list[int]] = {}  # way, piece, kind -> microbatches
    for row in run.rows:
        if row.kind not in ("O", "R"):
            way, piece = schedule.way_of[row.microbatch], schedule.piece(row.device, row.task)
            for kind in row.kind:
                started.setdefault((way, piece, kind), []).append(row.microbatch)
    for (way, piece, kind), microbatches in started.items():
        name = f"jit_{program_name(piece, kind)}"
        devices = [d.local_hardware_id for d in run.meshes[way][piece].devices.flat]
        each = [_in_order(spans[name, d]) for d in devices if (name, d) in spans]
        if any(len(own) != len(microbatches) for own in each):
            raise NotMeasured(
                f"the profiler has {', '.join(str(len(own)) for own in each)} runs of {name} on "
                f"its devices, and {len(microbatches)} were started"
            )
        for m, *parts in zip(microbatches, *each, strict=True) if each else ():
            ran = Span(min(p.start for p in parts), max(p.end for p in parts))
            yield (kind, m, piece), ran


# As a timeline


def _timeline(
    schedule: Schedule, done: Mapping[tuple[str, int, int], Span], start: float
) -> Timeline:
    """Rows in the table's order, and the mean times of tasks as its costs."""
    rows = []
    for device, own in enumerate(schedule.orders):
        end = start
        for task in own:
            piece = schedule.piece(device, task)
            spans = [done[k, task.microbatch, piece] for k in task.kind
                     if (k, task.microbatch, piece) in done] or [Span(end, end)]  # fmt: skip
            begins, end = min(s.start for s in spans), max(s.end for s in spans)
            rows.append(Row(device, (begins - start) * _MS, (end - start) * _MS, *task))
    named = dataclasses.replace(schedule, name=f"{schedule.name}, measured", transfers=())
    return Timeline(named, _mean_costs(schedule, done), tuple(rows))


def _mean_costs(schedule: Schedule, done: Mapping[tuple[str, int, int], Span]) -> StageCosts:
    """In milliseconds; activations as the controller counts them, those of a piece as one."""

    def mean(kind: str, piece: int) -> float:
        own = [s.end - s.start for (k, _, p), s in sorted(done.items()) if (k, p) == (kind, piece)]
        return sum(own) / len(own) * _MS if own else 0.0

    f, b, w = (tuple(mean(kind, p) for p in range(schedule.pieces)) for kind in "FBW")
    ones = (1.0,) * schedule.pieces
    return StageCosts(f, b, w, 0.0, ones, ones)
