"""Which layers that stand one after the other could the backward half compute again?

A model written as a loop over layers is traced as one long program, in which a sequence of
equations repeats: `runs` finds the sequences. A repeat is cut where the fewest bytes cross to the
next one: the stream between two layers. Of the values that a layer makes and the backward half
reads, those that no other layer takes are made again, from what crosses into the layer and its
weights (Chen et al., arXiv 1604.06174). They are made just before the first equation that reads
one of them, and behind a barrier with the gradient that it reads: XLA would merge them with the
first time, or make them as soon as it can.

Where no sequence repeats in most of the program, it is cut in pieces that keep as little as can be;
not where loops are most of it, which are computed again by themselves.

>>> runs([0, 1, 2, 3, 1, 2, 3, 1, 2, 9], [1.0] * 10)
[(1, 3, 9)]
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from passes.bodies import Body, Path
from passes.checkpointed import done_again
from passes.ir.graph import Graph, Op
from passes.remat_region import Layer, RematRegion, maker_of, under

_LEAST = 0.05  # of a body's work: a sequence that repeats and has less is no layer
_MOST = 0.5  # of a forward half: with less in layers that repeat, it is cut in pieces
_PIECES = 16  # at most
_NEAR = 0.3  # of a piece's bytes: as far from its even share as a cut may lie
_SIMILAR = 0.7  # of a layer's equations: where as many are beside layers, it is one more
_ALIKE = 0.95  # of the most that any sequence covers: a shorter one that covers as much is taken


def remat_layers(
    graph: Graph,
    bodies: Sequence[Body],
    backward: Collection[Path],
    user: Collection[int],
    apart: Collection[Path],
) -> Iterator[RematRegion]:
    """Layers, the first one first. user: operations that `jax.checkpoint` computes again.

    apart: paths of scans that are computed again by themselves.
    """
    ops = under(graph)
    scans = {op.path[:-2] for op in graph.ops if graph.regions[op.region].kind == "scan"}
    for body in bodies:
        if not body.path or body.path[:-1] in scans:
            yield from _Layers(graph, body, ops, backward, user, apart).regions()


class _Layers:
    """The forward half of a body, and what the backward half reads of it."""

    def __init__(
        self,
        graph: Graph,
        body: Body,
        ops: Mapping[Path, Sequence[Op]],
        backward: Collection[Path],
        user: Collection[int],
        apart: Collection[Path],
    ) -> None:
        self.graph, self.body, self.ops, self.user, self.apart = graph, body, ops, user, apart
        self.maker = maker_of(body)
        self.back = [k for k, u in enumerate(body.units) if u.path in backward]
        late = set(self.back)  # and what waits for it, such as an update
        for k, u in enumerate(body.units):
            if any(self.maker.get(v, -1) in late for v in u.reads):
                late.add(k)
        self.forward = [k for k in range(len(body.units)) if k not in late]
        self.updates = sorted(late.difference(self.back))
        self.nbytes = [v.type.nbytes for v in graph.values]

    @cached_property
    def readers(self) -> Mapping[int, list[int]]:
        """Backward units that read a value, by value."""
        out: dict[int, list[int]] = {}
        for k in self.back:
            for v in self.body.units[k].reads:
                out.setdefault(v, []).append(k)
        return out

    @cached_property
    def fixed(self) -> frozenset[int]:
        """Places of units that are not computed again."""
        units = [(k, self.body.units[k]) for k in self.forward]
        forward = [op for _, u in units for op in self.ops[u.path]]
        again = [op for k in self.back for op in self.ops[self.body.units[k].path]]
        again = [op for op in again if op.id in self.user]
        done = done_again(self.graph, forward, again, {})
        return frozenset(
            k
            for k, u in units
            if u.effects or u.path in self.apart or any(o.id in done for o in self.ops[u.path])
        )

    @cached_property
    def for_user(self) -> frozenset[int]:
        """Values that a part of the user's jax.checkpoint reads."""
        consumers = self.graph.consumers()
        return frozenset(v for v in self.readers if any(o in self.user for o, _ in consumers[v]))

    @cached_property
    def last(self) -> Mapping[int, int]:
        """Per value the place in the forward half of its last reader; the end for what is read
        after it, or is a result.
        """
        out = {v: i for i, k in enumerate(self.forward) for v in self.body.units[k].reads}
        for values in (self.body.results, *(self.body.units[k].reads for k in self.updates)):
            out.update(dict.fromkeys(values, len(self.forward)))
        return out

    def regions(self) -> Iterator[RematRegion]:
        """The layers of all sequences that repeat."""
        forward = set(self.forward)
        if not any(self.maker.get(v, -1) in forward for v in self.readers):
            return
        names: dict[object, int] = {}
        kinds = [names.setdefault(self.kind(k), len(names)) for k in self.forward]
        work = [self.work(k) for k in self.forward]
        found = runs(kinds, work)
        loops = sum(w for w, k in zip(work, self.forward, strict=True) if self.body.units[k].op < 0)
        name, parts = "layer", [self.bounds(*run) for run in found]
        parts = [_with_ends(bounds, kinds) for bounds in parts]
        if sum(end - start for start, _, end in found) < _MOST * len(kinds):
            name, parts = "piece", [self.pieces()] if loops < _MOST * sum(work) else []
        last = 0
        for begin, end in (pair for bounds in parts for pair in itertools.pairwise(bounds)):
            region = self.region(name, begin, end) if begin >= last else None
            last = max(last, end)
            if region is not None:
                yield region

    def kind(self, k: int) -> object:
        """What makes two units alike. Not parameters: layers may take slices of one array."""
        values = self.graph.values
        return tuple(
            (op.name, tuple(values[v].type for v in (*op.inputs, *op.outputs)))
            for op in self.ops[self.body.units[k].path]
        )

    def pieces(self) -> list[int]:
        """Where the forward half is cut in pieces that keep as little as can be.

        In the n pieces of about as many bytes of residuals, cut where few bytes cross, there lie

          what crosses + the residuals of the largest piece

        at once. What is last is computed again at once, which frees nothing, and is left out.
        """
        makes = (self.body.units[k].makes for k in self.forward)
        sizes = [sum(self.nbytes[v] for v in vs if v in self.readers) for vs in makes]
        done = [0, *itertools.accumulate(sizes)]
        best, least = [0], float(done[-1])
        for count in range(2, min(_PIECES, len(sizes)) + 1):
            bounds = self.even(done, count)
            most = max(done[b] - done[a] for a, b in itertools.pairwise(bounds))
            needed = sum(self.crossing[i] for i in bounds[1:-1]) + most
            if needed < least:
                best, least = bounds[:-1], needed
        return best

    def even(self, done: Sequence[int], count: int) -> list[int]:
        """Bounds of so many pieces. done: bytes of residuals before each place."""
        bounds, share = [0], done[-1] / count
        for k in range(1, count):
            far = [abs(x - k * share) for x in done]
            near = [i for i in range(bounds[-1] + 1, len(done) - 1) if far[i] <= _NEAR * share]
            if near:
                bounds.append(min(near, key=lambda i: (self.crossing[i], far[i])))
        return [*bounds, len(done) - 1]

    def work(self, k: int) -> float:
        """FLOPs of a unit, and a little."""
        ops = self.ops[self.body.units[k].path]
        return 1.0 + sum(op.rule.flops * self.graph.trips(op.region) for op in ops)

    def bounds(self, start: int, period: int, end: int) -> list[int]:
        """Where the repeats begin and end: where the fewest bytes cross from one to the next."""
        crossing = self.crossing

        def most(offset: int) -> tuple[int, int]:
            inner = range(start + offset + period, end - period + 1, period)
            return max((crossing[i] for i in inner), default=crossing[start + offset]), offset

        room = (end - start) % period + period  # two repeats at least are left
        best = min(range(min(room, end - start - 2 * period + 1)), key=most)
        return list(range(start + best, end + 1, period))

    @cached_property
    def crossing(self) -> list[int]:
        """Bytes that the first i forward units hand to the others, for each i."""
        change = [0] * (len(self.forward) + 2)
        for i, k in enumerate(self.forward):
            for v in self.body.units[k].makes:
                if self.last.get(v, -1) > i:
                    change[i + 1] += self.nbytes[v]
                    change[self.last[v] + 1] -= self.nbytes[v]
        return list(itertools.accumulate(change))

    def region(self, name: str, begin: int, end: int) -> RematRegion | None:
        """A layer or piece; None where nothing of it could be made again."""
        inside = dict.fromkeys(self.forward[begin:end])
        made = [v for k in inside for v in self.body.units[k].makes]
        free = {v for v in made if self.last.get(v, -1) < end and v not in self.for_user}
        wanted = [v for v in made if v in self.readers and v in free]
        units, leaves = self.made_of(wanted, inside, free)
        makes = tuple(v for v in wanted if v not in leaves)
        if not makes:
            return None
        first = min(k for v in makes for k in self.readers[v])
        if max(units) > first or max((self.maker.get(v, -1) for v in leaves), default=-1) > first:
            return None  # it is of two gradients, one after the other
        more = [v for v in leaves if v in self.maker and v not in self.readers]
        source = self.source(inside)
        again = tuple(op.id for k in units for op in self.ops[self.body.units[k].path])
        layer = Layer(
            self.body.path,
            tuple(self.body.units[k].path for k in units),
            makes,
            leaves,
            self.body.units[first].path,
            self.beside(first),
        )
        return RematRegion(
            name, source, again, makes, sum(self.nbytes[v] for v in more), layer=layer
        )

    def source(self, inside: Collection[int]) -> str:
        """The line of the layer's largest operation."""
        ops = [op for k in inside for op in self.ops[self.body.units[k].path]]
        return max(ops, key=lambda op: (op.rule.flops, -op.id)).source

    def made_of(
        self, values: Sequence[int], inside: Collection[int], free: Collection[int]
    ) -> tuple[list[int], tuple[int, ...]]:
        """Units that make values, in order, and what these read beside. free: not kept anyway."""
        units: set[int] = set()
        leaves: set[int] = set()
        todo = list(values)
        while todo:
            v = todo.pop()
            k = self.maker.get(v, -1)
            if k not in inside or k in self.fixed or v not in free:
                if self.graph.values[v].kind not in ("literal", "constant"):
                    leaves.add(v)
            elif k not in units:
                units.add(k)
                todo += self.body.units[k].reads
        return sorted(units), tuple(sorted(leaves))

    def beside(self, first: int) -> tuple[int, ...]:
        """What is there of the backward half just before a unit, and read by it or later."""
        back = set(self.back)
        for k in (k for k in self.back if k >= first):
            reads = self.body.units[k].reads
            found = [v for v in reads if self.maker.get(v, -1) in back and self.maker[v] < first]
            if found:
                return tuple(found)
        return ()


