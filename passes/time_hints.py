"""Which dims do hints split over time, and what is left of hints for the devices?

A time axis is named as a mesh axis is: of `P(("micro", "data"), None)`, with the time axis `micro`,
each step of a loop has a part of dim 0, and that part is split over the devices of `data`. A dim
for which only time axes are named says nothing of devices: there the planner decides.

>>> hint = Hint(0, (("micro", "data"), ("seq",), ()), "hints['x']")
>>> over_devices([hint], ["micro", "seq"])[0].dims
(('data',), None, ())
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from passes.anchors import ANNOTATE, describe
from passes.hints import HintError
from passes.ir.graph import Graph, Hint
from passes.ir.mesh import Mesh
from passes.ir.plan import TimeAxis
from passes.microbatch_loop import NoTimeLoop

BLOCK = "block"  # the time axis that runs over huge values, along dims that are found

Dims = tuple[tuple[int, int], ...]


def dims_over_time(graph: Graph, hints: Sequence[Hint], names: Sequence[str]) -> dict[str, Dims]:
    """Per time axis the (place of an argument, dim) of which hints say that it splits them.

    names: of all time axes. Raises HintError for what no time axis can split.
    """
    places = {v: place for place, v in enumerate(graph.inputs)}
    named = {op.outputs[0]: op.inputs[0] for op in graph.ops if op.name == ANNOTATE}
    found: dict[str, dict[int, tuple[int, Hint]]] = {name: {} for name in names}
    for hint in hints:
        for dim, axis in _named(graph, hint, names):
            v = hint.value
            while v in named:
                v = named[v]
            if v in places:
                _note(graph, found[axis], axis, places[v], dim, hint)
            elif hint.hard:  # a soft one may be of a gradient: whatever the program makes of it
                raise HintError(
                    f"{hint.origin}: time axis {axis!r} is given for {describe(graph, v)}, which "
                    "the function makes; give it for an argument, from where the rest follows"
                )
    return {name: tuple((p, d) for p, (d, _) in own.items()) for name, own in found.items()}


def _named(graph: Graph, hint: Hint, names: Collection[str]) -> list[tuple[int, str]]:
    """Dims and the time axes that split them."""
    out = []
    for dim, axes in enumerate(hint.dims):
        over = [a for a in axes or () if a in names]
        where = f"{hint.origin} on {describe(graph, hint.value)}"
        if BLOCK in over:
            raise HintError(
                f"{where}: the time axis {BLOCK!r} runs over huge values, along dims that are "
                "found; give the time axis of an argument's dim another name"
            )
        if len(over) > 1:
            raise HintError(
                f"{where}: dim {dim} is split over the time axes {' and '.join(over)}; give it "
                "one, of as many steps as both have together"
            )
        out += [(dim, a) for a in over]
    return out


def _note(
    graph: Graph,
    found: dict[int, tuple[int, Hint]],
    axis: str,
    place: int,
    dim: int,
    hint: Hint,
) -> None:
    other, first = found.setdefault(place, (dim, hint))
    if other != dim:
        name = graph.values[graph.inputs[place]].name
        raise HintError(
            f"time axis {axis!r} splits dim {other} of {name} by {first.origin}, and dim {dim} by "
            f"{hint.origin}; it can split one dim of a value"
        )


def check_at_once(
    graph: Graph, hints: Sequence[Hint], time: Sequence[TimeAxis], mesh: Mesh
) -> None:
    """NoTimeLoop where a dim is too short to be split over all axes, of both kinds, it is given."""
    steps, devices = {axis.name: axis.size for axis in time}, mesh.as_dict()
    for hint in (h for h in hints if h.hard):
        for dim, axes in enumerate(hint.dims):
            sizes = {a: steps.get(a) or devices.get(a, 1) for a in axes or ()}
            parts, length = math.prod(sizes.values()), graph.values[hint.value].shape[dim]
            if length % parts and steps.keys() & sizes.keys():
                raise NoTimeLoop(
                    f"{hint.origin}: dim {dim} of {describe(graph, hint.value)}, can not be split "
                    f"over {' and '.join(f'{a}={n}' for a, n in sizes.items())} at once: that is "
                    f"{parts} parts"
                )


def over_devices(hints: Sequence[Hint], names: Collection[str]) -> tuple[Hint, ...]:
    """What hints say of devices. names: of time axes."""

    def kept(axes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if not axes:
            return axes
        return tuple(a for a in axes if a not in names) or None

    return tuple(replace(h, dims=tuple(map(kept, h.dims))) if _any(h, names) else h for h in hints)


def _any(hint: Hint, names: Collection[str]) -> bool:
    return any(a in names for axes in hint.dims for a in axes or ())
