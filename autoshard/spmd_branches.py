"""What can a device do in a tick?  `branches_of(layout)`: each program among the tasks, once.

A task takes what the tables say of this tick, the weights, the parts of the batch, the buffers, and
the results so far. It gives what is to be stored and sent, by form, and the results with its own.
Tasks of alike stages are the same program: it finds what is its own by the tables. Where every
device has one piece, a piece's rows are the first ones on each device, and each lies by itself, so
that nothing is copied to take one.

Tasks without results of their own are branches of one `lax.switch`. Those that add to sums are
loops instead, of one round or none: what goes through a loop stays where it lies, while XLA copies
what goes through a branch, and sums of gradients are as large as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout as DeviceLayout
from jax.experimental.layout import with_layout_constraint

from autoshard.same_program import same_program
from autoshard.spmd_layout import ADDED, STACKED, Layout, places
from autoshard.spmd_tables import NONE, numbered
from passes.pipeline.ticks import PieceTask

Row = Mapping[str, Any]  # what a device's tables say of one tick
Given = tuple[Row, Any, Any, Any]  # with the weights, the parts of the batch and the buffers
Outs = list[list[Any]]  # by form

_TAKEN = ("time", "microbatch", "reads", "weights", "parts", "results")


@dataclass(frozen=True)
class Branches:
    """The programs. programs: a task of each. which: by task the number of its program."""

    layout: Layout
    programs: tuple[PieceTask, ...]
    which: Mapping[PieceTask, int]

    @property
    def plain(self) -> list[int]:
        """The programs that have no results."""
        return [k for k in range(len(self.programs)) if k not in self.adding]

    @property
    def adding(self) -> list[int]:
        """The programs that have."""
        own = [_results(self.layout, key) for key in self.programs]
        return [k for k, results in enumerate(own) if results]

    def run(
        self, row: Row, weights: Any, parts: Any, buffers: Any, held: Any
    ) -> tuple[Outs, Any, Any]:
        """One tick: what it makes for others, the results after it, and a 0, once it is done."""
        layout = self.layout
        taken = {k: row[k] for k in _TAKEN}
        given: Given = taken, weights, parts, buffers
        branches = [partial(_idle, layout)]
        branches += [partial(_plain, layout, self.programs[k]) for k in self.plain]
        outs = lax.switch(row["plain"], branches, given)
        turn = row["adding"]
        for k, number in enumerate(self.adding):
            outs, held, turn = _in_turn(layout, self.programs[number], given, outs, held, turn, k)
        return outs, held, turn


def _in_turn(
    layout: Layout, key: PieceTask, given: Given, outs: Outs, held: Any, turn: Any, k: int
) -> tuple[Outs, Any, Any]:
    """A task that has results, if it is its turn, which is over then."""
    own = _makes(layout, key)

    def once(before: Any) -> Any:
        made, added = _task(layout, key, given, before[1])
        return [made[i] for i in own], added, jnp.zeros_like(turn)

    before = [outs[i] for i in own], held, turn
    made, held, turn = lax.while_loop(lambda x: x[2] == 1 + k, once, before)
    changed = dict(zip(own, made, strict=True))
    return [changed.get(i, x) for i, x in enumerate(outs)], held, turn


def branches_of(layout: Layout) -> Branches:
    """All programs of a layout."""
    operands = _operands(layout)
    programs: list[tuple[PieceTask, Any]] = []
    which: dict[PieceTask, int] = {}
    for key in layout.tables.keys:
        jaxpr = jax.make_jaxpr(partial(_task, layout, key))(*operands)
        found = (k for k, (_, known) in enumerate(programs) if same_program(known, jaxpr))
        which[key] = next(found, len(programs))
        if which[key] == len(programs):
            programs.append((key, jaxpr))
    return Branches(layout, tuple(key for key, _ in programs), which)


def rows_of_ticks(layout: Layout, branches: Branches) -> dict[str, Any]:
    """All that the tables say, by device and tick."""
    tables = layout.tables
    chunk = np.array([[task.chunk if task else 0 for task in own] for own in layout.ticks.rows])
    device = np.arange(len(chunk))[:, None]
    number = [branches.which[key] for key in tables.keys]

    def among(programs: list[int]) -> Any:
        """By tick which of these it is, counted from 1: 0 for none of them."""
        found = [1 + programs.index(k) if k in programs else 0 for k in number]
        return np.where(tables.task == NONE, 0, np.array(found, np.int32)[tables.task])

    return {
        "plain": among(branches.plain),
        "adding": among(branches.adding),
        "microbatch": tables.microbatch,
        "reads": tables.reads,
        "stores": [tables.stores[form] for form in layout.buffers],
        "sent": [link.sent for link in tables.links],
        "stored": [link.stored for link in tables.links],
        "weights": [first[device, chunk] for first in layout.weights.first.values()],
        "parts": [first[device, chunk] for first in layout.parts.first.values()],
        "results": [first[device, chunk] for first in layout.results.first.values()],
    }


def _operands(layout: Layout) -> tuple[Given, list[Any]]:
    """What a task takes, and the results before it, in shapes."""

    def array(shape: Sequence[int] = (), dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)

    def rows(count: Mapping[Any, int], forms: Sequence[Any]) -> list[Any]:
        each = list(zip(count.values(), forms, strict=True))
        if layout.apart:
            return [array((many, *shape), dtype) for many, (shape, dtype) in each]
        return [[array(*form)] * many for many, form in each]

    row = {
        **dict.fromkeys(("time", "microbatch"), array()),
        "reads": array(layout.tables.reads.shape[2:]),
        "weights": [array()] * len(layout.weights.count),
        "parts": [array()] * len(layout.parts.count),
        "results": [array()] * len(layout.results.count),
    }
    weights = rows(layout.weights.count, list(layout.weights.count))
    parts = rows(layout.parts.count, list(layout.parts.count))
    buffers = [array((many, *form[0]), form[1]) for form, many in layout.tables.slots.items()]
    results = rows(layout.results.count, [form for _, form in layout.results.count])
    return (row, weights, parts, buffers), results


def _makes(layout: Layout, key: PieceTask) -> list[int]:
    """The buffers for which a task makes something."""
    made = numbered(layout.program, layout.tables.results[key])
    return sorted({layout.buffers.index(form) for form, _ in made})


def _idle(layout: Layout, given: Given) -> Outs:
    return _by_form(layout, {}, ())


def _plain(layout: Layout, key: PieceTask, given: Given) -> Outs:
    nothing: list[Any] = [[]] * len(layout.results.count)
    return _task(layout, key, given, nothing)[0]


def _results(layout: Layout, key: PieceTask) -> tuple[int, ...]:
    """What of a task comes after the loop."""
    task = layout.made.tasks[key]
    return tuple(dict.fromkeys([*task.sums, *(p for p in task.outs if p in layout.made.after)]))


def _task(layout: Layout, key: PieceTask, given: Given, held: Any) -> tuple[Outs, list[Any]]:
    """One task: what it makes for others, and the results with its own."""
    task, piece = layout.made.tasks[key], key[0]
    row, weights, parts, buffers = given
    outside = [
        _row(layout, weights[k], row["weights"][k], j)
        for k, j in places(layout.weights, piece, task.outside)
    ]
    ins = []
    for k, (form, _) in enumerate(numbered(layout.program, task.ins)):
        buffer = buffers[layout.buffers.index(form)]
        x = lax.dynamic_index_in_dim(buffer, row["reads"][k], keepdims=False)
        ins.append(_in_order(x) if layout.tiled else x)
    mine = []
    for k, j in places(layout.parts, piece, task.parts):
        all_parts = _row(layout, parts[k], row["parts"][k], j)
        mine.append(lax.dynamic_index_in_dim(all_parts, row["microbatch"], keepdims=False))
    local = layout.program.one_step(
        task.equations,
        dict(zip(task.outside, outside, strict=True)),
        dict(zip(task.parts, mine, strict=True)),
        row["time"],
        dict(zip(task.ins, ins, strict=True)),
    )
    held = [x if layout.apart else list(x) for x in held]
    own, modes = _results(layout, key), [mode for mode, _ in layout.results.count]
    for p, (k, j) in zip(own, places(layout.results, piece, own), strict=True):
        before = _row(layout, held[k], row["results"][k], j)
        new = _with(modes[k], before, local[p], row["microbatch"])
        if layout.apart:
            at = row["results"][k] + j
            held[k] = lax.dynamic_update_index_in_dim(held[k], new, at, 0)
        else:
            held[k][j] = new
    return _by_form(layout, local, layout.tables.results[key]), held


def _row(layout: Layout, rows: Any, first: Any, j: int) -> Any:
    """The j-th of a piece's rows, of which the table gives the first."""
    if layout.apart:
        return lax.dynamic_index_in_dim(rows, first + j, keepdims=False)
    return rows[j]