def _with_ends(bounds: list[int], kinds: Sequence[int]) -> list[int]:
    """Bounds of layers, with the first and the last one, which are often a little different."""
    begin, end, period = bounds[0], bounds[-1], bounds[1] - bounds[0]
    layer = Counter(kinds[begin : begin + period])

    def alike(a: int, b: int) -> bool:
        return (Counter(kinds[a:b]) & layer).total() >= _SIMILAR * period

    before, after = max(0, begin - period), min(len(kinds), end + period)
    return [
        *([before] if alike(before, begin) else []),
        *bounds,
        *([after] if alike(end, after) else []),
    ]


def runs(kinds: Sequence[int], weights: Sequence[float]) -> list[tuple[int, int, int]]:
    """Sequences that repeat: (begin, length of one repeat, end), by place.

    The one that covers most weight, then those beside it.
    """
    array, done = np.asarray(kinds), np.concatenate([[0.0], np.cumsum(weights)])
    found: list[tuple[int, int, int]] = []
    todo = [(0, len(kinds))]
    while todo:
        begin, end = todo.pop()
        best = _run(array[begin:end], done[begin : end + 1])
        if best is None:
            continue
        start, period, stop = best[0] + begin, best[1], best[2] + begin
        if done[stop] - done[start] >= _LEAST * done[-1]:
            found.append((start, period, stop))
            todo += [(begin, start), (stop, end)]
    return sorted(found)


def _run(kinds: np.ndarray, done: np.ndarray) -> tuple[int, int, int] | None:
    """The shortest sequence whose repeats cover about as much weight as any. done: weight before
    each place.
    """
    best: list[tuple[float, int, int, int]] = []
    for period in range(1, len(kinds) // 2 + 1):
        same = np.concatenate([[False], kinds[:-period] == kinds[period:], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2)  # begins and ends
        edges = edges[edges[:, 1] - edges[:, 0] >= period]
        if len(edges):
            covered = done[edges[:, 1] + period] - done[edges[:, 0]]
            k = int(np.argmax(covered))
            best.append((covered[k], period, int(edges[k, 0]), int(edges[k, 1]) + period))
    if not best:
        return None
    most = max(b[0] for b in best)
    _, period, start, stop = next(b for b in best if b[0] >= _ALIKE * most)
    return start, period, stop
