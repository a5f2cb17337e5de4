"""Which ways of splitting one operation, or one value, are worth considering on a mesh?

A *strategy* of an operation puts each mesh axis on one of its factors, on a linear group (the axis
stays partial from operands to results), or nowhere; operand and result shardings follow from the
rule. A value's choices put each axis on one of its dims, replicate over it, or leave it partial.

>>> from passes.ir.rule import Rule
>>> mm = Rule.parse("i k, k j -> i j", {"i": 8, "k": 4, "j": 6}, reduce={"k": "add"})
>>> strategies(mm, (2,))
((-1,), (0,), (1,), (2,))
>>> [tensor_axes(mm.results[0], mm, s, (2,)) for s in strategies(mm, (2,))]
[(-1,), (0,), (-1,), (1,)]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

from passes.ir.rule import Dim, Rule
from passes.ir.sharding import BROADCAST, PARTIAL

NOWHERE = -1
Strategy = tuple[int, ...]
Axes = tuple[int, ...]


def linear(group: int) -> int:
    """The strategy entry that keeps an axis partial through one of the rule's linear groups."""
    return -2 - group


def group_of(entry: int) -> int:
    """The linear group of a strategy entry below NOWHERE."""
    return -2 - entry


def value_choices(
    shape: Sequence[int], sizes: Sequence[int], partial: bool = False
) -> tuple[Axes, ...]:
    """All shardings of a value that divide it; replicated first, later axes varying fastest.

    shape: a dim of length 1 is never split, nor is any of a value without elements. partial:
    whether axes may stay partial.
    """
    dims = [] if 0 in shape else list(enumerate(shape))
    options = [
        [BROADCAST, *(d for d, n in dims if n > 1 and n % size == 0 and size > 1)]
        + ([PARTIAL] if partial and size > 1 else [])
        for size in sizes
    ]
    return tuple(c for c in itertools.product(*options) if divides(c, shape, sizes))


