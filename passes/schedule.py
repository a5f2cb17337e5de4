"""In which order do the operations run?

In the order of the trace, but for what a step does last: an update of the state runs as soon as its
gradient is there and nobody reads the old state any more, so that no two gradients lie in memory
longer than they must. A trace updates all of the state at the end; XLA's schedulers, which take
what frees most memory first, do not (seen in compiled programs for TPU and GPU).

Only what stores nothing but results of the function, or scalars, runs early: it needs no memory of
its own. So does a reduction to far less, where the scheduler frees first. A scheduler that hides
latencies makes constants first, too, and the gradients of weights last: in a loop's body those of
stacked weights, outside of loops as `passes.late_gradients` says. One that updates late leaves the
updates to the end of all loops; one that frees first does as `passes.freeing` says. Other
operations in loops stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from passes.chains import PRODUCTS, reduces
from passes.compiler import PLAIN, Scheduler
from passes.freeing import freed_early
from passes.ir.graph import LOOPS, Graph, Op
from passes.late_gradients import run_last

# Bytes of a value that is no reason to wait: a norm, a step count, a statistic of one dim.
_SMALL = 1 << 16

# How many times less a reduction makes than it reads, so that it is no reason to wait either: a
# guess. Those that were seen to run early make thousands of times less.
_FAR_LESS = 16


def schedule(
    graph: Graph,
    stored: Sequence[bool],
    aliases: Sequence[tuple[int, int]] = (),
    filled: Set[int] = frozenset(),
    scheduler: Scheduler = PLAIN,
) -> tuple[int, ...]:
    """Ids of all operations in the order in which they run.

    stored: whether a value has memory. aliases: (donated input, output) pairs that share a buffer.
    filled: constants that are made as arrays.
    """
    ready = [
        not (op.region or op.effects or op.is_link)
        and (
            all(not stored[v] or v in filled or _needs_little(graph, v) for v in op.outputs)
            or (scheduler.frees_first and _sums_up(graph, op))
        )
        for op in graph.ops
    ]
    base = [float(o) for o in range(len(graph.ops))]
    late = run_last(graph, filled) if scheduler.hides_latencies else {}
    for o, behind in late.items():
        base[o] = behind
    after = _latest(graph, ready, aliases, base)
    place = [(base[a] if a >= 0 else -1.0, float(o)) for o, a in enumerate(after)]
    consumers = graph.consumers()
    for op in graph.ops if not scheduler.hides_latencies else ():
        if ready[op.id] and not filled.isdisjoint(op.outputs):
            readers = [place[_ends(graph, c)[0]] for v in op.outputs for c, _ in consumers[v]]
            first = min(readers, default=place[op.id])
            place[op.id] = first[0], first[1] - 0.5
    for o, stack in _gradients(graph).items() if scheduler.hides_latencies else ():
        place[o] = stack - 0.5, float(o)
    for together, start in freed_early(graph, stored) if scheduler.frees_first else ():
        a, b = place[start]
        for k, o in enumerate(together, 1):
            place[o] = a, b + k / (2 * len(together) + 2)
    if scheduler.updates_late:
        last = max((r.end - 1 for r in graph.regions if r.kind in LOOPS), default=0)
        for o in _updates(graph, stored, {result for _, result in aliases}):
            place[o] = max(place[o], (float(last), last + 0.5))
    return tuple(sorted(range(len(graph.ops)), key=place.__getitem__))


def _updates(graph: Graph, stored: Sequence[bool], state: Set[int]) -> list[int]:
    """What nothing but new state waits for, outside loops, and behind the kernels of products."""
    consumers, producers = graph.consumers(), graph.producers()
    last: set[int] = set()
    for op in reversed(graph.ops):
        if op.region or op.effects or op.is_link or op.name in PRODUCTS:
            continue
        read = [(v, [c for c, _ in consumers[v]]) for v in op.outputs]
        if all((cs or v in state) and last.issuperset(cs) for v, cs in read):
            last.add(op.id)
    for o in sorted(last):
        inside = (producers[v] for v in graph.ops[o].inputs if not stored[v])
        if any(m >= 0 and m not in last for m in inside):  # it is computed where its operand is
            last.remove(o)
    return sorted(last)


def _gradients(graph: Graph) -> dict[int, int]:
    """Per product that only gradients wait for, and what follows it: the first stack of them.

    A loop's gradient of what it takes its weights from is stacked to an array of the same shape.
    """
    consumers, producers = graph.consumers(), graph.producers()
    given = {graph.values[v].type.shape for v in graph.inputs}
    stacks = {
        op.id
        for op in graph.ops
        if op.name == "scan_stack" and graph.values[op.outputs[0]].type.shape in given
    }
    waiting: dict[int, int] = {}
    for op in reversed(graph.ops):
        if op.is_link or op.effects or not op.region:
            continue
        readers = [c for v in op.outputs for c, _ in consumers[v]]
        if readers and all(c in stacks or c in waiting for c in readers):
            waiting[op.id] = min(waiting.get(c, c) for c in readers)
    late: dict[int, int] = {}
    for o in sorted(waiting):
        op = graph.ops[o]
        if op.name in PRODUCTS or any(producers[v] in late for v in op.inputs):
            late[o] = waiting[o]
    return late


def _needs_little(graph: Graph, v: int) -> bool:
    """Whether a value needs no memory to speak of: its place is there, or it is small."""
    return v in graph.outputs or graph.values[v].type.nbytes <= _SMALL


def _sums_up(graph: Graph, op: Op) -> bool:
    """Whether it is a reduction to far less.

    XLA runs it in the kernel of another one, or of a product, that was traced before: an argmax
    with a softmax's maximum, a sum of squares with the product (for v5e, v5p and v6e; jax 0.10.2,
    libtpu 0.0.42.1).
    """
    made = sum(graph.values[v].type.nbytes for v in op.outputs)
    return reduces(op) and made * _FAR_LESS <= graph.values[op.inputs[0]].type.nbytes


def _latest(
    graph: Graph,
    ready: Sequence[bool],
    aliases: Sequence[tuple[int, int]],
    base: Sequence[float],
) -> list[int]:
    """Per operation the one after which it runs: itself, the last that it waits for, or -1.

    ready: those that run as soon as they can. base: where the others run.
    """
    given = {result: v for v, result in aliases}
    producers, consumers = graph.producers(), graph.consumers()
    after: list[int] = []
    for op in graph.ops:
        waits = [producers[v] for v in op.inputs]
        for old in (given[v] for v in op.outputs if v in given):
            waits += [reader for reader, _ in consumers[old] if reader < op.id]
        ends = (_ends(graph, after[o])[1] if after[o] >= 0 else -1 for o in waits if o >= 0)
        last = max(ends, key=lambda o: base[o] if o >= 0 else -1.0, default=-1)
        after.append(last if ready[op.id] else op.id)
    return after


def _ends(graph: Graph, o: int) -> tuple[int, int]:
    """The first and the last operation of the outermost region around one: itself at the top."""
    region = graph.regions[graph.ops[o].region]
    while region.parent:
        region = graph.regions[region.parent]
    return (region.begin, region.end - 1) if region.id else (o, o)
