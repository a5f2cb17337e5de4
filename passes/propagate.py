"""Which shardings follow from a few hints?  Axes flow along factors, both ways, to a fixpoint.

The order is that of Shardy (openxla/shardy, docs/propagation.md), from the outermost loop in:
1. the user's priorities: what a hint of priority 0 implies is settled before one of priority 1 is
   looked at (until then a hinted dim stays shut, and its axes are not used elsewhere on the value);
2. kinds of operations: first elementwise operations, reshapes, transposes and links; then the
   parallel factors of all (a broadcast only backwards), then reductions and halos as well;
3. basic before aggressive: basic moves an axis only where none of the operation's values objects;
   aggressive lets each value take what it can.

What is placed is never moved. Never placed: an axis twice on a value, an axis on a dim that a hint
has closed, a split that does not divide (of a dim, or of each factor of a dim that has several, the
major one completely first), anything along a *whole* factor.

>>> from passes.ir.parse import parse_graph
>>> graph = parse_graph('''
... graph mlp
...   arg  x  f32[8,16]
...   arg  w  f32[16,4]
...   hint x  [data, ?]   train.py:3
...   hint w  [?, model]  train.py:4
...   %0 = dot_general x w  f32[8,4]  b k, k n -> b n  add(k)
...   out  %0
... ''')
>>> print(propagate(graph, Mesh.parse("data=2,model=2")))
x   f32[8{data},16]
w   f32[16,4{model}]
%0  f32[8{data},4{model}]
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from passes.anchors import Anchor, Axes, HintConflict, anchors, roots
from passes.factor_flow import BOTH, FORWARD, Flow, Holder, Shared, assemble, flow_of, project
from passes.ir.graph import Graph, Hint, short_dtype
from passes.ir.mesh import Mesh
from passes.ir.sharding import Sharding
from passes.ir.text import value_names
from passes.provenance import Arrival, Step, chain, chain_text

__all__ = ["HintConflict", "Propagation", "propagate"]

KINDS = 3  # of operations, see the module's text


@dataclass(frozen=True, slots=True)
class Propagation:
    """A sharding for every value, none partial, and how it came about.

    anchors: what the hints say, by root (`passes.anchors.roots`, here as `group`).
    """

    graph: Graph
    mesh: Mesh
    shardings: tuple[Sharding, ...]
    anchors: dict[int, Anchor]
    group: tuple[int, ...]
    arrivals: tuple[dict[int, Arrival], ...]

    def why(self, value: int, axis: int | str) -> tuple[Step, ...]:
        """The steps by which an axis came to a value, back to the hint; () if it never did."""
        index = axis if isinstance(axis, int) else self.mesh.names.index(axis)
        return tuple(chain(self.arrivals, self.group, value, index))

    def explain(self, value: int, axis: str) -> str:
        """The same in words; "" when the axis does not split the value."""
        return chain_text(self.graph, self.why(value, axis), axis)

    def __str__(self) -> str:
        names = value_names(self.graph)
        shown = [v for v in self.graph.values if v.kind != "literal"]
        width = max((len(names[v.id]) for v in shown), default=0)
        return "\n".join(
            f"{names[v.id]:<{width}}  "
            + self.shardings[v.id].text(v.shape, short_dtype(v.type.dtype), self.mesh)
            for v in shown
        )


def propagate(
    graph: Graph, mesh: Mesh, hints: Iterable[Hint] | None = None, wiring: Wiring | None = None
) -> Propagation:
    """Shardings of all values that follow from the hints (those of the graph, unless given).

    wiring: of the graph, where it is propagated through more than once. Raises HintError for a hint
    that does not fit its value or the mesh, and HintConflict for two that contradict each other on
    one value.
    """
    wiring = wire(graph) if wiring is None else wiring
    group = wiring.group
    found = anchors(graph, mesh, graph.hints if hints is None else hints, group)
    run = _Run(graph, mesh, wiring)
    run.reserve(found)
    for priority in sorted({h.priority for a in found.values() for h in a.hints if h}):
        run.settle(run.place(found, priority))
    count = len(mesh.sizes)
    by_root = {r: Sharding.of_dims(tuple(run.dims[r]), count) for r in set(group)}
    return Propagation(
        graph, mesh, tuple(by_root[r] for r in group), found, group, tuple(run.arrivals)
    )


@dataclass(frozen=True, slots=True)
class Wiring:
    """What axes flow along in a graph, on any mesh.

    group: per value its root. tensors: per operation the roots of its operands and results. flows:
    per operation how factors join them. touching: per root the operations that have it; one for all
    that do the same to the same roots.
    """

    group: tuple[int, ...]
    tensors: tuple[tuple[int, ...], ...]
    flows: tuple[Flow, ...]
    touching: tuple[tuple[int, ...], ...]


def wire(graph: Graph) -> Wiring:
    """The wiring of a graph."""
    group = tuple(roots(graph))
    tensors = tuple(tuple([group[v] for v in (*op.inputs, *op.outputs)]) for op in graph.ops)
    known: dict[tuple[int, str], Flow] = {}
    flows = tuple(flow_of(op, known) for op in graph.ops)
    touching: list[list[int]] = [[] for _ in graph.values]
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for op, (flow, has) in enumerate(zip(flows, tensors, strict=True)):
        if (id(flow), has) not in seen:
            seen.add((id(flow), has))
            for r in dict.fromkeys(has):
                touching[r].append(op)
    return Wiring(group, tensors, flows, tuple(tuple(t) for t in touching))


class _Run:
    """The state while propagating. Lists are indexed by value, and used at roots only.

    dims: per dim the axes that split it. shut: per dim whether a hint closed it. used, kept: bits
    of the axes that split the value, and of those that its hints need.
    """

    def __init__(self, graph: Graph, mesh: Mesh, wiring: Wiring) -> None:
        self.sizes = mesh.sizes
        self.ops = graph.ops
        self.shapes = [v.shape for v in graph.values]
        self.dims: list[list[Axes]] = [[()] * len(shape) for shape in self.shapes]
        self.shut = [[False] * len(shape) for shape in self.shapes]
        self.used = [0] * len(self.shapes)
        self.kept = [0] * len(self.shapes)
        self.arrivals: list[dict[int, Arrival]] = [{} for _ in self.shapes]
        self.tensors, self.flows = wiring.tensors, wiring.flows
        self.touching = wiring.touching
        self.projected: dict[tuple[Axes, tuple[int, ...]], tuple[tuple[Axes, ...], int]] = {}
        self.queue: list[int] = []
        self.queued = bytearray(len(graph.ops))

    # hints

    def reserve(self, found: dict[int, Anchor]) -> None:
        """Shut every hinted dim, and keep its axes for it."""
        for root, anchor in found.items():
            for d, axes in enumerate(anchor.dims):
                if axes is not None:
                    self.shut[root][d] = True
                    self.kept[root] |= _bits(axes)

    def place(self, found: dict[int, Anchor], priority: int) -> list[int]:
        """Split the dims hinted at this priority; the operations to look at first."""
        out: list[int] = []
        for root, anchor in found.items():
            for d, (axes, hint) in enumerate(zip(anchor.dims, anchor.hints, strict=True)):
                if hint is None or axes is None or hint.priority != priority:
                    continue
                self.used[root] |= _bits(axes)
                self.dims[root][d] = axes
                for a in axes:
                    self.arrivals[root][a] = Arrival(hint.value, d, hint)
                out += self.touching[root]
        return out

    # the loops

    def settle(self, start: Iterable[int]) -> None:
        """Run all kinds of operations, basic then aggressive, each to a fixpoint."""
        pending = set(start)
        for kind in range(KINDS):
            for move in (self.basic, self.aggressive):
                for op in pending:
                    self.enqueue(op)
                while self.queue:
                    op = heapq.heappop(self.queue)
                    self.queued[op] = 0
                    open_ = self.disagreeing(op)
                    if not open_:
                        pending.discard(op)
                        continue
                    pending.add(op)
                    allowed = [f for f in open_ if f.directions[kind]]
                    if allowed:
                        move(op, allowed, kind)

    def enqueue(self, op: int) -> None:
        """See to it that the operation is looked at (again); the first of the program first."""
        if not self.queued[op]:
            self.queued[op] = 1
            heapq.heappush(self.queue, op)

    def disagreeing(self, op: int) -> list[Shared]:
        """The factors that not all of the operation's values split alike."""
        tensors, used = self.tensors[op], self.used
        for r in tensors:
            if used[r]:
                break
        else:
            return []
        dims, out = self.dims, []
        for f in self.flows[op].shared:
            first = None
            for t, d, at in f.holders:
                axes = dims[tensors[t]][d] if at < 0 else self.axes_on(op, f, (t, d, at))
                if first is None:
                    first = axes
                elif axes != first:
                    out.append(f)
                    break
        return out

    # one operation

    def axes_on(self, op: int, f: Shared, holder: Holder) -> Axes:
        """The axes that split a factor in one of its values."""
        t, d, at = holder
        axes = self.dims[self.tensors[op][t]][d]
        if at < 0:
            return axes
        return self.parts(axes, f.sizes[t])[0][at]

    def parts(self, axes: Axes, sizes: tuple[int, ...]) -> tuple[tuple[Axes, ...], int]:
        """Axes of a dim dealt out to its factors (see `project`)."""
        key = (axes, sizes)
        if key not in self.projected:
            self.projected[key] = project(axes, sizes, self.sizes)
        return self.projected[key]

    def compatible(self, op: int, f: Shared, direction: int) -> Axes:
        """The longest list of axes that no value contradicts; only sources may lengthen it."""
        count = self.flows[op].operands
        sources: list[Axes] = []
        others: list[Axes] = []
        for holder in f.holders:
            forward = holder[0] < count
            giving = direction == BOTH or (direction == FORWARD) == forward
            (sources if giving else others).append(self.axes_on(op, f, holder))
        longest: Axes = max(sources, key=len, default=())
        for axes in (*sources, *others):
            for same, (a, b) in enumerate(zip(axes, longest, strict=False)):
                if a != b:
                    longest = longest[:same]
                    break
        return longest

    def takes(self, op: int, f: Shared, holder: Holder, axes: Axes) -> int:
        """How many of these axes a value that has the factor has or could have, others apart."""
        t, d, at = holder
        root = self.tensors[op][t]
        have = self.axes_on(op, f, holder)
        size = self.shapes[root][d] if at < 0 else f.size
        product = 1
        for n, a in enumerate(axes):
            product *= self.sizes[a]
            if n < len(have) and have[n] == a:
                continue
            stuck = at >= 0 and self.parts(self.dims[root][d], f.sizes[t])[1] <= at
            if self.shut[root][d] or stuck or self.kept[root] >> a & 1 or size % product:
                return n
        return len(axes)

    def basic(self, op: int, factors: Sequence[Shared], kind: int) -> None:
        """Move what all of the operation's values can bear, factor by factor."""
        tensors = self.tensors[op]
        for f in factors:
            axes = self.compatible(op, f, f.directions[kind])
            for holder in f.holders:
                axes = axes[: self.takes(op, f, holder, axes)]
            have = {h[0]: self.axes_on(op, f, h) for h in f.holders}
            for n, a in enumerate(axes):
                if any(self.used[r] >> a & 1 and a not in have.get(t, ())
                       for t, r in enumerate(tensors)):  # fmt: skip
                    axes = axes[:n]
                    break
            if axes:
                for holder in f.holders:
                    self.extend(op, f, holder, axes, have)

    def aggressive(self, op: int, factors: Sequence[Shared], kind: int) -> None:
        """Let each value take what it can, results first.

        Where two factors want one axis on a value, the one goes first whose axes come from the
        larger value (it is cheaper to reshard the smaller one), in elementwise operations then the
        one with more pieces, then the one of the earlier operand.
        """
        flow = self.flows[op]
        asked = []
        for f in factors:
            axes = self.compatible(op, f, f.directions[kind])
            if axes:
                have = {h[0]: self.axes_on(op, f, h) for h in f.holders}
                asked.append((*self.rank(op, axes, have), f.index, f, axes, have))
        asked.sort(key=lambda a: a[:4])
        for results in (True, False):
            for *_, f, axes, have in asked:
                for holder in f.holders:
                    if (holder[0] >= flow.operands) == results:
                        self.claim(op, f, holder, axes, have)

    def rank(self, op: int, axes: Axes, have: dict[int, Axes]) -> tuple[int, int, int]:
        """How soon a factor gets its way: by its source's size, its pieces, its source's place."""
        tensors = self.tensors[op]
        largest, first = max(
            (math.prod(self.shapes[tensors[t]]), -t)
            for t, theirs in have.items() if theirs[: len(axes)] == axes
        )  # fmt: skip
        pieces = math.prod(self.sizes[a] for a in axes) if self.flows[op].elementwise else 0
        return -largest, -pieces, -first

    def claim(
        self, op: int, f: Shared, holder: Holder, axes: Axes, before: dict[int, Axes]
    ) -> None:
        """Give a factor of one value as many of the axes as nothing on that value forbids."""
        t = holder[0]
        flow, used = self.flows[op], self.used[self.tensors[op][t]]
        axes = axes[: self.takes(op, f, holder, axes)]
        free = [a in before[t] or not used >> a & 1 for a in axes]
        axes = axes[: free.index(False)] if False in free else axes
        if flow.elementwise and t < flow.operands:
            # An operand gets no more than a result has: else both would have to be resharded.
            for h in f.holders:
                got = self.axes_on(op, f, h)
                if h[0] >= flow.operands and axes[: len(got)] == got:
                    axes = got
        self.extend(op, f, holder, axes, before)

    def extend(
        self, op: int, f: Shared, holder: Holder, axes: Axes, before: dict[int, Axes]
    ) -> None:
        """Give a factor of a value these axes, if they lengthen what it has.

        before: what each of the operation's values had along this factor, the sources among them.
        """
        t, d, at = holder
        root, have = self.tensors[op][t], self.axes_on(op, f, holder)
        new = axes[len(have) :]
        if not new or axes[: len(have)] != have or self.used[root] & _bits(new):
            return  # the last: the same value stands in another place of this operation
        dim: Axes | None = axes
        if at >= 0:
            parts = self.parts(self.dims[root][d], f.sizes[t])[0]
            dim = assemble((*parts[:at], axes, *parts[at + 1 :]), f.sizes[t], self.sizes)
        if dim is None:
            return
        self.dims[root][d] = dim
        self.used[root] |= _bits(new)
        values = (*self.ops[op].inputs, *self.ops[op].outputs)
        for a in new:
            source = next(s for s, theirs in before.items() if s != t and a in theirs)
            self.arrivals[root][a] = Arrival(values[t], d, None, op, values[source])
        for other in self.touching[root]:
            self.enqueue(other)


def _bits(axes: Axes) -> int:
    out = 0
    for a in axes:
        out |= 1 << a
    return out
