"""What does it take to change a value's sharding?  A sequence of collectives, with its price.

Per mesh axis: S(d) to B is an all-gather, P to B an all-reduce, P to S(d) a reduce-scatter, S(d) to
S(e) an all-to-all, B to S(d) a slice that costs nothing. Of several axes that split one dim the
later ones are the inner ones; an axis that comes or goes outside of another one makes blocks change
places, which is a permute more. So the order of the moves matters: sums first, then the order in
which a device sends least (Rink et al., arXiv 2112.01075). Where no dim changes its number of
parts, one permute of all blocks may send less than any order. B or S to P has no lowering and is
not offered.

>>> steps((0, -1), (-1, -1), (4, 2))
(Step(kind='all_gather', axis=0, before=0.25, after=1.0),)
>>> [(s.kind, s.axis) for s in steps((0, 0), (-1, -1), (4, 2))]  # the inner axis first
[('all_gather', 1), ('all_gather', 0)]
>>> path((0, -1), (1, 0), (4, 2))  # what XLA is asked for in turn, so that it makes these moves
((1, -1), (1, 0))
>>> path((0, 1), (-1, -1), (4, 2)), path((0, 0), (-1, -1), (4, 2))
(((-1, 1), (-1, -1)), ((-1, -1),))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from cost_models.collectives import Collective, seconds, sent_bytes
from cost_models.topology import AxisLink
from passes.ir.sharding import BROADCAST, PARTIAL

Axes = tuple[int, ...]
StepKind = Literal["slice"] | Collective

# Among orders that send as much: shrinking first, growing last.
_ORDER: dict[str, int] = {
    "reduce_scatter": 0,
    "all_reduce": 1,
    "slice": 2,
    "permute": 3,
    "all_to_all": 4,
    "all_gather": 5,
}
# With more axes than this, only the order above is considered.
_MOST_ORDERED = 5


@dataclass(frozen=True, slots=True)
class Step:
    """One move along one mesh axis. before, after: local bytes as parts of the whole value."""

    kind: StepKind
    axis: int
    before: float
    after: float

    @property
    def larger(self) -> float:
        """The larger of the two local buffers, as a part of the whole value."""
        return max(self.before, self.after)


def steps(
    source: Axes, target: Axes, sizes: tuple[int, ...], whole_sums: bool = False
) -> tuple[Step, ...] | None:
    """The moves from one sharding to another on a mesh of these sizes; None if there is no way.

    whole_sums: a sum is made whole on every device, also where each keeps but a part of it.
    """
    found = _route(*_numbered(source, target)[0], sizes)
    if found is None:
        return None
    return _summed_whole(found[0]) if whole_sums and PARTIAL in source else found[0]


@lru_cache(maxsize=1 << 12)
def _summed_whole(moves: tuple[Step, ...]) -> tuple[Step, ...]:
    """The moves with an all-reduce and a slice for each reduce-scatter."""
    out: list[Step] = []
    for s in moves:
        if s.kind == "reduce_scatter":
            out.append(Step("all_reduce", s.axis, s.before, s.before))
            out.append(Step("slice", s.axis, s.before, s.after))
        else:
            out.append(s)
    return tuple(out)


def path(source: Axes, target: Axes, sizes: tuple[int, ...]) -> tuple[Axes, ...]:
    """The shardings to ask XLA for, one after the other, the target last; () without a change.

    Asked for all at once, its partitioner gathers the whole value where it sees no better way.
    """
    renamed, number = _numbered(source, target)
    found = _route(*renamed, sizes)
    assert found is not None, f"no way from {source} to {target}"
    back = {n: d for d, n in number.items()}
    return tuple(tuple(back[e] for e in axes) for axes in found[1])


def _numbered(source: Axes, target: Axes) -> tuple[tuple[Axes, Axes], dict[int, int]]:
    """Dims in order of their first mention: which dims they are does not matter for the moves."""
    number = {BROADCAST: BROADCAST, PARTIAL: PARTIAL}
    renamed = tuple([number.setdefault(e, len(number) - 2) for e in (*source, *target)])
    return (renamed[: len(source)], renamed[len(source) :]), number


@lru_cache(maxsize=1 << 18)
def _route(
    source: Axes, target: Axes, sizes: tuple[int, ...]
) -> tuple[tuple[Step, ...], tuple[Axes, ...]] | None:
    moving = [a for a, (f, t) in enumerate(zip(source, target, strict=True)) if f != t]
    moving = [a for a in moving if sizes[a] > 1]
    if any(target[a] == PARTIAL for a in moving):
        return None
    if not moving:
        return (), ()
    kinds = {a: _move(source[a], target[a]) for a in moving}
    moving.sort(key=lambda a: (_ORDER[kinds[a]], a))
    sums = [a for a in moving if source[a] == PARTIAL]
    rest = moving[len(sums) :]
    orders = itertools.permutations(rest) if len(rest) <= _MOST_ORDERED else [tuple(rest)]
    routes = [_in_order((*sums, *order), source, target, sizes) for order in orders]
    if len(rest) > 1 and not sums and _same_parts(source, target, sizes):
        part = 1 / _parts(source, sizes)
        routes.append(((Step("permute", min(rest), part, part),), (target,)))
    return min(routes, key=lambda r: reshard_sent(r[0], 1.0, sizes))


def _in_order(
    order: Sequence[int], source: Axes, target: Axes, sizes: tuple[int, ...]
) -> tuple[tuple[Step, ...], tuple[Axes, ...]]:
    """One move after the other, and the shardings between those that XLA does not make as one."""
    state, part = list(source), 1 / _parts(source, sizes)
    made: list[Step] = []
    asked: list[Axes] = []
    for axis in order:
        kind = _move(state[axis], target[axis])
        turned = _interleaved(state, target[axis], axis)
        last = made[-1] if made else None
        if last and (turned or not _as_one(last.kind, kind, source[last.axis] == state[axis])):
            asked.append(tuple(state))
        if turned and kind != "slice":
            made.append(Step("permute", axis, part, part))
        after = part
        if kind in ("slice", "reduce_scatter"):
            after = part / sizes[axis]
        elif kind == "all_gather":
            after = part * sizes[axis]
        made.append(Step(kind, axis, part, after))
        if turned and kind == "slice":
            made.append(Step("permute", axis, after, after))
        state[axis], part = target[axis], after
    return tuple(made), (*asked, tuple(target))


def _as_one(last: StepKind, kind: StepKind, same_dim: bool) -> bool:
    """Whether XLA is asked for two moves at once: slices, and gathers of one dim.

    Asked for gathers of two dims it makes one, and lays what arrives anew to put the blocks of each
    dim beside each other: two passes over all of it, a third of an MLP's compute for v6e and a
    fifth for v5e (jax 0.10.2, libtpu 0.0.42.1).
    """
    return kind == last == "slice" or (kind == last == "all_gather" and same_dim)


def _move(f: int, t: int) -> StepKind:
    if f == PARTIAL:
        return "all_reduce" if t == BROADCAST else "reduce_scatter"
    if f == BROADCAST:
        return "slice"
    return "all_gather" if t == BROADCAST else "all_to_all"


def _interleaved(state: Sequence[int], target: int, axis: int) -> bool:
    """Whether a later (inner) axis splits the dim that this one leaves, or the one it comes to."""
    dims = {state[axis], target} - {BROADCAST, PARTIAL}
    return any(state[b] in dims for b in range(axis + 1, len(state)))


def _parts(axes: Sequence[int], sizes: Sequence[int]) -> int:
    return math.prod(n for e, n in zip(axes, sizes, strict=True) if e >= 0)


def _same_parts(source: Axes, target: Axes, sizes: tuple[int, ...]) -> bool:
    """Whether every dim has as many parts before as after."""

    def parts(axes: Axes, dim: int) -> int:
        return math.prod(n for e, n in zip(axes, sizes, strict=True) if e == dim)

    return all(parts(source, d) == parts(target, d) for d in {*source, *target})


def reshard_seconds(moves: Sequence[Step], nbytes: float, links: Sequence[AxisLink]) -> float:
    """Seconds for these moves of a value of so many bytes in all."""
    return sum(
        seconds(s.kind, s.larger * nbytes, links[s.axis]) for s in moves if s.kind != "slice"
    )


class Waited(NamedTuple):
    """What a step loses by a gather: a share of its time, and the seconds by which it slows down
    what runs beside it; never more than all its time.
    """

    share: float
    slows: float

    def of(self, seconds: float) -> float:
        """Seconds lost of a gather's.

        >>> [Waited(0.25, 1.0).of(s) for s in (1.0, 8.0)]
        [1.0, 3.0]
        """
        return min(seconds, self.share * seconds + self.slows)


WHOLE = Waited(1.0, 0.0)


def waited_seconds(
    moves: Sequence[Step], nbytes: float, links: Sequence[AxisLink], waited: Waited
) -> float:
    """Seconds that a step loses by these moves. waited: of each gather among them."""
    total = 0.0
    for s in moves:
        if s.kind != "slice":
            whole = seconds(s.kind, s.larger * nbytes, links[s.axis])
            total += waited.of(whole) if s.kind == "all_gather" else whole
    return total


def reshard_sent(moves: Sequence[Step], nbytes: float, sizes: Sequence[int]) -> float:
    """Bytes one device sends for these moves of a value of so many bytes in all."""
    return sum(
        sent_bytes(s.kind, s.larger * nbytes, sizes[s.axis]) for s in moves if s.kind != "slice"
    )
