"""How is a scan over layers cut into stages?  Into scans over some of the layers each.

A model whose layers lie stacked under one `lax.scan` is one equation, and its gradient another. Cut
at the same layers, each becomes as many scans as there are pieces, one after the other: what the
forward scan of a piece stacks up is what the backward scan of that piece takes, and the weights of
a piece are a slice of the stacked ones. `in_pieces(traced, count)` gives the function that does so.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from autoshard.jax_compat import bind, open_jaxpr, scan_counts, traced_at
from autoshard.rewalk import Rewalk
from autoshard.trace import INLINED, Path, Traced
from passes.ir.graph import Graph, Op


def in_pieces(traced: Traced, count: int, weights: Sequence[float]) -> Callable[..., list[Any]]:
    """The function over flat arguments with its scans over layers in so many pieces.

    As it is where no scan is as long. weights: how much each operation takes.
    """
    length = layers_of(traced)
    jaxpr, consts = open_jaxpr(traced.jaxpr)
    at = bounds(length, count, *_beside(traced, length, weights))
    ops = {op.path: op for op in traced.graph.ops}

    def run(*flat: Any) -> list[Any]:
        return [_joined(x) for x in _Walker(length, at, ops).walk(jaxpr, consts, flat)]

    return run


def layers_of(traced: Traced) -> int:
    """The length of the scans that have most of the FLOPs; 0 where there is none."""
    graph, flops = traced.graph, dict[int, float]()
    for op in graph.ops:
        region = _outermost(graph, op.region)
        if region and graph.regions[region].kind == "scan":
            trips = int(graph.regions[region].trips)
            flops[trips] = flops.get(trips, 0.0) + op.rule.flops * graph.trips(op.region)
    return max(flops, key=lambda n: (flops[n], n), default=0)


def bounds(length: int, count: int, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """Where the pieces of so many layers begin and end: the slowest is as fast as can be.

    first, last: what the first and the last piece do besides, in layers, such as the head of a
    language model. A piece without layers is left out.

    >>> bounds(12, 4), bounds(10, 4), bounds(12, 4, 0, 2)
    ((0, 3, 6, 9, 12), (0, 2, 5, 7, 10), (0, 4, 8, 11, 12))
    """
    count = max(1, min(count, length))
    even = tuple(length * k // count for k in range(count + 1))
    beside = [0.0] * count
    beside[0] += first
    beside[-1] += last
    worst = max(b - a + x for a, b, x in zip(even, even[1:], beside, strict=False))
    most = [float(worst)] + [n + x for x in beside for n in range(length + 1)]
    for top in sorted(t for t in most if t <= worst):
        room = [max(0, int(top - x + 1e-9)) for x in beside]
        if sum(room) >= length and all(x <= top for x in beside):
            break
    if top >= worst:
        return even
    while sum(room) > length:
        fullest = max(range(count), key=lambda k: (room[k] > 0, room[k] + beside[k], k))
        room[fullest] -= 1
    ends = itertools.accumulate(room)
    return tuple(dict.fromkeys((0, *ends)))


def _beside(traced: Traced, length: int, weights: Sequence[float]) -> tuple[float, float]:
    """What comes before and after the one scan over layers takes, in layers."""
    graph = traced.graph
    outer = [_outermost(graph, op.region) for op in graph.ops]
    scans = list(dict.fromkeys(r for r in outer if r and graph.regions[r].trips == length))
    if not 1 <= len(scans) <= 2:  # a forward one, and its gradient
        return 0.0, 0.0
    inside = sum(w for w, r in zip(weights, outer, strict=True) if r in scans)
    if not inside:
        return 0.0, 0.0
    middle = range(graph.regions[scans[0]].end, graph.regions[scans[-1]].begin)
    if len(scans) == 1:
        middle = range(graph.regions[scans[0]].end, len(graph.ops))
    last = sum(weights[k] for k in middle if outer[k] not in scans)
    first = sum(weights[: graph.regions[scans[0]].begin])
    return first * length / inside, last * length / inside


def _outermost(graph: Graph, region: int) -> int:
    """The outermost region around, 0 for none."""
    while region and graph.regions[region].parent:
        region = graph.regions[region].parent
    return region


@dataclass(frozen=True)
class _Pieces:
    """An array in pieces along its first dim."""

    parts: tuple[Any, ...]


@dataclass(frozen=True)
class _Made:
    """How an array was made. caller: the equation around it that is at a line of the user's."""

    eqn: Any
    operands: tuple[Any, ...]
    caller: Any


def _joined(x: Any) -> Any:
    return jnp.concatenate(x.parts) if isinstance(x, _Pieces) else x


