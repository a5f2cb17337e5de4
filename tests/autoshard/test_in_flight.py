"""What lies in memory while a controller runs ahead of the work: never more than the table's peak.

Of every schedule, once with devices that are played, as slow as can be, and once with arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.between_tasks import Shelf, handed_on
from autoshard.controller import Controller
from autoshard.in_flight import InFlight
from autoshard.in_stages import Staged, in_stages
from autoshard.step import local_shape
from passes.pipeline import both_ways, generators, offload, vee
from passes.pipeline.schedule import Schedule
from passes.pipeline.stage_costs import even
from passes.pipeline.timeline import Timeline, simulate

SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": generators.gpipe,
    "1f1b": generators.one_f_one_b,
    "eager": generators.eager,
    "interleaved": partial(generators.interleaved, chunks=2),
    "2bp": generators.two_bp,
    "zb_h1": generators.zb_h1,
    "zb_h2": generators.zb_h2,
    "v_min": vee.v_min,
    "v_half": vee.v_half,
    "zb_v": vee.zb_v,
    "dualpipe": both_ways.dualpipe,
    "bitpipe": both_ways.bitpipe,
    "offload": offload.pipe_offload,
}


@cache
def timeline_of(name: str) -> Timeline:
    """Four devices, 16 microbatches; a unit of memory is a microbatch of a piece."""
    schedule = SCHEDULES[name](4, 16)
    n = schedule.pieces
    return simulate(schedule, even(n, n, 1, 1, 1, transfer=3 if schedule.transfers else None))


# Devices that are played.


class Slow:
    """A device that does nothing before somebody waits for it, and then just what it must."""

    def __init__(self) -> None:
        self.queue: list[Later] = []
        self.held = self.highest = 0

    def begin(self, takes: int, frees: int) -> Later:
        self.held += takes  # arrays have their memory from the start
        self.highest = max(self.highest, self.held)
        self.queue.append(Later(self, frees))
        return self.queue[-1]


class Later:
    """What a task will have made."""

    def __init__(self, device: Slow, frees: int) -> None:
        self.device, self.frees, self.done = device, frees, False

    def is_ready(self) -> bool:
        return self.done

    def block_until_ready(self) -> None:
        while not self.done:
            first = self.device.queue.pop(0)
            first.done = True
            self.device.held -= first.frees


def played(timeline: Timeline, ahead: int, limits: tuple[float, ...]) -> tuple[list[int], InFlight]:
    """The most that lay on each device, when a table is run as a controller runs it."""
    schedule = timeline.schedule
    devices = [Slow() for _ in range(schedule.devices)]
    links = [Slow() for _ in range(schedule.devices)]
    flight = InFlight(limits, ahead)
    rows = sorted((*timeline.rows, *timeline.transfers), key=lambda r: (r.start, r.end, r.device))
    for row in rows:
        d, key = row.device, (row.microbatch, schedule.piece(row.device, row.task))
        if row.kind in ("F", "R"):
            flight.take(d)
        if row.kind == "R":
            devices[d].begin(takes=1, frees=0)
        elif row.kind == "O":
            later = links[d].begin(takes=0, frees=1)
            later.device = links[d]
            flight.started(d, key, [later], frees=True, is_task=False)
        else:
            flight.room_for_task(d)
            last = row.kind in ("W", "BW")
            later = devices[d].begin(takes=int(row.kind == "F"), frees=int(last))
            flight.started(d, key, [later], frees=last)
        assert flight.held[d] >= devices[d].held + links[d].held
    return [a.highest for a in devices], flight


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "offload"])
@given(ahead=st.integers(1, 40))
def test_slow_devices_never_hold_more_than_the_table(name: str, ahead: int) -> None:
    timeline = timeline_of(name)
    highest, flight = played(timeline, ahead, timeline.peaks)
    assert all(have <= peak for have, peak in zip(highest, timeline.peaks, strict=True))
    assert all(have <= peak for have, peak in zip(flight.highest, timeline.peaks, strict=True))
    assert all(sum(b.is_task for b in own) <= ahead for own in flight.begun)


def test_offloaded_activations_make_room_once_they_are_away() -> None:
    timeline = timeline_of("offload")
    for ahead in (1, 4, 1000):
        _, flight = played(timeline, ahead, timeline.peaks)
        assert tuple(flight.highest) == timeline.peaks


def test_without_limits_they_would_hold_more() -> None:
    timeline = timeline_of("1f1b")
    highest, _ = played(timeline, 1000, (1000.0,) * 4)
    assert highest == [16, 16, 16, 16]
    assert timeline.peaks == (4, 3, 2, 1)


def test_what_ends_without_a_task_of_its_own_is_let_go() -> None:
    flight = InFlight((1.0,), ahead=4)
    device = Slow()
    flight.take(0)
    later = device.begin(takes=1, frees=0)
    flight.started(0, "first", [later], frees=False)
    flight.nothing_to_do(0, "first")  # with the last task of it that there was
    assert flight.held == [1]
    flight.take(0)
    assert later.done
    assert flight.held == [1]
    flight.nothing_to_do(0, "second")  # of which nothing is under way
    assert flight.held == [0]


# Arrays.


ROWS, WIDTH, LAYERS = 4, 32, 8


@cache
def staged(count: int, rows: int = ROWS) -> tuple[Staged, list[Any], list[Any]]:
    """Dense layers in 16 microbatches; a skip from the first layer to the last."""

    def step(weights: list[Any], x: Any) -> tuple[list[Any], Any]:
        def loss(weights: list[Any]) -> Any:
            y = first = jnp.tanh(x @ weights[0])
            for w in weights[1:-1]:
                y = jnp.tanh(y @ w)
            return jnp.mean(((y + first) @ weights[-1]) ** 2)

        value, grads = jax.value_and_grad(loss)(weights)
        return [w - 0.1 * g for w, g in zip(weights, grads, strict=True)], value

    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    weights = [jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH for k in keys[1:]]
    args = weights, jax.random.normal(keys[0], (16 * rows, WIDTH))
    made = in_stages(step, args, {}, {}, microbatches=16, count=count)
    return made, jax.tree.leaves(args), jax.tree.leaves(jax.jit(step)(*args))


class Watch:
    """Looks at memory before each task of a controller is started."""

    def __init__(self, run: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.schedule = run, run.schedule
        self.shelf: Any = None
        self.done: dict[tuple[int, int, str], Any] = {}
        self.highest = [0] * self.schedule.devices
        self.largest = [0] * self.schedule.devices  # bytes of activations
        self.loose = 0  # bytes that lie on no shelf
        self.donated = 0
        self.base: dict[Any, int] = {}
        self.last = {s: max((k for t, k in run.steps[0] if t == s), key="FBW".index)
                     for s in range(self.schedule.pieces)}  # fmt: skip
        for steps in run.steps:
            for (stage, kind), step in steps.items():
                steps[stage, kind] = partial(self.start, step, stage, kind)

        def shelf(*args: Any) -> Shelf:
            self.shelf, self.base = Shelf(*args), live()
            return self.shelf

        monkeypatch.setattr("autoshard.controller.Shelf", shelf)

    def start(self, step: Any, stage: int, kind: str, m: Any, *rest: Any) -> Any:
        ins, given = rest[2], rest[3][0]
        device = self.schedule.place(int(m), stage).device
        if kind == "F":
            self.highest[device] = max(self.highest[device], 1 + self.lying(device))
        self.look(device, [*ins, *given])
        out = step(m, *rest)
        assert all(x.is_deleted() for x in given)
        self.donated += len(given)
        self.done[int(m), stage, kind] = out[2]
        return out

    def lying(self, device: int) -> int:
        """Microbatches and stages of a device that have begun, and whose last task is not done."""
        out = 0
        for m, stage, kind in self.done:
            if kind == "F" and self.schedule.place(m, stage).device == device:
                last = self.done.get((m, stage, self.last[stage]))
                out += last is None or not last.is_ready()
        return out

    def look(self, device: int, taken: list[Any]) -> None:
        """That nothing lies about but what the shelf holds, and how much of that is activations."""
        known = {id(x): x for x in (*self.shelf.values.values(), *taken)}
        counted = by_device(known.values())
        self.loose = max([self.loose, *(
            n - self.base.get(d, 0) - counted.get(d, 0) for d, n in live().items()
        )])  # fmt: skip
        homes = self.run.between.homes
        held = [
            x.nbytes
            for (p, m, stage), x in self.shelf.values.items()
            if (m, stage, "F") in self.done and homes[p][1] == "F"
            and self.schedule.place(m, stage).device == device
            and x.sharding.memory_kind == "device"
        ]  # fmt: skip
        self.largest[device] = max(self.largest[device], sum(held))


def by_device(arrays: Iterable[Any]) -> dict[Any, int]:
    out: dict[Any, int] = {}
    for x in arrays:
        for d in x.devices():
            out[d] = out.get(d, 0) + x.nbytes
    return out


def live() -> dict[Any, int]:
    """Bytes of all arrays."""
    return by_device(jax.live_arrays())


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_takes_more_than_its_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far ahead: by what is counted, by what is done, and by the arrays that there are."""
    schedule, peaks = SCHEDULES[name](4, 16), timeline_of(name).peaks
    made, flat, want = staged(schedule.pieces)
    devices = [[d] for d in jax.devices()[:4]]
    run = Controller(made.traced, made.loop, made.stages, schedule, devices, ahead=1000)
    assert run.limits == peaks
    watch = Watch(run, monkeypatch)
    for x, y in zip(run(*flat), want, strict=True):
        assert jnp.allclose(jax.device_get(x), jax.device_get(y), atol=1e-5)
    each = [activation_bytes(run, stage) for stage in range(schedule.pieces)]
    for d, peak in enumerate(peaks):
        assert run.flight.highest[d] <= peak
        if name != "offload":  # what is away is not done
            assert watch.highest[d] <= peak
        own = {stage for way in schedule.ways for stage, p in enumerate(way) if p.device == d}
        assert watch.largest[d] <= peak * max(each[stage] for stage in own)
    assert max(run.flight.highest) == max(peaks)
    assert watch.loose <= 4 * len(run.rows) * 2  # a number for each task that may not be done
    assert watch.donated


def activation_bytes(run: Controller, stage: int) -> int:
    """Of one microbatch: what forward tasks make and the backward ones of a stage need."""
    made = run.made
    between = handed_on(made)
    needed = {p for (s, kind), t in made.tasks.items() if s == stage and kind != "F" for p in t.ins}
    return sum(local_bytes(run, p) for p in needed if between.homes[p][1] == "F")


def local_bytes(run: Controller, p: int) -> int:
    aval = run.program.avals[p]
    shape = local_shape(aval.shape, run.program.views[p], run.program.steps)
    return math.prod(shape) * aval.dtype.itemsize
