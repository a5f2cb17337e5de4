"""Where does propagation start?  What all hints together say about each value, on one mesh.

Hints on one value, or on values tied to one another (a loop's carry), are merged dim by dim: an
open entry yields, a soft one yields to a hard one. Axis names become indices of the mesh, in mesh
order, because the earlier axis of a mesh is the outer one of a dim.

>>> from passes.ir.parse import parse_graph
>>> graph = parse_graph('''
... graph f
...   arg  x  f32[8,16]
...   hint x  [model+data, ?]  train.py:3
... ''')
>>> anchors(graph, Mesh.parse("data=4,model=2"), graph.hints)[0].dims
((0, 1), None)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from passes.hints import HintError
from passes.ir.graph import Graph, Hint
from passes.ir.mesh import Mesh
from passes.ir.text import hint_text

Axes = tuple[int, ...]
ANNOTATE = "autoshard_annotate"


class HintConflict(ValueError):
    """Two hints that can not both be kept; names both and what each wants."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """What the hints say about one group of tied values.

    dims: per dim the mesh axes that split it, () for none, None for open. hints: per dim the hint
    that says so, None for an open dim.
    """

    dims: tuple[Axes | None, ...]
    hints: tuple[Hint | None, ...]

    @property
    def hard(self) -> tuple[bool, ...]:
        """Per dim whether a search must keep it."""
        return tuple(h is not None and h.hard for h in self.hints)


def roots(graph: Graph) -> list[int]:
    """Per value the lowest value that must have the same sharding, through ties."""
    out = list(range(len(graph.values)))

    def find(v: int) -> int:
        while out[v] != v:
            out[v] = out[out[v]]
            v = out[v]
        return v

    for a, b in graph.ties:
        low, high = sorted((find(a), find(b)))
        out[high] = low
    return [find(v) for v in range(len(out))]


def anchors(
    graph: Graph, mesh: Mesh, hints: Iterable[Hint], group: Sequence[int] | None = None
) -> dict[int, Anchor]:
    """Per root (see `roots`) that has hints, their sum.

    Raises HintError for a hint that does not fit the value or the mesh, and HintConflict for two
    hard ones that contradict each other.
    """
    group = roots(graph) if group is None else group
    said = [(hint, _on_mesh(graph, mesh, hint)) for hint in hints]
    _check_names(graph, [(hint, dims) for hint, dims in said if hint.hard])
    out: dict[int, Anchor] = {}
    for hint, dims in said:
        root = group[hint.value]
        new = Anchor(dims, tuple(None if d is None else hint for d in dims))
        out[root] = _merged(graph, out[root], new) if root in out else new
    return {root: a for root, a in out.items() if any(h is not None for h in a.hints)}


def _check_names(graph: Graph, said: Sequence[tuple[Hint, tuple[Axes | None, ...]]]) -> None:
    """HintConflict where annotations of one value contradict each other.

    `annotate` gives a value another name and no other sharding. A hint on an argument says how it
    is stored, and an annotation of it how it is used: these may differ, as in FSDP. So may what
    stands before and after a constraint of jax's own, which is an operation.
    """
    named = {op.outputs[0]: op.inputs[0] for op in graph.ops if op.name == ANNOTATE}
    out: dict[int, Anchor] = {}
    for hint, dims in said:
        v = hint.value
        if v not in named:
            continue
        while v in named:
            v = named[v]
        new = Anchor(dims, tuple(None if d is None else hint for d in dims))
        out[v] = _merged(graph, out[v], new) if v in out else new


def describe(graph: Graph, value: int) -> str:
    """A value as the user knows it: `params['w'], f32[8,16]`, `the result of dot (a.py:3), ...`."""
    producer = next((op for op in graph.ops if value in op.outputs), None)
    if producer is not None and producer.name == ANNOTATE:
        return describe(graph, producer.inputs[0])
    v = graph.values[value]
    if v.name and v.kind != "literal":
        return f"{v.name}, {v.type}"
    if producer is None:
        return f"a {v.kind}, {v.type}"
    where = f" ({producer.source})" if producer.source else ""
    return f"the result of {producer.name}{where}, {v.type}"


def _on_mesh(graph: Graph, mesh: Mesh, hint: Hint) -> tuple[Axes | None, ...]:
    """The hint's dims in axis indices, once it is known to fit."""
    shape = graph.values[hint.value].shape
    if len(hint.dims) != len(shape):
        raise HintError(
            f"{hint.origin}: {hint_text(hint)} has {len(hint.dims)} entries for the {len(shape)}"
            f" dims of {describe(graph, hint.value)}; give one per dim"
        )
    out: list[Axes | None] = []
    seen: set[str] = set()
    for d, names in enumerate(hint.dims):
        for name in names or ():
            _check_axis(graph, mesh, hint, name, seen)
            seen.add(name)
        axes = None if names is None else tuple(sorted(mesh.names.index(n) for n in names))
        if axes and shape[d] % math.prod(mesh.sizes[a] for a in axes):
            _refuse_indivisible(graph, mesh, hint, d, axes)
        out.append(axes)
    return tuple(out)