class _Walker(Rewalk):
    """Computes a jaxpr with its scans of that length in pieces."""

    def __init__(self, length: int, at: Sequence[int], ops: Mapping[Path, Op]) -> None:
        self.length, self.at, self.ops = length, at, ops
        self.cut: dict[int, tuple[Any, _Pieces]] = {}  # arrays live with their ids
        self.made: dict[int, tuple[Any, _Made]] = {}  # whole arrays that could be made in pieces

    def equation(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """Arrays, or pieces of arrays."""
        name = eqn.primitive.name
        if name == "scan" and eqn.params["length"] == self.length > 1 < len(self.at) - 1:
            return self.scan(eqn, operands)
        if name in INLINED:
            return super().equation(eqn, operands, path)
        op = self.ops.get(path)
        each = op is not None and _element_by_element(op)
        if any(isinstance(x, _Pieces) for x in operands):
            if each:
                return self.in_parts(_Made(eqn, tuple(operands), self.caller))
            if name in _REDUCED and 0 in eqn.params["axes"]:
                return [self.reduced(eqn, operands[0])]
        outs = super().equation(eqn, [_joined(x) for x in operands], path)
        if each and eqn.outvars[0].aval.shape[:1] == (self.length,):
            made = _Made(eqn, tuple(operands), self.caller)
            self.made.update((id(x), (x, made)) for x in outs)
        return outs

    def in_parts(self, made: _Made) -> list[Any]:
        """The results of an equation that works element by element, in pieces."""
        cut = [self.pieces(x) if _dims(x) else x for x in made.operands]
        parts = []
        with traced_at(made.eqn, made.caller):
            for k in range(len(self.at) - 1):
                own = [x.parts[k] if isinstance(x, _Pieces) else x for x in cut]
                parts.append(bind(made.eqn, own))
        return [_Pieces(tuple(outs)) for outs in zip(*parts, strict=True)]

    def reduced(self, eqn: Any, x: _Pieces) -> Any:
        """A reduction over the layers and more: of each piece, and then of these."""
        parts = [bind(eqn, [part])[0] for part in x.parts]
        return functools.reduce(_REDUCED[eqn.primitive.name], parts)

    def scan(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """One scan after the other, the last layers first where it is reversed."""
        inner, body_consts = open_jaxpr(eqn.params["jaxpr"])
        n_consts, n_carry = scan_counts(eqn.params)
        consts = [_joined(x) for x in operands[:n_consts]]
        carry = [_joined(x) for x in operands[n_consts : n_consts + n_carry]]
        xs = [self.pieces(x) for x in operands[n_consts + n_carry :]]

        def body(carry: Any, sliced: Any) -> Any:
            outs = Rewalk().walk(inner, body_consts, [*consts, *carry, *sliced])
            return outs[:n_carry], outs[n_carry:]

        order = range(len(self.at) - 1)
        made: dict[int, Any] = {}
        for k in reversed(order) if eqn.params["reverse"] else order:
            own, layers = [x.parts[k] for x in xs], self.at[k + 1] - self.at[k]
            carry, made[k] = lax.scan(body, carry, own, layers, eqn.params["reverse"])
        ys = [_Pieces(tuple(made[k][i] for k in order)) for i in range(len(made[0]))]
        return [*carry, *ys]

    def pieces(self, x: Any) -> _Pieces:
        """An array in pieces, if it is not yet."""
        if isinstance(x, _Pieces):
            return x
        if id(x) not in self.cut:
            made = self.made.get(id(x))
            if made is not None:
                self.cut[id(x)] = x, self.in_parts(made[1])[0]
            else:
                ends = itertools.pairwise(self.at)
                self.cut[id(x)] = x, _Pieces(tuple(lax.slice_in_dim(x, a, b) for a, b in ends))
        return self.cut[id(x)][1]


_REDUCED = {"reduce_sum": lax.add, "reduce_max": lax.max, "reduce_min": lax.min}


def _dims(x: Any) -> int:
    return 1 if isinstance(x, _Pieces) else int(jnp.ndim(x))


def _element_by_element(op: Op) -> bool:
    """Whether each element of the result is made of the same elements of the operands."""
    rule = op.rule
    if op.name in _REDUCED or len(rule.results) != 1 or not rule.results[0]:
        return False
    same = all(dims in ((), rule.results[0]) for dims in rule.operands)
    kinds = {rule.factors[i].kind for dim in rule.results[0] for i in dim}
    return same and kinds == {"parallel"} and any(rule.operands) and op.name not in _PLACED


# The same elements too, but with sizes or places among their parameters.
_PLACED = frozenset({"reshape", "broadcast_in_dim", "sharding_constraint", "reshard"})
