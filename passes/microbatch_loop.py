"""Can a function's batch be cut into so many microbatches?  The loop that does so, or why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from passes.hints import path_of
from passes.ir.graph import Graph, Op
from passes.time_ahead import time_loop
from passes.time_axis import Split
from passes.time_loop import Coupling, Path, TimeLoop


class NoTimeLoop(ValueError):
    """A program that can not run in so many steps; the sentence says why, and what is nearest."""


def microbatch_loop(
    graph: Graph, batch: Sequence[int], steps: int, deciders: Mapping[Path, int] | None = None
) -> TimeLoop:
    """The loop in which each step takes a part of the batch.

    batch: inputs whose leading dim it is (`passes.batch`). Raises NoTimeLoop where there is none,
    where it does not divide, and where nothing runs in steps.
    """
    if not batch:
        raise NoTimeLoop(
            f"{graph.name} has no batch dimension: no leading dim of an input splits its operations"
        )
    sizes = {graph.values[v].shape[0] for v in batch}
    if any(n % steps for n in sizes):
        fit = [k for k in range(1, min(sizes) + 1) if all(n % k == 0 for n in sizes)]
        near = min(fit, key=lambda k: (abs(k - steps), k))
        names = ", ".join(_called(graph, v) for v in batch[:3])
        raise NoTimeLoop(
            f"a batch of {', '.join(map(str, sorted(sizes)))} ({names}) can not be cut into "
            f"{steps} microbatches; the nearest number that divides it is {near}"
            f"{found_batch(graph, batch)}"
        )
    found = time_loop(graph, {v: Split(0, 1) for v in batch}, steps, deciders)
    if not found.share:
        why = f": {coupled(found, found.couplings[0])}" if found.couplings else ""
        raise NoTimeLoop(
            f"nothing of {graph.name} can run in microbatches{why}{found_batch(graph, batch)}"
        )
    return found


def found_batch(graph: Graph, batch: Sequence[int]) -> str:
    """Which dims were taken for the batch, and how hints name others; to end a sentence."""
    if not batch:
        return ""
    names = ", ".join(_called(graph, v) for v in batch[:3]) + ", ..." * (len(batch) > 3)
    return (
        f" (dim 0 of {names} was found to be the batch; where it is another one, hints say so: "
        f"hints={{{_called(graph, batch[0])!r}: P(None, 'micro')}})"
    )


def _called(graph: Graph, v: int) -> str:
    return path_of(graph.values[v].name) or str(graph.values[v].type)


def coupled(loop: TimeLoop, coupling: Coupling, over: str = "the batch") -> str:
    """A coupling in words. over: what the loop runs over."""
    graph = loop.graph
    op, value = graph.ops[coupling.op], graph.values[coupling.value]
    maker = graph.producers()[value.id]
    what = value.name or str(value.type)
    if maker >= 0:
        what += f" of {graph.ops[maker].name} at {graph.ops[maker].source or 'an unknown line'}"
    where = op.source or "an unknown line"
    return (
        f"{_named(graph, op)} at {where} needs, for each part of {over}, what "
        f"{_whole(over)} makes: {what}"
    )


def _named(graph: Graph, op: Op) -> str:
    """An operation, or the loop or branch to which a link belongs."""
    if not op.is_link:
        return op.name
    around = next(r for r in reversed(graph.regions) if r.begin <= op.id < r.end)
    return {"while_cond": "while", "while_body": "while"}.get(around.kind, around.kind)


def _whole(over: str) -> str:
    return f"the whole {over.removeprefix('the ')}" if over.startswith("the ") else f"all of {over}"