def _with(mode: str, before: Any, x: Any, microbatch: Any) -> Any:
    """A result with what a microbatch makes of it."""
    if mode == STACKED:
        return lax.dynamic_update_index_in_dim(before, x, microbatch, 0)
    return before + x.astype(before.dtype) if mode == ADDED else x


def _by_form(layout: Layout, local: Mapping[int, Any], results: Sequence[int]) -> Outs:
    """Results by form, as many of each as any task has: zeros for those that are not there."""
    out: Outs = [[] for _ in layout.buffers]
    for p, (form, _) in zip(results, numbered(layout.program, results), strict=True):
        out[layout.buffers.index(form)].append(local[p])
    for own, form in zip(out, layout.buffers, strict=True):
        many = layout.tables.stores[form].shape[2]
        own += [jnp.zeros(*form)] * (many - len(own))
    return out


def _in_order(x: Any) -> Any:
    """A value out of a buffer, laid out in the same way for all tasks.

    Else each task would want its operands, and so the whole buffer, in an order of its own, and XLA
    would copy the buffer to lay it anew. The longest dims are the last ones: they fill the tiles.
    """
    order = sorted(range(x.ndim), key=lambda d: (x.shape[d], d))
    return with_layout_constraint(x, DeviceLayout(major_to_minor=tuple(order)))


def stored(buffer: Any, made: Sequence[Any], slots: Any) -> Any:
    """A buffer with each of these in its slot; what has slot NONE is left out."""
    for k, x in enumerate(made):
        at = jnp.maximum(slots[k], 0)
        before = lax.dynamic_index_in_dim(buffer, at, keepdims=False)
        x = lax.select(jnp.broadcast_to(slots[k] >= 0, x.shape), x, before)
        buffer = lax.dynamic_update_index_in_dim(buffer, x, at, 0)
    return buffer
