"""Around which huge values can a program run in blocks, along which dim, and in how many loops?

A *region* is a connected part of a body around huge values (`passes.huge`): all of one attention,
forwards and backwards. One dim of the value that expands first is its time axis. It is followed
through the rules of all operations of the region (`passes.time_axis`): each huge value must be
split along it, and what lacks it, or must be added up, is small.

What comes back into the region from outside divides it into *rounds*. A value that the region
makes, and that products or whole rows turn into something the region reads, is there as a whole
after its round only: attention's result, which the gradient of the result comes from. Each round
is a loop of its own; what it reads of an earlier round's huge values it computes again. Without
such a way round there is one loop: of a cross entropy, forwards and backwards together.

    round(unit) = max over operands x:  round(x)      where a step's own part of x is enough
                                        round(x) + 1  where x is needed as a whole
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from passes.bodies import Body, Unit
from passes.huge import PRODUCTS, Part, find_huge, is_plain
from passes.ir.graph import Graph, Op
from passes.time_axis import Split, View, spread
from passes.time_phases import runs_on_parts

Taken = tuple[tuple[Split | None, ...], tuple[View, ...]]


@dataclass(frozen=True)
class Axis:
    """A time axis of a region. taken: by operation, the parts of its operands and results."""

    dim: int
    length: int
    taken: Mapping[int, Taken]


@dataclass(frozen=True)
class Region:
    """A region with its time axis. leaves: of each cheap value of the body."""

    body: Body
    part: Part
    leaves: Mapping[int, tuple[int, ...]]
    axis: Axis

    @property
    def units(self) -> tuple[int, ...]:
        """Its places in the body."""
        return self.part.units

    @property
    def root(self) -> int:
        """The operation that expands."""
        return self.part.root

    @property
    def values(self) -> frozenset[int]:
        """Its huge values."""
        return self.part.values


@dataclass(frozen=True)
class Rounds:
    """When what happens. core: per unit of the region its round; near: of small operations beside
    it that can run in a round's loop; inside: per value its part and the round it is made in.
    """

    core: Mapping[int, int]
    near: Mapping[int, int]
    inside: Mapping[int, tuple[Split, int]]


@dataclass(frozen=True, slots=True)
class Refused:
    """Huge values that can not be split: the operation that needs more than a part of them."""

    root: int
    op: int


def find_regions(
    graph: Graph, bodies: Sequence[Body]
) -> tuple[tuple[Region, ...], tuple[Refused, ...]]:
    """All regions of a program, and what could be none."""
    regions: list[Region] = []
    refused: list[Refused] = []
    for body in bodies:
        huge = find_huge(graph, body)
        for part in huge.parts:
            found = _best_axis(graph, body, part)
            if isinstance(found, Axis):
                regions.append(Region(body, part, huge.leaves, found))
            else:
                refused.append(Refused(part.root, found))
    return tuple(regions), tuple(refused)


def along(region: Region, graph: Graph, steps: int) -> Axis | None:
    """The region's time axis in so many steps; None where it can not be cut so."""
    found = _axis(graph, region.body, region.part, region.axis.dim, steps)
    return found if isinstance(found, Axis) else None


def steps_of(region: Region, count: int) -> int:
    """In how many steps a region is looked at for so many blocks: where these do not divide it, row
    by row.
    """
    return region.axis.length if region.axis.length % count else count


def _best_axis(graph: Graph, body: Body, part: Part) -> Axis | int:
    """The longest dim that splits all; else the operation that the longest one failed at."""
    shape = graph.values[graph.ops[part.root].outputs[0]].shape
    failed = part.root
    for dim in sorted(range(len(shape)), key=lambda d: (-shape[d], d)):
        if shape[dim] > 1:
            found = _axis(graph, body, part, dim, smallest_factor(shape[dim]))
            if isinstance(found, Axis):
                return found
            failed = found if failed == part.root else failed
    return failed


def smallest_factor(n: int) -> int:
    """The smallest number above one that divides n."""
    return next((p for p in range(2, int(n**0.5) + 1) if n % p == 0), n)


def _axis(graph: Graph, body: Body, part: Part, dim: int, steps: int) -> Axis | int:
    """One dim of what the root makes, through the region; or the operation where it ends."""
    ops = [graph.ops[body.units[k].op] for k in part.units]
    made = graph.ops[part.root].outputs[0]
    found = _Spread(ops, part.values, steps)
    failed = found.spread(made, Split(dim, 1))
    if failed is not None:
        return failed
    return Axis(dim, graph.values[made].shape[dim], found.taken)


