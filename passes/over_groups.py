"""Of which arrays does each data-parallel group need a part only?  `parts_of_update(...) -> Parts`.

Groups hold the same parameters, and what comes after the last task is the same for all of them:
each may as well do a part of it (ZeRO stage 1, Rajbhandari et al., arXiv 1910.02054, section 5; the
distributed optimizer of Megatron). With G groups

  gradients are reduce-scattered: each group gets the sums of its part
  each updates its part of the optimizer's state, which rests in parts from step to step
  what tasks read of the new parameters is all-gathered

which sends as many bytes as an all-reduce of the gradients, and leaves a G-th of the state and of
the update to each. Which dim is in parts follows from the rules of the update's operations, by the
same propagation that cuts a batch over time (`passes.time_axis`): from an array of the state to all
that it is computed with, forwards and backwards. What is reduced over that dim, such as a squared
norm, each group has a summand of; it is added up where it is made. Where an operation needs the
whole of what would be in parts, another dim is tried, and then these arrays stay whole.

>>> from passes.ir.rule import Rule
>>> add = Rule.parse("i j, i j -> i j", {"i": 8, "j": 3})
>>> momentum = Work("add", add, (0, 1), (2,))  # state + gradient -> state
>>> shapes = {0: (8, 3), 1: (8, 3), 2: (8, 3)}
>>> found = parts_of_update([momentum], Ends({0: 2}, sums=frozenset({1})), shapes, groups=4)
>>> found.dims
{0: 0, 1: 0, 2: 0}
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from math import prod

from passes.ir.rule import Rule
from passes.time_axis import Split, spread

_REDUCED = ("add", "max", "min", "mul", "and", "or", "xor")  # what groups can put together
# Parts of their results are not what they make of parts of their operands.
_PLACED = frozenset({"custom_linear_solve", "dynamic_update_slice", "gather", "ragged_dot_general"})


@dataclass(frozen=True, slots=True)
class Work:
    """One operation of an update.

    ins: places, None for literals. rule: None where it has a body.
    """

    name: str
    rule: Rule | None
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ends:
    """Where an update begins and ends, in places.

    state: from arguments that may rest in parts to what takes their place. sums: gradients that are
    added up over groups. needed: what others need whole, besides results. early: arguments that are
    read ahead of the tasks too, such as weights that are converted for them. stacked: arguments and
    results whose first dim is that of the stages.
    """

    state: Mapping[int, int]
    sums: frozenset[int] = frozenset()
    needed: frozenset[int] = frozenset()
    results: frozenset[int] = frozenset()
    early: frozenset[int] = frozenset()
    stacked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Parts:
    """What is in parts, one for each group.

    dims: by place the dim, of what each group has a part of. taken: likewise of whole values, by
    (first result, operand) of who takes a part. rest: arguments in parts from step to step.
    gathered: places that are put together again. summed: of which groups have summands.
    """

    groups: int
    dims: Mapping[int, int] = field(default_factory=dict)
    taken: Mapping[tuple[int, int], int] = field(default_factory=dict)
    rest: tuple[int, ...] = ()
    gathered: tuple[int, ...] = ()
    summed: tuple[int, ...] = ()

    def local(self, place: int, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what a group has of a place."""
        d = self.dims.get(place)
        return tuple(n // self.groups if k == d else n for k, n in enumerate(shape))


def parts_of_update(
    works: Sequence[Work],
    ends: Ends,
    shapes: Mapping[int, Sequence[int]],
    groups: int,
    inner: int = 1,
    nbytes: Mapping[int, int] | None = None,
) -> Parts:
    """The parts of an update. inner: devices of a group, over which a part can be split further.

    nbytes: of each place, to exchange as little as can be; as many of each element by default.
    """
    sizes = nbytes or {p: prod(shape) for p, shape in shapes.items()}
    found = _Follow(works, ends, shapes, groups)
    late = frozenset(ends.state) - ends.early
    for a in sorted(ends.state):
        if a in found.views:
            continue
        for dim in _dims(shapes[a], groups * inner, a in ends.stacked):
            ways = [found.with_(a, dim, m) for m in (frozenset(ends.state), late)]
            better = [way for way in ways if way is not None]
            if better:
                found = min(better, key=lambda way: sum(sizes[p] for p in way.gathered()))
                break
    return found.parts()


def _dims(shape: Sequence[int], size: int, stacked: bool) -> list[int]:
    """Dims that so many can share, the longest first; not the first one of what is stacked."""
    fit = [d for d, n in enumerate(shape) if n % size == 0 and n and not (stacked and d == 0)]
    return sorted(fit, key=lambda d: (-shape[d], d))


class _NotInParts(Exception):
    """Something needs the whole of what would be in parts."""


class _Follow:
    """What has been found to be in parts; `with_` adds one array with all that belongs to it."""

    def __init__(
        self,
        works: Sequence[Work],
        ends: Ends,
        shapes: Mapping[int, Sequence[int]],
        groups: int,
    ) -> None:
        self.works, self.ends, self.shapes, self.groups = works, ends, shapes, groups
        self.maker = {p: (w, j) for w, work in enumerate(works) for j, p in enumerate(work.outs)}
        self.readers: dict[int, list[int]] = {}
        for w, work in enumerate(works):
            for p in dict.fromkeys(work.ins):
                if p is not None:
                    self.readers.setdefault(p, []).append(w)
        self.argument_of = {r: a for a, r in ends.state.items()}
        self.views: dict[int, Split] = {}
        self.taken: dict[tuple[int, int], int] = {}
        self.summed: set[int] = set()

    def with_(self, argument: int, dim: int, members: Collection[int]) -> _Follow | None:
        """The same with an argument in parts, and what is computed with it, where that can be.

        members: arguments that may rest in parts.
        """
        more = copy(self)
        more.views, more.taken, more.summed = dict(self.views), dict(self.taken), set(self.summed)
        size = self.shapes[argument][dim]
        try:
            more.spread_from({argument: Split(dim, size // self.groups)}, members)
        except _NotInParts:
            return None
        return more if argument in members else None

    def spread_from(self, seeds: Mapping[int, Split], members: Collection[int]) -> None:
        left: list[int] = []

        def see(p: int, view: Split) -> None:
            known = self.views.get(p)
            if known not in (None, view) or p in self.summed:
                raise _NotInParts
            if known is None:
                self.check_end(p, view)
                self.views[p] = view
                left.append(p)

        for p, view in seeds.items():
            see(p, view)
        while left:
            p = left.pop()
            view = self.views[p]
            self.pair(p, view, members, see)
            for w in self.readers.get(p, ()):
                self.apply(w, members, see)
            if p in self.maker:
                self.apply(self.maker[p][0], members, see)

    def check_end(self, p: int, view: Split) -> None:
        """What lies anywhere does so as one block for each group."""
        ends = self.ends
        known = p in ends.state or p in self.argument_of or p in ends.sums or p in ends.results
        if not known and p not in ends.needed:
            return
        if view.low * self.groups != self.shapes[p][view.dim]:
            raise _NotInParts
        if p in ends.stacked and view.dim == 0:
            raise _NotInParts

    def pair(
        self, p: int, view: Split, members: Collection[int], see: Callable[[int, Split], None]
    ) -> None:
        """An argument rests as what takes its place does."""
        if p in members and p in self.ends.state:
            see(self.ends.state[p], view)
        argument = self.argument_of.get(p)
        if argument is not None and argument in members:
            see(argument, view)

    def can_make(self, p: int, view: Split) -> bool:
        """Whether parts of p can be made of parts; else it is made whole, and parts are taken."""
        w, j = self.maker[p]
        work = self.works[w]
        if work.rule is None or work.name in _PLACED:
            return False
        return spread(work.rule, {len(work.ins) + j: view}, self.groups, _REDUCED) is not None

    def apply(self, w: int, members: Collection[int], see: Callable[[int, Split], None]) -> None:
        """What an operation takes and makes, where some of it is in parts."""
        work = self.works[w]
        both = (*work.ins, *work.outs)
        seen = {k: self.views[p] for k, p in enumerate(both) if p is not None and p in self.views}
        found = None
        if work.rule is not None and work.name not in _PLACED:
            found = spread(work.rule, seen, self.groups, _REDUCED)
        if found is None:
            raise _NotInParts
        for p, result in zip(work.outs, found[1], strict=True):
            if isinstance(result, Split):
                see(p, result)
            elif p in self.views:
                raise _NotInParts
            else:
                self.summed.add(p)
        for k, (q, part) in enumerate(zip(work.ins, found[0], strict=True)):
            if q is not None and part is not None:
                self.take(work, k, part, members, see)

    def take(
        self,
        work: Work,
        k: int,
        part: Split,
        members: Collection[int],
        see: Callable[[int, Split], None],
    ) -> None:
        """A part of an operand: the operand itself is in parts, or one is taken of it."""
        q = work.ins[k]
        assert q is not None
        if q in self.views or self.joins(q, part, members):
            see(q, part)
            self.taken.pop((work.outs[0], k), None)
        else:
            self.taken[work.outs[0], k] = part.dim

    def joins(self, p: int, view: Split, members: Collection[int]) -> bool:
        """Whether an operand is in parts itself, not whole with a part taken of it."""
        if p in self.ends.sums or p in members:
            return True
        return p in self.maker and p not in self.summed and self.can_make(p, view)

    def resting(self) -> list[int]:
        """Arguments that lie in parts from step to step."""
        return [a for a in sorted(self.ends.state) if a in self.views]

    def gathered(self) -> list[int]:
        """What is in parts, and needed whole in the end."""
        ends = self.ends
        whole = (ends.needed | ends.results) - {ends.state[a] for a in self.resting()}
        return [p for p in sorted(self.views) if p in whole]

    def parts(self) -> Parts:
        """All that was found."""
        return Parts(
            self.groups,
            {p: self.views[p].dim for p in sorted(self.views)},
            {key: dim for key, dim in sorted(self.taken.items()) if self.is_taken(key)},
            tuple(self.resting()),
            tuple(self.gathered()),
            tuple(sorted(self.summed)),
        )

    def is_taken(self, key: tuple[int, int]) -> bool:
        """Whether the operand is whole still."""
        work = self.works[self.maker[key[0]][0]]
        return work.ins[key[1]] not in self.views
