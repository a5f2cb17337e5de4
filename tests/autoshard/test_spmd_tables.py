"""Whoever does as the tables say finds in each slot what he needs: for any stages.

Devices are played by hand: slots hold names of values instead of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.spmd_tables import NONE, Form, Tables, form_of, needs_of, tables_of
from autoshard.stacked import Stacked
from autoshard.stage_programs import StagePrograms, TaskProgram
from passes.pipeline import generators, vee
from passes.pipeline.schedule import Schedule
from passes.pipeline.ticks import Ticks, in_ticks
from passes.time_axis import WHOLE

SCHEDULES: list[tuple[Callable[[int, int], Schedule], int]] = [
    (generators.gpipe, 1),
    (generators.one_f_one_b, 1),
    (partial(generators.interleaved, chunks=2), 2),
    (generators.zb_h1, 1),
    (generators.zb_h2, 1),
    (vee.zb_v, 2),
]


@st.composite
def stages(draw: st.DrawFn, pieces: int) -> StagePrograms:
    """Tasks that take any results of those that are done before them, of three forms."""
    keys = [(k, "F") for k in range(pieces)]
    keys += [(k, kind) for k in reversed(range(pieces)) for kind in "BW"]
    avals: list[Any] = []
    tasks: dict[tuple[int, str], TaskProgram] = {}
    made: dict[tuple[int, str], list[int]] = {}
    for piece, kind in keys:
        if kind == "F":
            before = [(k, "F") for k in range(piece)]
        else:
            before = [(k, "F") for k in range(pieces)]
            before += [(k, "B") for k in range(piece, pieces) if (k, "B") in made]
            before += [(piece, "B")] if kind == "W" else []
        known = sorted({p for key in before for p in made[key]})
        ins = draw(st.lists(st.sampled_from(known), unique=True, max_size=4)) if known else []
        outs = []
        for size in draw(st.lists(st.integers(1, 3), max_size=3)) if kind != "W" else []:
            outs.append(len(avals))
            avals.append(jax.ShapeDtypeStruct((size,), jnp.float32))
        made[piece, kind] = outs
        tasks[piece, kind] = TaskProgram(piece, kind, (), (), (), tuple(ins), tuple(outs), ())
    program = SimpleNamespace(avals=avals, views=[WHOLE] * len(avals), steps=1)
    return StagePrograms(program, tasks, (), Stacked({}, {}))  # type: ignore[arg-type]


class Played:
    """Devices with buffers, and what each makes in a tick, by form."""

    def __init__(self, made: StagePrograms, tables: Tables) -> None:
        self.made, self.tables = made, tables
        devices = len(tables.task)
        self.buffers = [
            {form: [None] * many for form, many in tables.slots.items()} for _ in range(devices)
        ]

    def tick(self, t: int) -> None:
        devices = range(len(self.buffers))
        outs = [self.task(d, t) for d in devices]
        written: set[tuple[int, Form, int]] = set()
        for d in devices:
            for form, table in self.tables.stores.items():
                own = outs[d][form]
                assert all(slot == NONE for slot in table[d, t][len(own) :])
                for x, slot in zip(own, table[d, t], strict=False):
                    self.write(d, form, slot, x, written)
        for link in self.tables.links:
            for here, there in link.pairs:
                if link.stored[there, t] != NONE:
                    x = outs[here][link.form][link.sent[here, t]]
                    self.write(there, link.form, link.stored[there, t], x, written)

    def task(self, d: int, t: int) -> dict[Form, list[Any]]:
        """What a device makes, after it has found all that it takes."""
        outs: dict[Form, list[Any]] = {form: [] for form in self.tables.stores}
        number, m = self.tables.task[d, t], int(self.tables.microbatch[d, t])
        if number == NONE:
            return outs
        key = self.tables.keys[number]
        for k, p in enumerate(self.made.tasks[key].ins):
            form = form_of(self.made.program, p)
            assert self.buffers[d][form][self.tables.reads[d, t, k]] == (p, m)
        for p in self.tables.results[key]:
            outs[form_of(self.made.program, p)].append((p, m))
        return outs

    def write(self, d: int, form: Form, slot: int, x: Any, written: set[Any]) -> None:
        if slot != NONE:
            assert (d, form, slot) not in written
            written.add((d, form, slot))
            self.buffers[d][form][slot] = x


@given(st.data(), st.sampled_from(SCHEDULES), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_each_task_finds_what_it_needs(
    data: st.DataObject, which: tuple[Callable[[int, int], Schedule], int], devices: int
) -> None:
    make, chunks = which
    schedule = make(devices, 2 * devices)
    made = data.draw(stages(devices * chunks))
    ticks = in_ticks(schedule, needs_of(made))
    tables = tables_of(made, ticks)
    for link in tables.links:
        senders, receivers = zip(*link.pairs, strict=True)
        assert len(set(senders)) == len(set(receivers)) == len(link.pairs)
    played = Played(made, tables)
    for t in range(ticks.count):
        played.tick(t)


@given(st.data(), st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_no_buffer_is_larger_than_what_lies_in_it(data: st.DataObject, devices: int) -> None:
    schedule = generators.one_f_one_b(devices, 4 * devices)
    made = data.draw(stages(devices))
    ticks = in_ticks(schedule, needs_of(made))
    tables = tables_of(made, ticks)
    lying: dict[tuple[Form, int], list[int]] = {}
    for p, _, d, born, last in lifetimes(made, ticks):
        line = lying.setdefault((form_of(made.program, p), d), [0] * ticks.count)
        for t in range(born + 1, last + 1):
            line[t] += 1
    for form, held in tables.held.items():
        assert tables.slots[form] == max(held)
        assert list(held) == [max(lying.get((form, d), [0])) for d in range(devices)]


def lifetimes(made: StagePrograms, ticks: Ticks) -> Iterator[tuple[int, int, int, int, int]]:
    """Of each value on each device where it is read: place, microbatch, device, first, last."""
    when = {
        (ticks.schedule.piece(d, task), task.kind, task.microbatch): (d, t)
        for d, own in enumerate(ticks.rows)
        for t, task in enumerate(own)
        if task
    }
    for key, task in made.tasks.items():
        for p, m in product(task.outs, range(ticks.schedule.microbatches)):
            last: dict[int, int] = {}
            for reader, other in made.tasks.items():
                if p in other.ins:
                    d, t = when[*reader, m]
                    last[d] = max(last.get(d, 0), t)
            for d, t in last.items():
                yield p, m, d, when[*key, m][1], t