class _Spread:
    """A part of one huge value, and with it of all in its region."""

    def __init__(self, ops: Sequence[Op], values: Collection[int], steps: int) -> None:
        self.values, self.steps = values, steps
        self.touching: dict[int, list[Op]] = {}
        for op in ops:
            for v in dict.fromkeys((*op.inputs, *op.outputs)):
                if v in values:
                    self.touching.setdefault(v, []).append(op)
        self.parts: dict[int, Split] = {}
        self.taken: dict[int, Taken] = {}

    def spread(self, value: int, part: Split) -> int | None:
        """The operation that needs more than a part; None where there is none."""
        self.parts[value] = part
        todo = [value]
        while todo:
            for op in self.touching[todo.pop()]:
                more = self.through(op)
                if more is None:
                    return op.id
                todo += more
        return None

    def through(self, op: Op) -> list[int] | None:
        """The huge values of which this operation tells the part; None where it can not be."""
        places = (*op.inputs, *op.outputs)
        found = spread_from(op, self.parts, self.steps)
        if found is None:
            return None
        self.taken[op.id] = found
        new = []
        for v, part in zip(places, (*found[0], *found[1]), strict=True):
            if v in self.values and self.parts.get(v) != part:
                if v in self.parts or not isinstance(part, Split):
                    return None
                self.parts[v] = part
                new.append(v)
        return new


def rounds(region: Region, graph: Graph, axis: Axis, steps: int, others: frozenset[int]) -> Rounds:
    """The rounds of a region. others: units of other regions, which are never near."""
    return _Walk(region, graph, axis, steps, others).walk()


class _Walk:
    """One walk along a body, in its order."""

    def __init__(
        self, region: Region, graph: Graph, axis: Axis, steps: int, others: frozenset[int]
    ) -> None:
        self.region, self.graph, self.axis, self.steps = region, graph, axis, steps
        self.others, self.units = others, region.body.units
        self.inside: dict[int, tuple[Split, int]] = {}
        self.ready: dict[int, int] = {}  # the first round that can read a value as a whole
        self.core: dict[int, int] = {}
        self.near: dict[int, int] = {}

    def walk(self) -> Rounds:
        mine = set(self.region.units)
        for k, unit in enumerate(self.units):
            if k in mine:
                self.in_region(k, self.graph.ops[unit.op])
            elif unit.op < 0 or k in self.others or not self.beside(k, self.graph.ops[unit.op]):
                self.outside(unit)
        return Rounds(self.core, self._on_the_way(), self.inside)

    def whole(self, v: int) -> int:
        """The first round that can read all of a value."""
        return self.inside[v][1] + 1 if v in self.inside else self.ready.get(v, 0)

    def outside(self, unit: Unit) -> None:
        first = max((self.whole(v) for v in unit.reads), default=0)
        self.ready.update(dict.fromkeys(unit.makes, first))

    def in_region(self, k: int, op: Op) -> None:
        taken, made = self.axis.taken[op.id]
        now = 0
        for v, part in zip(op.inputs, taken, strict=True):
            here = v in self.inside and self.inside[v][0] == part
            now = max(now, self.inside[v][1] if here else self.whole(v))
        self.core[k] = now
        self.results(op, made, now)

    def results(self, op: Op, made: Sequence[View], now: int) -> None:
        for v, view in zip(op.outputs, made, strict=True):
            if isinstance(view, Split):
                self.inside[v] = (view, now)
            else:
                self.ready[v] = now + 1

    def beside(self, k: int, op: Op) -> bool:
        """Whether a small operation can go along with what it reads of the region."""
        mine = [v for v in op.inputs if v in self.inside]
        if not mine or not is_plain(op) or op.name in PRODUCTS:
            return False
        now = max(self.inside[v][1] for v in mine)
        if any(self.whole(v) > now for v in op.inputs if v not in self.inside):
            return False
        found = spread_from(op, {v: self.inside[v][0] for v in mine}, self.steps)
        if found is None or not all(isinstance(view, Split) for view in found[1]):
            return False
        self.near[k] = now
        self.results(op, found[1], now)
        return True

    def _on_the_way(self) -> dict[int, int]:
        """Of what could go along, that from which the region reads on in the same round."""
        wanted: set[tuple[int, int]] = set()
        out: dict[int, int] = {}
        for k in reversed(range(len(self.units))):
            unit = self.units[k]
            if k in self.core:
                now = self.core[k]
                taken = self.axis.taken[unit.op][0]
                for v, part in zip(self.graph.ops[unit.op].inputs, taken, strict=True):
                    if v in self.inside and self.inside[v][0] == part:
                        wanted.add((v, now))
            elif k in self.near:
                now = self.near[k]
                if any((v, now) in wanted for v in unit.makes):
                    out[k] = now
                    wanted.update((v, now) for v in unit.reads)
        return out


def spread_from(op: Op, parts: Mapping[int, Split], steps: int) -> Taken | None:
    """What an operation takes and makes, where these of its values are parts."""
    seen = {k: parts[v] for k, v in enumerate((*op.inputs, *op.outputs)) if v in parts}
    found = spread(op.rule, seen, steps)
    return found if found is not None and runs_on_parts(op, *found) else None
