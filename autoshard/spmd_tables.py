"""Where does each value lie, and which way does it go, where all devices run one program?

Values of one form, which is a shape and a dtype, lie in one buffer that has so many *slots*. On
each device a value has a slot from the tick that makes it to the last that reads it there. Which
slot each task reads, and where what it makes is written, is in tables, by device and tick. The
program is the same for all devices, and so a buffer has the slots of that device that needs most.

A value that another device reads is sent there at once, by a *link*: one permutation of the
devices, in every tick, that moves one value of one form so many devices on. As many links are there
as a tick has values of that form to send so far: in a chain of stages most often one down, for
activations, and one up, for their cotangents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autoshard.stage_programs import StagePrograms
from autoshard.step import local_shape
from autoshard.time_loop import Program
from passes.pipeline.schedule import Task
from passes.pipeline.ticks import PieceTask, Ticks, slots

Form = tuple[tuple[int, ...], Any]  # a shape and a dtype
NONE = -1  # in a table: no task, or no slot


@dataclass(frozen=True)
class Link:
    """One permutation of the devices, in every tick.

    pairs: who sends to whom, ever. sent: by device and tick which of a task's results of this form
    it sends; stored: in which slot it puts what has arrived.
    """

    form: Form
    pairs: tuple[tuple[int, int], ...]
    sent: np.ndarray
    stored: np.ndarray


@dataclass(frozen=True)
class Tables:
    """All by device and tick.

    task: which of `keys` is done; microbatch: of which. reads: the slot of each thing that the task
    takes. stores: by form, the slots of its results of this form. results: of each task those that
    another one reads. slots: of each form's buffer; held: slots that each device needs of each.
    """

    keys: tuple[PieceTask, ...]
    results: Mapping[PieceTask, tuple[int, ...]]
    task: np.ndarray
    microbatch: np.ndarray
    reads: np.ndarray
    stores: Mapping[Form, np.ndarray]
    links: tuple[Link, ...]
    slots: Mapping[Form, int]
    held: Mapping[Form, tuple[int, ...]]


@dataclass
class _Lying:
    """A value on a device: when it comes, who reads it, and where it is to be written down."""

    form: Form
    born: int
    last: int
    readers: list[tuple[int, int]] = field(default_factory=list)  # tick, which operand
    place: tuple[np.ndarray, tuple[int, ...]] | None = None


def form_of(program: Program, p: int) -> Form:
    """Shape and dtype of what a step has of a place."""
    aval = program.avals[p]
    return local_shape(aval.shape, program.views[p], program.steps), aval.dtype


def needs_of(made: StagePrograms) -> dict[PieceTask, tuple[PieceTask, ...]]:
    """By task those that make what it takes."""
    maker = {p: key for key, task in made.tasks.items() for p in task.outs}
    return {
        key: tuple(dict.fromkeys(maker[p] for p in task.ins)) for key, task in made.tasks.items()
    }


def numbered(program: Program, places: Sequence[int]) -> list[tuple[Form, int]]:
    """Of each place its form, and the how manieth of that form it is."""
    count: dict[Form, int] = {}
    out = []
    for p in places:
        form = form_of(program, p)
        out.append((form, count.get(form, 0)))
        count[form] = count.get(form, 0) + 1
    return out


def tables_of(made: StagePrograms, ticks: Ticks) -> Tables:
    """The tables of a schedule in ticks."""
    keys = tuple(made.tasks)
    read = {p for t in made.tasks.values() for p in t.ins}
    results = {key: tuple(p for p in t.outs if p in read) for key, t in made.tasks.items()}
    size = ticks.schedule.devices, ticks.count
    task, microbatch = np.full(size, NONE, np.int32), np.zeros(size, np.int32)
    for d, t, row, key in _all(ticks):
        task[d, t], microbatch[d, t] = keys.index(key), row.microbatch
    reads = np.zeros((*size, max(len(t.ins) for t in made.tasks.values())), np.int32)
    stores = {
        form: np.full((*size, many), NONE, np.int32)
        for form, many in _most(made.program, list(results.values())).items()
    }
    links = _Links(size)
    lying = _lying(made, ticks, results, stores, links)
    held = {form: [0] * size[0] for form in stores}
    for d, own in enumerate(lying):
        by_form: dict[Form, list[_Lying]] = {}
        for value in own:
            by_form.setdefault(value.form, []).append(value)
        for form, values in by_form.items():
            chosen = slots([(v.born, v.last) for v in values])
            held[form][d] = 1 + max(chosen)
            for value, slot in zip(values, chosen, strict=True):
                assert value.place is not None
                table, at = value.place
                table[at] = slot
                for tick, operand in value.readers:
                    reads[d, tick, operand] = slot
    used = {form: tuple(each) for form, each in held.items()}
    many = {form: max(each) for form, each in used.items()}
    return Tables(keys, results, task, microbatch, reads, stores, links.all(), many, used)


def _all(ticks: Ticks) -> list[tuple[int, int, Task, PieceTask]]:
    """Device, tick, task, and the task by its piece: in the order of ticks."""
    piece = ticks.schedule.piece
    return [
        (d, t, row, (piece(d, row), row.kind))
        for t in range(ticks.count)
        for d, own in enumerate(ticks.rows)
        if (row := own[t]) is not None
    ]


def _most(program: Program, results: Sequence[Sequence[int]]) -> dict[Form, int]:
    """Of each form as many results as any task has."""
    out: dict[Form, int] = {}
    for own in results:
        for form, k in numbered(program, own):
            out[form] = max(out.get(form, 0), k + 1)
    return out


def _lying(
    made: StagePrograms,
    ticks: Ticks,
    results: Mapping[PieceTask, Sequence[int]],
    stores: Mapping[Form, np.ndarray],
    links: _Links,
) -> list[list[_Lying]]:
    """By device all values that lie there; and what goes over which link."""
    where = {(key, row.microbatch): (d, t) for d, t, row, key in _all(ticks)}
    readers: dict[int, list[tuple[PieceTask, int]]] = {}
    for key, task in made.tasks.items():
        for k, p in enumerate(task.ins):
            readers.setdefault(p, []).append((key, k))
    out: list[list[_Lying]] = [[] for _ in ticks.rows]
    for d, t, row, key in _all(ticks):
        outs = results[key]
        for p, (form, k) in zip(outs, numbered(made.program, outs), strict=True):
            there: dict[int, _Lying] = {}
            for reader, operand in readers[p]:
                at, tick = where[reader, row.microbatch]
                value = there.setdefault(at, _Lying(form, t, tick))
                value.last = max(value.last, tick)
                value.readers.append((tick, operand))
            for at, value in there.items():
                if at == d:
                    value.place = stores[form], (d, t, k)
                else:
                    value.place = links.send(form, d, at, t, k)
                out[at].append(value)
    return out


class _Links:
    """Links, made as they are needed."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.made: dict[tuple[int, Form, int], Link] = {}
        self.pairs: dict[tuple[int, Form, int], set[tuple[int, int]]] = {}

    def send(
        self, form: Form, here: int, there: int, tick: int, which: int
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """Send a result of a task; the place of the table that says where it is stored."""
        devices = self.size[0]
        far, k = (there - here) % devices, 0
        while (far, form, k) in self.made and self.made[far, form, k].stored[there, tick] != NONE:
            k += 1
        key = far, form, k
        if key not in self.made:
            none = np.full(self.size, NONE, np.int32)
            self.made[key] = Link(form, (), np.zeros(self.size, np.int32), none)
        link = self.made[key]
        link.sent[here, tick] = which
        link.stored[there, tick] = 0  # taken: which slot it is comes later
        self.pairs.setdefault(key, set()).add((here, there))
        return link.stored, (there, tick)

    def all(self) -> tuple[Link, ...]:
        """All links, with the pairs that ever send."""
        return tuple(
            Link(link.form, tuple(sorted(self.pairs[key])), link.sent, link.stored)
            for key, link in self.made.items()
        )
