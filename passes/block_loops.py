"""Which operations does each loop over blocks run, and when?

Each round of a region (`passes.regions`) becomes one loop. What it makes that is read elsewhere is
put together again, or added up. Of what an earlier round made, it takes parts where they are small
and were kept; huge values, and what nobody else needs, it computes again, from what is small. What
is cheap it makes block by block wherever it is needed.

A loop stands where all that it reads is there: the body's equations and its loops are sorted by
what they wait for, and otherwise stay in their order.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from passes.bodies import Body, Path
from passes.ir.graph import Graph
from passes.regions import Axis, Region, Rounds, along, rounds, smallest_factor, steps_of
from passes.time_axis import PARTIAL, Split, View, spread
from passes.time_phases import runs_on_parts

Key = tuple[int, int]  # region, round
_GAIN = 0.75  # of a region's largest value: what its loop gives must be less


class NotDivided(ValueError):
    """A region that can not be cut into so many blocks; `region` is its number."""

    def __init__(self, region: int) -> None:
        super().__init__(region)
        self.region = region


@dataclass
class BlockLoop:
    """A loop over blocks. steps: what the views are of (`passes.regions.steps_of`).

    ops: ids, in order; again: those that ran before, elsewhere.

    views: of what the loop makes, as a step sees it. local: (operation, operand) that the loop
    makes; cut: of those from outside, the part that a step takes. once: operands that count in the
    first step only. outside: values it reads. results: values it gives.
    """

    region: int
    steps: int
    blocks: int
    ops: list[int] = field(default_factory=list)
    again: set[int] = field(default_factory=set)
    views: dict[int, View] = field(default_factory=dict)
    local: set[tuple[int, int]] = field(default_factory=set)
    cut: dict[tuple[int, int], Split] = field(default_factory=dict)
    once: set[tuple[int, int]] = field(default_factory=set)
    outside: dict[int, None] = field(default_factory=dict)
    results: tuple[int, ...] = ()


@dataclass(frozen=True)
class Blocked:
    """A body with loops: its equations by path, and its loops, in the order in which they run."""

    body: Path
    order: tuple[Path | BlockLoop, ...]

    @property
    def loops(self) -> tuple[BlockLoop, ...]:
        """The loops alone."""
        return tuple(item for item in self.order if isinstance(item, BlockLoop))


def block_loops(
    graph: Graph, regions: Sequence[Region], counts: Sequence[int]
) -> tuple[Blocked, ...]:
    """The bodies that have loops; a region that would gain nothing is left as it is.

    counts: the number of blocks of each region, 1 to leave it. Raises NotDivided.
    """
    out: list[Blocked] = []
    for body in dict.fromkeys(id(r.body) for r in regions):
        mine = {k: r for k, r in enumerate(regions) if id(r.body) == body and counts[k] > 1}
        while mine:
            found = _Cut(graph, mine, counts).run()
            if isinstance(found, Blocked):
                out.append(found)
                break
            mine = {k: r for k, r in mine.items() if k not in found}
    return tuple(out)


def gaining(graph: Graph, regions: Sequence[Region]) -> tuple[Region, ...]:
    """The regions that would gain something, in however many blocks."""
    counts = [smallest_factor(r.axis.length) for r in regions]
    loops = [loop for body in block_loops(graph, regions, counts) for loop in body.loops]
    return tuple(regions[r] for r in sorted({loop.region for loop in loops}))


class _Demand:
    """What a body's results need. needs: results of each round's loop; kept: rounds that others
    than their region need; plain: equations outside of loops; changed: loops to be built.
    """

    def __init__(self, body: Body, owner: Mapping[int, Key], maker: Mapping[int, int]) -> None:
        self.body, self.owner, self.maker = body, owner, maker
        self.needs: dict[Key, dict[int, None]] = {}
        self.kept: set[Key] = set()
        self.plain: set[int] = set()
        self.changed: dict[Key, None] = {}

    def begin(self) -> None:
        """The results, and equations with effects."""
        for k, unit in enumerate(self.body.units):
            if unit.effects and k not in self.owner:
                self.plain.add(k)
                self.need_all(unit.reads)
        self.need_all(self.body.results)

    def need_all(self, values: Iterable[int]) -> None:
        for v in values:
            self.need(v, -1)

    def need(self, value: int, region: int) -> None:
        """A value is needed as a whole: by this region, of a part that it made, or by others."""
        todo = [(value, region)]
        while todo:
            v, reader = todo.pop()
            k = self.maker.get(v, -1)
            if k in self.owner:
                self.of_loop(self.owner[k], v, reader)
            elif k >= 0 and k not in self.plain:
                self.plain.add(k)
                todo += [(u, -1) for u in self.body.units[k].reads]

    def of_loop(self, key: Key, v: int, reader: int) -> None:
        if reader != key[0]:
            self.kept.add(key)
        if v not in self.needs.setdefault(key, {}):
            self.needs[key][v] = None
            self.changed[key] = None


class _Cut:
    """One body, cut into equations and loops."""

    def __init__(self, graph: Graph, regions: Mapping[int, Region], counts: Sequence[int]) -> None:
        self.graph, self.regions, self.counts = graph, regions, counts
        self.body: Body = next(iter(regions.values())).body
        self.maker = {v: k for k, u in enumerate(self.body.units) for v in u.makes}
        self.axes: dict[int, Axis] = {}
        self.rounds: dict[int, Rounds] = {}
        every = frozenset(k for r in regions.values() for k in r.units)
        for r, region in regions.items():
            axis = along(region, graph, steps_of(region, counts[r]))
            if axis is None:
                raise NotDivided(r)
            self.axes[r] = axis
            others = every - frozenset(region.units)
            self.rounds[r] = rounds(region, graph, axis, steps_of(region, counts[r]), others)
        self.owner: dict[int, Key] = {}
        for r, found in self.rounds.items():
            for k, now in (*found.near.items(), *found.core.items()):
                self.owner[k] = (r, now)
        self.kept = {*self.owner.values()}  # rounds whose results others than the region read

    def run(self) -> Blocked | set[int]:
        """The body in order; or the regions that gain nothing, or can not be loops."""
        while True:
            loops, plain, kept = self.demanded()
            if kept == self.kept:
                break
            self.kept &= kept
        idle = {loop.region for loop in loops.values() if self.idle(loop)}
        if idle:
            return idle
        order, stuck = self.sorted(loops, plain)
        return Blocked(self.body.path, order) if stuck is None else {stuck}

    def idle(self, loop: BlockLoop) -> bool:
        """Whether what a loop gives is as large as what it does not keep."""
        values, huge = self.graph.values, self.regions[loop.region].values
        if any(v in huge for v in loop.results):
            return True
        inside = [v for o in loop.ops for v in self.graph.ops[o].outputs if v in huge]
        most = max((values[v].type.size for v in inside), default=0)
        return sum(values[v].type.size for v in loop.results) > _GAIN * most

    # who needs what

    def demanded(self) -> tuple[dict[Key, BlockLoop], set[int], set[Key]]:
        """All loops, the equations outside of them, and rounds that others need."""
        found = _Demand(self.body, self.owner, self.maker)
        loops: dict[Key, BlockLoop] = {}
        found.begin()
        while found.changed:
            changed, found.changed = found.changed, {}
            for key in changed:
                loops[key] = self.build(key, found.needs[key])
                inside = self.rounds[key[0]].inside
                for v in loops[key].outside:
                    found.need(v, key[0] if v in inside else -1)
        return loops, found.plain, found.kept

    # one loop

    def build(self, key: Key, results: Iterable[int]) -> BlockLoop:
        """The loop of a round that gives these results."""
        count = self.counts[key[0]]
        loop = BlockLoop(key[0], steps_of(self.regions[key[0]], count), count)
        loop.results = tuple(sorted(results))
        for v in loop.results:
            self.include(loop, key, self.maker[v], None)
        loop.ops.sort()
        return loop

    def include(self, loop: BlockLoop, key: Key, k: int, part: Split | None) -> bool:
        """Have a loop run a unit, for this part of its result; whether it can."""
        op = self.graph.ops[self.body.units[k].op]
        if all(v in loop.views for v in op.outputs):
            return part is None or loop.views[op.outputs[0]] == part
        found = self.axes[key[0]].taken.get(op.id)
        if found is None:
            wanted = part or self.rounds[key[0]].inside[op.outputs[0]][0]
            found = spread(op.rule, {len(op.inputs): wanted}, loop.steps)
            if found is None or not runs_on_parts(op, *found):
                return False
        loop.ops.append(op.id)
        loop.views.update(zip(op.outputs, found[1], strict=True))
        if self.owner.get(k) != key:
            loop.again.add(op.id)
        if op.name.startswith("scatter") and PARTIAL in found[1]:
            loop.once.add((op.id, 0))
        for n, (v, taken) in enumerate(zip(op.inputs, found[0], strict=True)):
            self.operand(loop, key, (op.id, n), v, taken)
        return True

    def operand(
        self, loop: BlockLoop, key: Key, at: tuple[int, int], v: int, part: Split | None
    ) -> None:
        """Where a loop has an operand from."""
        k = self.maker.get(v, -1)
        here = part is not None and k >= 0 and self.makes(key, v, part)
        if here and self.include(loop, key, k, part):
            loop.local.add(at)
            return
        if self.graph.values[v].kind != "literal":
            loop.outside[v] = None
        if part is not None:
            loop.cut[at] = part

    def makes(self, key: Key, v: int, part: Split) -> bool:
        """Whether a round makes this part of a value by itself."""
        r, now = key
        found, region = self.rounds[r], self.regions[r]
        if v in region.leaves:
            return True
        if v not in found.inside or found.inside[v][0] != part:
            return False
        then = found.inside[v][1]
        if then == now:
            return True
        return then < now and (v in region.values or (r, then) not in self.kept)

    # the order

    def sorted(
        self, loops: Mapping[Key, BlockLoop], plain: Iterable[int]
    ) -> tuple[tuple[Path | BlockLoop, ...], int | None]:
        """All that runs, in an order that gives each what it reads; or the region that prevents."""
        place = {u.op: k for k, u in enumerate(self.body.units) if u.op >= 0}
        items: dict[Key, tuple[int, Path | BlockLoop, list[int], Sequence[int]]] = {}
        for k in plain:
            unit = self.body.units[k]
            items[-1, k] = (k, unit.path, list(unit.reads), unit.makes)
        for key, loop in loops.items():
            own = [place[o] for o in loop.ops if o not in loop.again]
            items[key] = (max(own), loop, list(loop.outside), loop.results)
        made_by = {v: key for key, item in items.items() for v in item[3]}
        waits = {key: {made_by[v] for v in i[2] if v in made_by} for key, i in items.items()}
        acting = sorted(k for k in plain if self.body.units[k].effects)
        for first, second in pairwise(acting):  # effects stay in their order
            waits[-1, second].add((-1, first))
        readers: dict[Key, list[Key]] = {}
        for key, before in waits.items():
            for b in before:
                readers.setdefault(b, []).append(key)
        free = [(items[key][0], key) for key, before in waits.items() if not before]
        heapq.heapify(free)
        order: list[Path | BlockLoop] = []
        while free:
            _, key = heapq.heappop(free)
            order.append(items[key][1])
            for reader in readers.get(key, ()):
                waits[reader].discard(key)
                if not waits[reader]:
                    heapq.heappush(free, (items[reader][0], reader))
        if len(order) < len(items):
            return (), max(key[0] for key, before in waits.items() if before and key[0] >= 0)
        return tuple(order), None
