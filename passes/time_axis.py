"""What does one step of a time axis see of each value?  The rule of one operation, over time.

A mesh axis may also run over the successive steps of a loop. The same factors and rules that split
a value over devices split it over time; only there is nothing to communicate with:

  Split     a part of the value for each step
  Partial   summands: the value is their sum over all steps
  whole     the same in every step, known before the loop
  inside    the same in every step, but made in the loop
  late      known after the loop only

A dim of length `high * steps * low` is split so that step t has the elements (h, t, l) of it, for
all h and l. Whatever factors a rule makes of the dim, t lies within one of them, or the operation
can not be split. With low = 1, of a batch, step t has every steps-th row: then a dim that is split
over devices, too, needs no communication when it is cut into steps.

>>> rule = Rule.parse("b k, k n -> b n", {"b": 8, "k": 4, "n": 2}, reduce={"k": "add"})
>>> over_time(rule, [Split(0, 1), WHOLE], 4).results
(Split(dim=0, low=1),)
>>> over_time(rule, [Split(1, 1), WHOLE], 4)
OverTime(results=(PARTIAL,), cut=((1, Split(dim=0, low=1)),))
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from passes.ir.rule import Dim, Rule


@dataclass(frozen=True, slots=True)
class Split:
    """A dim of which each step has a part; low: elements next to one another in a part."""

    dim: int
    low: int


class Seen(enum.Enum):
    """What a step sees of a value that is not split."""

    WHOLE = "whole"
    INSIDE = "inside"
    PARTIAL = "partial"
    LATE = "late"

    def __repr__(self) -> str:
        return self.name


WHOLE, INSIDE, PARTIAL, LATE = Seen.WHOLE, Seen.INSIDE, Seen.PARTIAL, Seen.LATE
View = Split | Seen


@dataclass(frozen=True, slots=True)
class OverTime:
    """An operation inside the loop. cut: operands, whole so far, of which it takes a part."""

    results: tuple[View, ...]
    cut: tuple[tuple[int, Split], ...]


def over_time(
    rule: Rule, views: Sequence[View], steps: int, zeros: Collection[int] = ()
) -> OverTime | None:
    """What an operation makes of operands seen so in each step; None where it can not.

    zeros: operands that are zero, and so summands of what is zero, too.
    """
    split = [k for k, v in enumerate(views) if isinstance(v, Split)]
    partial = {k for k, v in enumerate(views) if v is PARTIAL}
    if LATE in views or (split and partial):
        return None
    if split:
        return _split(rule, views, split, steps)
    if partial:
        some = any(partial <= set(g) <= partial | set(zeros) for g in rule.linear)
        return OverTime((PARTIAL,) * len(rule.results), ()) if some else None
    same = INSIDE if INSIDE in views else WHOLE
    return OverTime((same,) * len(rule.results), ())


def cut_to_make(rule: Rule, result: int, wanted: Split, steps: int) -> OverTime | None:
    """The operation, on whole operands, so that each step makes this part of a result only."""
    at = _within(rule, rule.results[result], wanted, steps)
    if at is None:
        return None
    found = _along(rule, *at, [WHOLE] * len(rule.operands), steps)
    return found if found and found.results[result] == wanted else None


def spread(
    rule: Rule, seen: Mapping[int, Split], steps: int, reduced: Collection[str] = ("add",)
) -> tuple[tuple[Split | None, ...], tuple[View, ...]] | None:
    """What an operation takes of each operand, and makes of each result, to agree with these parts.

    seen: by place, operands first, then results. reduced: by which operations parts of what is
    reduced can be put together. None of an operand: all of it. None where there is no one factor to
    split.

    >>> rule = Rule.parse("b k, k n -> b n", {"b": 8, "k": 4, "n": 2}, reduce={"k": "add"})
    >>> spread(rule, {2: Split(0, 1)}, 4)
    ((Split(dim=0, low=1), None), (Split(dim=0, low=1),))
    """
    tensors = (*rule.operands, *rule.results)
    places = {_within(rule, tensors[k], view, steps) for k, view in seen.items()}
    at = places.pop() if len(places) == 1 else None
    if at is None:
        return None
    found = _along(rule, *at, [WHOLE] * len(rule.operands), steps, reduced)
    if found is None:
        return None
    cut = dict(found.cut)
    taken = tuple(cut.get(k) for k in range(len(rule.operands)))
    both = (*taken, *found.results)
    return (taken, found.results) if all(both[k] == v for k, v in seen.items()) else None


def _split(rule: Rule, views: Sequence[View], split: Sequence[int], steps: int) -> OverTime | None:
    places = set()
    for k in split:
        view = views[k]
        assert isinstance(view, Split)
        places.add(_within(rule, rule.operands[k], view, steps))
    if len(places) != 1:
        return None
    (at,) = places
    return _along(rule, *at, views, steps) if at else None


def _within(rule: Rule, dims: Sequence[Dim], view: Split, steps: int) -> tuple[int, int] | None:
    """The factor that the steps lie in, and how many of its elements lie together."""
    if view.dim >= len(dims):
        return None
    low = view.low
    for f in reversed(dims[view.dim]):
        size = rule.factors[f].size
        if low < size:
            return (f, low) if size % (steps * low) == 0 else None
        if low % size:
            return None
        low //= size
    return None


def _along(
    rule: Rule,
    factor: int,
    low: int,
    views: Sequence[View],
    steps: int,
    reduced: Collection[str] = ("add",),
) -> OverTime | None:
    """Every operand and result split along one factor, or added up where a result lacks it."""
    f = rule.factors[factor]
    kind = f.kind
    if (
        kind not in ("parallel", "reduction")
        or f.halo
        or (kind == "reduction" and f.op not in reduced)
    ):
        return None
    cut: list[tuple[int, Split]] = []
    for k, dims in enumerate(rule.operands):
        part = _part(rule, dims, factor, low)
        if isinstance(views[k], Split) and views[k] != part:
            return None
        if part is not None and views[k] != part:
            cut.append((k, part))
    results: list[View] = []
    for dims in rule.results:
        part = _part(rule, dims, factor, low)
        if (part is None) == (kind == "parallel"):
            return None
        results.append(part or PARTIAL)
    return OverTime(tuple(results), tuple(cut))


def _part(rule: Rule, dims: Sequence[Dim], factor: int, low: int) -> Split | None:
    for d, dim in enumerate(dims):
        if factor in dim:
            after = dim[dim.index(factor) + 1 :]
            return Split(d, low * math.prod(rule.factors[f].size for f in after))
    return None
