"""What does it take to change a value's sharding?  A sequence of collectives, with its price.

Per mesh axis: S(d) to B is an all-gather, P to B an all-reduce, P to S(d) a reduce-scatter, S(d) to
S(e) an all-to-all, B to S(d) a slice that costs nothing. What shrinks the local buffer goes first,
what grows it last (Rink et al., arXiv 2112.01075, give the optimal orders; this is theirs for the
moves above). B or S to P has no lowering and is not offered.

>>> steps((0, -1), (-1, -1), (4, 2))
(Step(kind='all_gather', axis=0, before=0.25, after=1.0),)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from cost_models.collectives import Collective, seconds, sent_bytes
from cost_models.topology import AxisLink
from passes.ir.sharding import BROADCAST, PARTIAL

Axes = tuple[int, ...]
StepKind = Literal["slice"] | Collective

# In which order the moves are made: shrinking first, growing last.
_ORDER: dict[str, int] = {
    "slice": 0,
    "reduce_scatter": 1,
    "permute": 2,
    "all_to_all": 3,
    "all_reduce": 4,
    "all_gather": 5,
}


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


@lru_cache(maxsize=1 << 18)
def steps(source: Axes, target: Axes, sizes: tuple[int, ...]) -> tuple[Step, ...] | None:
    """The moves from one sharding to another on a mesh of these sizes; None if there is no way."""
    moves: list[tuple[str, int]] = []
    for axis, (f, t) in enumerate(zip(source, target, strict=True)):
        if f == t or sizes[axis] == 1:
            continue
        if t == PARTIAL:
            return None
        moves.append((_move(f, t), axis))
        if _interleaved(source, target, axis):
            moves.append(("permute", axis))
    moves.sort(key=lambda m: (_ORDER[m[0]], m[1]))
    part = 1.0
    for f, size in zip(source, sizes, strict=True):
        part /= size if f >= 0 else 1
    out = []
    for kind, axis in moves:
        after = part
        if kind in ("slice", "reduce_scatter"):
            after = part / sizes[axis]
        elif kind == "all_gather":
            after = part * sizes[axis]
        out.append(Step(kind, axis, part, after))  # type: ignore[arg-type]
        part = after
    return tuple(out)


def _move(f: int, t: int) -> str:
    if f == PARTIAL:
        return "all_reduce" if t == BROADCAST else "reduce_scatter"
    if f == BROADCAST:
        return "slice"
    return "all_gather" if t == BROADCAST else "all_to_all"


def _interleaved(source: Axes, target: Axes, axis: int) -> bool:
    """Whether a later (inner) axis splits the same dim before and after: blocks change places."""
    for dim in {source[axis], target[axis]} - {BROADCAST, PARTIAL}:
        if any(source[b] == dim and target[b] == dim for b in range(axis + 1, len(source))):
            return True
    return False


def reshard_seconds(moves: Sequence[Step], nbytes: float, links: Sequence[AxisLink]) -> float:
    """Seconds for these moves of a value of so many bytes in all."""
    return sum(
        seconds(s.kind, s.larger * nbytes, links[s.axis]) for s in moves if s.kind != "slice"
    )


def reshard_sent(moves: Sequence[Step], nbytes: float, sizes: Sequence[int]) -> float:
    """Bytes one device sends for these moves of a value of so many bytes in all."""
    return sum(
        sent_bytes(s.kind, s.larger * nbytes, sizes[s.axis]) for s in moves if s.kind != "slice"
    )
