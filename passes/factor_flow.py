"""Along which factors of an operation may axes move, which way, and when?

Only a factor that two or more of an operation's values have can carry an axis from one to another;
*whole* factors never do. `directions` says which way at each of the three kinds of operations that
`passes.propagate` goes through: not at all, forward (operands to results), backward, or both.

A dim of several factors gives its axes to the major factor first, to the next one only when that
is completely split:

>>> project((0, 1), (4, 8), (4, 2))
(((0,), (1,)), 2)
>>> project((0, 1), (8, 4), (4, 2))
(((0, 1), ()), 2)
>>> project((0,), (3, 8), (4,))  # 4 pieces of 3 x 8: a strided pattern, stuck at factor 0
(((), ()), 0)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from passes.ir.graph import Op
from passes.ir.rule import Rule

NOT, FORWARD, BACKWARD, BOTH = 0, 1, 2, 3

# As in Shardy's op_priority_propagation.cc: a slice at a moving place first passes on what its
# operands have, a broadcast first what its result has.
_FORWARD_FIRST = ("dynamic_slice", "dynamic_update_slice")
_BACKWARD_FIRST = ("broadcast_in_dim",)
_EARLY = ("reshape",)

Axes = tuple[int, ...]
# Which tensor (operands first), which of its dims, and which place in the dim: -1 if alone.
Holder = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Shared:
    """A factor that several of an operation's tensors have.

    sizes: of a tensor that has it in a dim of several factors, the sizes of all of them.
    """

    index: int
    size: int
    holders: tuple[Holder, ...]
    directions: tuple[int, int, int]
    sizes: dict[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Flow:
    """The shared factors of an operation, and how many of its tensors are operands.

    elementwise: whether every tensor with any factor has the same ones in the same dims.
    """

    operands: int
    shared: tuple[Shared, ...]
    elementwise: bool


def flow_of(op: Op, known: dict[tuple[int, str], Flow]) -> Flow:
    """The flow of an operation; `known` remembers one per rule and primitive."""
    key = (id(op.rule), op.name)
    if key not in known:
        known[key] = _flow(op)
    return known[key]


def _flow(op: Op) -> Flow:
    rule = op.rule
    holders: list[list[Holder]] = [[] for _ in rule.factors]
    sizes: list[dict[int, tuple[int, ...]]] = [{} for _ in rule.factors]
    for t, dims in enumerate((*rule.operands, *rule.results)):
        for d, dim in enumerate(dims):
            for at, f in enumerate(dim):
                holders[f].append((t, d, at if len(dim) > 1 else -1))
                if len(dim) > 1:
                    sizes[f][t] = tuple(rule.factors[g].size for g in dim)
    late = op.name in (*_FORWARD_FIRST, *_BACKWARD_FIRST)
    early = not late and (op.is_link or op.name in _EARLY or _passes_all(rule))
    shared = tuple(
        Shared(f, factor.size, tuple(holders[f]), _directions(op, factor.kind, early), sizes[f])
        for f, factor in enumerate(rule.factors)
        if factor.kind != "whole" and len(holders[f]) > 1
    )
    alike = {dims for dims in (*rule.operands, *rule.results) if any(dims)}
    return Flow(len(rule.operands), shared, early and len(alike) == 1 and not op.is_link)


def _directions(op: Op, kind: str, early: bool) -> tuple[int, int, int]:
    if early:
        return (BOTH, BOTH, BOTH)
    if kind != "parallel":
        return (NOT, NOT, BOTH)
    if op.name in _FORWARD_FIRST:
        return (FORWARD, BOTH, BOTH)
    return (NOT, BACKWARD if op.name in _BACKWARD_FIRST else BOTH, BOTH)


def _passes_all(rule: Rule) -> bool:
    """Whether all tensors, but those without any factor, have all factors, and all are parallel."""
    everything = set(range(len(rule.factors)))
    if any(f.kind != "parallel" for f in rule.factors):
        return False
    for dims in (*rule.operands, *rule.results):
        have = {f for dim in dims for f in dim}
        if have and have != everything:
            return False
    return True


def project(axes: Axes, sizes: Sequence[int], mesh: Sequence[int]) -> tuple[tuple[Axes, ...], int]:
    """The axes of a dim dealt out to its factors, and the first factor that can take no more.

    That is the factor whose rest an axis does not divide (the axis and all after it belong to no
    factor), or the number of factors when all axes found a place.
    """
    out: list[list[int]] = [[] for _ in sizes]
    at, rest = 0, sizes[0]
    for axis in axes:
        while rest == 1 and at + 1 < len(sizes):
            at += 1
            rest = sizes[at]
        if rest % mesh[axis]:
            return tuple(map(tuple, out)), at
        out[at].append(axis)
        rest //= mesh[axis]
    return tuple(map(tuple, out)), len(sizes)


def assemble(parts: Sequence[Axes], sizes: Sequence[int], mesh: Sequence[int]) -> Axes | None:
    """The axes of a dim whose factors are split so; None where no sharding says that.

    A factor may be split only when all before it are completely split, and the axes of a dim come
    in the order of the mesh.
    """
    out: Axes = ()
    complete = True
    for axes, size in zip(parts, sizes, strict=True):
        if axes and not complete:
            return None
        out += axes
        complete = complete and math.prod(mesh[a] for a in axes) == size
    return out if list(out) == sorted(out) else None
