"""How is a scan over layers cut into stages?  Into scans over some of the layers each.

A model whose layers lie stacked under one `lax.scan` is one equation, and its gradient another. Cut
at the same layers, each becomes as many scans as there are pieces, one after the other: what the
forward scan of a piece stacks up is what the backward scan of that piece takes, and the weights of
a piece are a slice of the stacked ones. `in_pieces(traced, count)` gives the function that does so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from autoshard.jax_compat import open_jaxpr, scan_counts
from autoshard.rewalk import Rewalk
from autoshard.trace import INLINED, Path, Traced


def in_pieces(traced: Traced, count: int) -> Callable[..., list[Any]]:
    """The function over flat arguments with its scans over layers in so many pieces.

    As it is where no scan is as long.
    """
    length = layers_of(traced)
    jaxpr, consts = open_jaxpr(traced.jaxpr)
    at = bounds(length, count)

    def run(*flat: Any) -> list[Any]:
        return [_joined(x) for x in _Walker(length, at).walk(jaxpr, consts, flat)]

    return run


def layers_of(traced: Traced) -> int:
    """The length of the scans that have most of the FLOPs; 0 where there is none."""
    graph, flops = traced.graph, dict[int, float]()
    for op in graph.ops:
        region = op.region
        while region and graph.regions[region].parent:
            region = graph.regions[region].parent
        if region and graph.regions[region].kind == "scan":
            trips = int(graph.regions[region].trips)
            flops[trips] = flops.get(trips, 0.0) + op.rule.flops * graph.trips(op.region)
    return max(flops, key=lambda n: (flops[n], n), default=0)


def bounds(length: int, count: int) -> tuple[int, ...]:
    """Where the pieces of so many layers begin and end: as even as can be."""
    count = max(1, min(count, length))
    return tuple(length * k // count for k in range(count + 1))


@dataclass(frozen=True)
class _Pieces:
    """An array in pieces along its first dim."""

    parts: tuple[Any, ...]


def _joined(x: Any) -> Any:
    return jnp.concatenate(x.parts) if isinstance(x, _Pieces) else x


class _Walker(Rewalk):
    """Computes a jaxpr with its scans of that length in pieces."""

    def __init__(self, length: int, at: Sequence[int]) -> None:
        self.length, self.at = length, at
        self.cut: dict[int, tuple[Any, _Pieces]] = {}  # arrays live with their ids

    def equation(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """Arrays, or pieces of arrays."""
        name = eqn.primitive.name
        if name == "scan" and eqn.params["length"] == self.length > 1 < len(self.at) - 1:
            return self.scan(eqn, operands)
        if name not in INLINED:
            operands = [_joined(x) for x in operands]
        return super().equation(eqn, operands, path)

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
            ends = itertools.pairwise(self.at)
            self.cut[id(x)] = x, _Pieces(tuple(lax.slice_in_dim(x, a, b) for a, b in ends))
        return self.cut[id(x)][1]
