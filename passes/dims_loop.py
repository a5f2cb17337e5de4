"""Which loop runs over the dims that hints split over time?  `dims_loop(graph, axis, seeds)`.

A hint names a dim of one input or of several. Where other inputs are split with it (labels, masks),
they are split from the beginning, if that lets no less run in steps; else each operation takes its
part of them when it needs it.

The parts of a dim of n elements in m steps are every m-th element, or stretches of n / m. With
every m-th, a dim that is split over devices, too, is cut without communication, so that these are
taken unless stretches let more run in steps: an image's rows, of which patches are made, say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from passes.batch import reach
from passes.block_counts import divisors
from passes.hints import path_of
from passes.ir.graph import Graph
from passes.ir.plan import TimeAxis
from passes.microbatch_loop import NoTimeLoop, coupled
from passes.time_ahead import time_loop
from passes.time_axis import Split
from passes.time_loop import Path, TimeLoop

Seeds = Mapping[int, int]  # by the place of an argument, the dim that is split

_MORE = 1e-3  # of the FLOPs: as much more in steps is worth another way of cutting
_NAMED = 3  # arguments that a sentence names


def seeds_of(graph: Graph, axis: TimeAxis, state: Sequence[int]) -> tuple[Seeds, ...]:
    """What may be split from the beginning: with what the split reaches, or what hints name only.

    state: inputs that results replace, which nobody means by a batch. Raises NoTimeLoop where the
    size of the axis does not divide.
    """
    hinted = dict(axis.dims)
    shapes = [graph.values[v].shape for v in graph.inputs]
    lengths = {shapes[p][d] for p, d in hinted.items()}
    _check_divides(graph, axis, lengths)
    others = [
        v for p, v in enumerate(graph.inputs) if p not in hinted and v not in state and shapes[p]
    ]
    known = {graph.inputs[p]: d for p, d in hinted.items()}
    _, reached = reach(graph, known, others, axis.size)
    places = {v: p for p, v in enumerate(graph.inputs)}
    more = {places[v]: d for v, d in reached.items() if graph.values[v].shape[d] in lengths}
    return ({**hinted, **more}, hinted) if more else (hinted,)


def dims_loop(
    graph: Graph,
    axis: TimeAxis,
    seeds: Sequence[Seeds],
    deciders: Mapping[Path, int] | None = None,
) -> TimeLoop:
    """The loop in which most runs in steps. seeds: ways to begin, the first one the best if equal.

    Raises NoTimeLoop where nothing runs in steps.
    """
    best: TimeLoop | None = None
    for start in _starts(graph, axis.size, seeds):
        found = time_loop(graph, start, axis.size, deciders)
        if best is None or found.share > best.share + _MORE:
            best = found
        if best.share > 1 - _MORE:
            break
    assert best is not None, "hints name a dim"
    if not best.share:
        over = dims_text(graph, axis.dims)
        why = "no operation that takes FLOPs has a part of it"
        if best.couplings:
            why = coupled(best, best.couplings[0], over)
        raise NoTimeLoop(
            f"nothing of {graph.name} can run in steps of time axis {axis.name!r} over {over}: "
            f"{why}"
        )
    return best


def _starts(graph: Graph, steps: int, seeds: Sequence[Seeds]) -> Iterator[dict[int, Split]]:
    for every in (True, False):
        for dims in seeds:
            start = {}
            for place, d in dims.items():
                v = graph.inputs[place]
                start[v] = Split(d, 1 if every else graph.values[v].shape[d] // steps)
            yield start


def _check_divides(graph: Graph, axis: TimeAxis, lengths: set[int]) -> None:
    if all(n and n % axis.size == 0 for n in lengths):
        return
    fit = divisors(math.gcd(*lengths)) or [1]
    below = [n for n in fit if n < axis.size][-1:]
    near = " and ".join(map(str, (*below, *[n for n in fit if n > axis.size][:1])))
    raise NoTimeLoop(
        f"{dims_text(graph, axis.dims)}, of {', '.join(map(str, sorted(lengths)))}, can not be cut "
        f"into {axis.size} steps of time axis {axis.name!r}; the nearest that divide it: {near}"
    )


def dims_text(graph: Graph, dims: Sequence[tuple[int, int]]) -> str:
    """These dims of the arguments of a graph, in words."""
    values = [graph.values[v] for v in graph.inputs]
    return over_dims([path_of(v.name) or str(v.type) for v in values], dims)


def over_dims(names: Sequence[str], dims: Sequence[tuple[int, int]]) -> str:
    """(place, dim) of arguments with such names, in words.

    >>> over_dims(["x", "y", "z"], [(0, 1), (2, 0), (1, 1)])
    'dim 0 of z and dim 1 of x, y'
    """
    by_dim: dict[int, list[str]] = {}
    for place, d in dims:
        by_dim.setdefault(d, []).append(names[place])
    return " and ".join(f"dim {d} of {_listed(own)}" for d, own in sorted(by_dim.items()))


def _listed(names: Sequence[str]) -> str:
    """The first of many names."""
    left = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {left} more" if left > 0 else "")
