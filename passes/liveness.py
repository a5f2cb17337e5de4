"""When does each value hold memory, and does it hold any?

A step of time is one operation of the flat program, in the order of `passes.schedule`. A value
that a loop body reads from outside lives until the loop ends; what a scan stacks up exists from the
loop's first step; what a loop carries is there from where it enters to its last reader in the body,
whose result may take its place. An operation that XLA fuses into all its readers leaves nothing in
memory; a donated argument and the result that takes its place are one buffer, but for a stack that
a loop makes while it slices the old one, which is copied there at the loop's end (caches, for H100,
A100 and v5e; jax 0.10.2, libtpu 0.0.42.1). Any other result has a buffer that lies there from the
first step. Until the result is made its buffer is idle, and so is a donated argument's after its
last read: `passes.lent` has what lies there meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from passes.chains import MOVES
from passes.compiler import PLAIN, Scheduler
from passes.ir.graph import LOOPS, Graph, Op
from passes.schedule import schedule
from passes.weight_casts import WeightCast, outermost_loops

# What XLA does in place: a part of an operand is overwritten.
IN_PLACE = frozenset(
    {"dynamic_update_slice", "scatter", "scatter-add", "scatter_mul", "scatter_max"}
)


@dataclass(frozen=True, slots=True)
class Liveness:
    """spans: per value its half-open life, (0, 0) for none. stored: whether it has memory.

    order: the operation of every step. when: the step of every operation. idle: values, each with
    the steps over which its buffer holds nothing.
    """

    spans: tuple[tuple[int, int], ...]
    stored: tuple[bool, ...]
    order: tuple[int, ...]
    when: tuple[int, ...]
    idle: tuple[tuple[int, int, int], ...] = ()

    @property
    def steps(self) -> int:
        """Steps of the program, and one at its end for what it returns."""
        return len(self.order) + 1


def liveness(
    graph: Graph,
    has_memory: Sequence[bool],
    aliases: Sequence[tuple[int, int]] = (),
    filled: Set[int] = frozenset(),
    scheduler: Scheduler = PLAIN,
    casts: Sequence[WeightCast] = (),
    together: Set[int] = frozenset(),
    through_chains: bool = False,
) -> Liveness:
    """Life of every value. has_memory: those that XLA does not compute inside their readers.

    aliases: (donated input, output) pairs that share a buffer. filled: as of `schedule`. casts:
    weights that are converted once. together: values made by a kernel that makes others, too; what
    reads them last does not overwrite them. through_chains: whether a result overwrites what its
    kernel reads element by element on the way to it, too, as XLA:TPU does and XLA:GPU does not.
    """
    order = schedule(graph, has_memory, aliases, filled, scheduler)
    when = [0] * len(order)
    for step, o in enumerate(order):
        when[o] = step
    begin, end, home = _made(graph, when)
    stored = list(has_memory)
    donated = {argument for argument, _ in aliases}
    lent, carried = set[int](), set[int]()  # in the memory of a donated argument
    for v, body, first in _carries(graph):
        stored[v], home[v] = True, body
        if first in donated:
            lent.add(v)
            carried.add(first)
    _read(graph, when, home, end)
    _convert_once(graph, casts, begin, end, when)
    _computed_again(graph, stored, end)
    makers = graph.producers()
    for op in graph.ops:
        read = [v for v in op.inputs if stored[v]]
        if through_chains:
            read = _overwritable(graph, makers, stored, op)
        if op.rule.fuses:
            read = [v for v in read if v not in together]
        _work_in_place(graph, op, read, stored, lent, home, end, when[op.id])
    for v in lent:
        stored[v] = False
    idle = [(g, end[g], begin[r]) for g, r in aliases if g not in carried]
    _take_places(graph, aliases, stored, end, when)
    shared = {result for _, result in aliases}
    for v in graph.outputs:
        if v not in shared:
            idle.append((v, 0, begin[v]))
            begin[v] = 0
    spans = tuple((b, e) if s else (0, 0) for b, e, s in zip(begin, end, stored, strict=True))
    return Liveness(spans, tuple(stored), order, tuple(when), _stored_once(idle, spans))


def _stored_once(
    idle: Sequence[tuple[int, int, int]], spans: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int, int], ...]:
    """Those that have memory, and are idle at all; a value that is returned twice, once."""
    found = {v: (v, b, e) for v, b, e in idle if b < e and spans[v][0] < spans[v][1]}
    return tuple(found.values())


def _take_places(
    graph: Graph,
    aliases: Sequence[tuple[int, int]],
    stored: list[bool],
    end: list[int],
    when: Sequence[int],
) -> None:
    """Results in the place of donated arguments; a stack once the loop that slices the old ends."""
    slices = {(op.inputs[0], op.region) for op in graph.ops if op.name == "scan_slice"}
    makers = graph.producers()
    for given, result in aliases:
        end[given] = len(graph.ops) + 1
        op = graph.ops[makers[result]] if makers[result] >= 0 else None
        if op is not None and op.name == "scan_stack" and (given, op.region) in slices:
            end[result] = when[graph.regions[op.region].end - 1] + 2
        elif result != given:
            stored[result] = False


def _made(graph: Graph, when: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Per value the step it begins at, the first it may end at, and the region it is made in."""
    begin, end, home = ([0] * len(graph.values) for _ in range(3))
    for op in graph.ops:
        region = graph.regions[op.region]
        for v in op.outputs:
            home[v], begin[v], end[v] = op.region, when[op.id], when[op.id] + 1
            if op.name == "scan_stack":  # the whole stack exists from the first trip on
                begin[v] = when[region.begin]
            if op.name in ("scan_stack", "loop_next"):
                home[v] = region.parent
    return begin, end, home