def divides(choice: Axes, shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether the axes of a sharding divide the dims that they split."""
    split: dict[int, int] = {}
    for entry, size in zip(choice, sizes, strict=True):
        if entry >= 0:
            split[entry] = split.get(entry, 1) * size
    return all(shape[d] % n == 0 for d, n in split.items())


def strategies(
    rule: Rule, sizes: tuple[int, ...], groups: Sequence[int] = ()
) -> tuple[Strategy, ...]:
    """All strategies that an operation's rule allows; `groups` are the linear groups in play."""
    options = [
        [
            NOWHERE,
            *(
                f
                for f in range(len(rule.factors))
                if rule.splittable(f) and rule.factors[f].size % size == 0 and size > 1
            ),
            *(linear(g) for g in groups if size > 1),
        ]
        for size in sizes
    ]
    return tuple(s for s in itertools.product(*options) if is_valid(rule, s, sizes))


def is_valid(rule: Rule, strategy: Strategy, sizes: tuple[int, ...]) -> bool:
    """Whether every factor is divisible by its axes and every tensor's split can be written."""
    parts = factor_parts(strategy, sizes)
    if any(rule.factors[f].size % n for f, n in parts.items()):
        return False
    return all(
        _one_factor_each(dims) is not None or _places(dims, rule, strategy, parts) is not None
        for dims in (*rule.operands, *rule.results)
    )


def factor_parts(strategy: Strategy, sizes: tuple[int, ...]) -> dict[int, int]:
    """Into how many parts each factor falls."""
    parts: dict[int, int] = {}
    for f, size in zip(strategy, sizes, strict=True):
        if f >= 0:
            parts[f] = parts.get(f, 1) * size
    return parts


def tensor_axes(
    dims: tuple[Dim, ...], rule: Rule, strategy: Strategy, sizes: tuple[int, ...]
) -> Axes | None:
    """How a strategy splits one tensor (B where it lacks the factor); None if it can't be written.

    A minor factor of a dim may be split only when its major factors are split completely, by axes
    that come earlier in the mesh.
    """
    where = _one_factor_each(dims)
    if where is None:
        where = _places(dims, rule, strategy, factor_parts(strategy, sizes))
    if where is None:
        return None
    return tuple([where.get(f, BROADCAST) if f >= 0 else BROADCAST for f in strategy])


@lru_cache(maxsize=1 << 14)
def _one_factor_each(dims: tuple[Dim, ...]) -> dict[int, int] | None:
    """Per factor its dim; None where some dim has several factors."""
    where = {dim[0]: d for d, dim in enumerate(dims) if dim}
    return where if sum(map(len, dims)) == len(where) else None


def _places(
    dims: tuple[Dim, ...], rule: Rule, strategy: Strategy, parts: dict[int, int]
) -> dict[int, int] | None:
    """Per split factor the dim that it splits; None where the split can't be written."""
    where: dict[int, int] = {}
    for d, dim in enumerate(dims):
        last = -1
        complete = True
        for f in dim:
            axes = [a for a, g in enumerate(strategy) if g == f]
            if axes:
                if not complete or axes[0] < last:
                    return None
                where[f] = d
                last = axes[-1]
            complete = complete and parts.get(f, 1) == rule.factors[f].size
    return where


def operand_axes(rule: Rule, k: int, strategy: Strategy, sizes: tuple[int, ...]) -> Axes:
    """What a strategy wants of operand k: as its factors say, partial where its group is linear."""
    axes = tensor_axes(rule.operands[k], rule, strategy, sizes)
    assert axes is not None, "strategy was checked by is_valid"
    if min(strategy, default=NOWHERE) >= NOWHERE:
        return axes
    return tuple(
        PARTIAL if s < NOWHERE and k in rule.linear[group_of(s)] else a
        for a, s in zip(axes, strategy, strict=True)
    )


def result_axes(rule: Rule, k: int, strategy: Strategy, sizes: tuple[int, ...]) -> Axes:
    """What a strategy makes of result k; partial over split reduction factors and linear groups."""
    axes = tensor_axes(rule.results[k], rule, strategy, sizes)
    assert axes is not None, "strategy was checked by is_valid"
    if axes == strategy or min(axes, default=0) >= 0:  # nowhere split, or everywhere a dim
        return axes
    return tuple(
        PARTIAL if s < NOWHERE or (s >= 0 and a < 0 and rule.factors[s].kind == "reduction") else a
        for a, s in zip(axes, strategy, strict=True)
    )


def strategy_from(
    rule: Rule, dims: tuple[Dim, ...], axes: Axes, sizes: tuple[int, ...], group: int | None
) -> Strategy:
    """The strategy that follows from one tensor's sharding (the anchor), dropping what can't be.

    group: the linear group that carries partial axes, None where the operation has none.
    """
    left = [f.size for f in rule.factors]
    out = []
    for axis, entry in enumerate(axes):
        chosen = NOWHERE
        if entry == PARTIAL and group is not None:
            chosen = linear(group)
        elif entry >= 0:
            for f in dims[entry]:
                if left[f] == 1:
                    continue
                if rule.splittable(f) and left[f] % sizes[axis] == 0:
                    chosen = f
                    left[f] //= sizes[axis]
                break
        out.append(chosen)
    strategy = tuple(out)
    while not is_valid(rule, strategy, sizes):
        last = max(a for a, f in enumerate(strategy) if f >= 0)
        strategy = (*strategy[:last], NOWHERE, *strategy[last + 1 :])
    return strategy


def parts(strategy: Strategy, sizes: Sequence[int]) -> int:
    """Into how many parts the work falls."""
    return math.prod(n for f, n in zip(strategy, sizes, strict=True) if f >= 0)


class Layouts:
    """What strategies want of operands and make of results; like operations are asked once."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.known: dict[tuple[int, Strategy], tuple[list[Axes], list[Axes]]] = {}

    def of(self, rule: Rule, strategy: Strategy) -> tuple[list[Axes], list[Axes]]:
        """(sharding wanted of each operand, sharding made of each result)."""
        key = (id(rule), strategy)
        if key not in self.known:
            self.known[key] = (
                [operand_axes(rule, k, strategy, self.sizes) for k in range(len(rule.operands))],
                [result_axes(rule, k, strategy, self.sizes) for k in range(len(rule.results))],
            )
        return self.known[key]