def _check_axis(graph: Graph, mesh: Mesh, hint: Hint, name: str, seen: set[str]) -> None:
    if name in mesh.names and name not in seen:
        return
    what = f"{hint.origin}: {hint_text(hint)} on {describe(graph, hint.value)}"
    if name in seen:
        raise HintError(f"{what}: axis {name!r} is given twice; it can split a value only once")
    near = difflib.get_close_matches(name, mesh.names, n=1)
    ask = f"; did you mean {near[0]!r}?" if near else ""
    raise HintError(f"{what}: there is no axis {name!r} in the mesh {mesh}{ask}")


def _refuse_indivisible(graph: Graph, mesh: Mesh, hint: Hint, dim: int, axes: Axes) -> None:
    length = graph.values[hint.value].shape[dim]
    by = " x ".join(f"{mesh.names[a]}={mesh.sizes[a]}" for a in axes)
    raise HintError(
        f"{hint.origin}: dim {dim} of {describe(graph, hint.value)} has length {length}, which"
        f" {by} does not divide; use a mesh whose axes divide {length}, pad the dim, or leave it"
        " open"
    )


def _merged(graph: Graph, old: Anchor, new: Anchor) -> Anchor:
    """Both together, dim by dim; then no axis may split two dims."""
    dims, hints = list(old.dims), list(old.hints)
    for d, (axes, hint) in enumerate(zip(new.dims, new.hints, strict=True)):
        kept = hints[d]
        if hint is None:
            continue
        if kept is None or dims[d] == axes:
            better = kept is None or _weight(hint) < _weight(kept)
            dims[d], hints[d] = axes, hint if better else kept
        elif _yields(graph, hint, kept):
            continue
        else:
            dims[d], hints[d] = axes, hint
    return _without_repeats(graph, Anchor(tuple(dims), tuple(hints)))


def _weight(hint: Hint) -> tuple[bool, int]:
    """What decides between two hints: hard before soft, then the lower priority number."""
    return (not hint.hard, hint.priority)


def _yields(graph: Graph, new: Hint, old: Hint) -> bool:
    """Whether the new hint gives way to the old one; HintConflict when both are hard."""
    if new.hard and old.hard:
        raise HintConflict(
            f"two hints contradict each other on {describe(graph, old.value)}:"
            f" {old.origin} wants {hint_text(old)}, {new.origin} wants {hint_text(new)}."
            " Remove one, leave a dim of one open, or mark one as soft"
        )
    return _weight(old) <= _weight(new)


def _without_repeats(graph: Graph, anchor: Anchor) -> Anchor:
    """The anchor with no axis on two dims: the weaker of the two hints loses its dim."""
    dims, hints = list(anchor.dims), list(anchor.hints)
    place: dict[int, int] = {}
    for d, axes in enumerate(anchor.dims):
        for axis in axes or ():
            other = place.setdefault(axis, d)
            first, second = hints[other], hints[d]
            if other == d or first is None or second is None:
                continue
            weaker = d if _yields(graph, second, first) else other
            place[axis] = other if weaker == d else d
            dims[weaker], hints[weaker] = None, None
    return replace(anchor, dims=tuple(dims), hints=tuple(hints))