def _read(graph: Graph, when: Sequence[int], home: Sequence[int], end: list[int]) -> None:
    """Values live to their last reader; results, and what the caller keeps, to the end."""
    for op in graph.ops:
        for v in op.inputs:
            end[v] = max(end[v], _last_read(graph, op, home[v], when))
    kept = {v.id for v in graph.values if v.kind == "constant"}
    kept.update(v for v in graph.inputs if v not in graph.donated)
    for v in (*graph.outputs, *kept):
        end[v] = len(graph.ops) + 1


def _carries(graph: Graph) -> Iterator[tuple[int, int, int]]:
    """Of what loops carry, as it enters, the region of the loop's body, and what enters."""
    maker = {v: op for op in graph.ops for v in op.outputs}
    for carry, after in graph.ties:
        enter, following = maker.get(carry), maker.get(after)
        if enter is None or following is None:
            continue
        if (enter.name, following.name) == ("loop_enter", "loop_next"):
            yield carry, following.region, enter.inputs[0]


def _convert_once(
    graph: Graph,
    casts: Sequence[WeightCast],
    begin: list[int],
    end: list[int],
    when: Sequence[int],
) -> None:
    """A converted weight lies there for all who read it; a stack around all loops that slice it."""
    for cast in casts:
        first = cast.values[0]
        end[first] = max(end[v] for v in cast.values)
        if cast.parts > 1:
            loops = [graph.regions[r] for r in outermost_loops(graph, cast.values)]
            begin[first] = min(when[r.begin] for r in loops)
            end[first] = max(when[r.end - 1] + 1 for r in loops)


def _computed_again(graph: Graph, stored: Sequence[bool], end: list[int]) -> None:
    """What is computed inside its readers, or only enters a region, keeps its operands alive."""
    for op in reversed(graph.ops):
        for v in op.outputs:
            if not stored[v] and op.name not in ("scan_slice", "scan_stack", "branch_join"):
                for u in op.inputs:
                    end[u] = max(end[u], end[v])


def _overwritable(graph: Graph, makers: Sequence[int], stored: Sequence[bool], op: Op) -> list[int]:
    """Values with memory that an operation reads, itself or element by element in its kernel."""
    out: list[int] = []
    seen = set[int]()
    todo = list(reversed(op.inputs))
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        if stored[v]:
            out.append(v)
            continue
        maker = graph.ops[makers[v]] if makers[v] >= 0 else op
        inside = maker is not op and maker.rule.fuses and maker.region == op.region
        alike = graph.values[v].shape == graph.values[op.outputs[0]].shape
        if inside and alike and maker.name not in MOVES and not maker.is_link:
            todo += reversed(maker.inputs)
    return out


def _work_in_place(
    graph: Graph,
    op: Op,
    read: Sequence[int],
    stored: Sequence[bool],
    lent: set[int],
    home: Sequence[int],
    end: list[int],
    step: int,
) -> None:
    """The result takes the place of an operand that nobody reads any more."""
    carries = op.name in ("loop_enter", "loop_next")
    if not carries and (op.is_link or not (op.rule.fuses or op.name in IN_PLACE)):
        return
    for result in op.outputs:
        nbytes = graph.values[result].type.nbytes
        for v in read if stored[result] else ():
            dies = stored[v] and end[v] == step + 1 and home[v] == op.region
            if dies and graph.values[v].type.nbytes == nbytes:
                end[v] = step
                if v in lent:
                    lent.add(result)
                break


def _last_read(graph: Graph, op: Op, home: int, when: Sequence[int]) -> int:
    """One past the time of a read: the end of the outermost loop between the read and the home."""
    last = when[op.id] + 1
    region = op.region
    while region and region != home:
        r = graph.regions[region]
        if r.kind in LOOPS:
            last = max(last, when[r.end - 1] + 1)
        region = r.parent
    return last
