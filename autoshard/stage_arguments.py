"""Which arguments lie on a stage as they are, and which may its update overwrite?

A weight that tasks take as it lies is not copied for them: they get the array that the caller has
given, or that was sent here. An argument that the caller has donated gives its memory to the result
that takes its place (a new weight, a new moment) in the last update that reads it. So a stage never
holds its weights or its optimizer's state twice, as its plan foresees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import jax

from autoshard.after_stages import Group
from autoshard.stacked import Stacked
from autoshard.stage_layout import StageLayout
from autoshard.time_loop import Program


def as_they_lie(
    program: Program, outside: Sequence[int], layout: StageLayout, apart: Stacked
) -> tuple[int, ...]:
    """Of what tasks take from outside: arguments and slices of them that need no copy.

    The others are computed before the loop, or tasks take them split otherwise than they lie.
    """
    given = {*program.inputs, *apart.cuts}
    return tuple(
        p
        for p in outside
        if p in given and _axes(layout.lying.get(p)) == _axes(layout.whole.get(p))
    )


def overwritten(
    program: Program,
    groups: Sequence[Group],
    donated: Collection[int],
    apart: Stacked,
    layouts: Sequence[StageLayout],
) -> list[tuple[int, ...]]:
    """By group of updates: the arguments whose memory its results take over.

    Those that no later group reads, that are no result themselves, and that are like a result.
    """
    results = {q for p in program.outputs_placed() for q in (p, *apart.joins.get(p, ()))}
    reads = [(k, p) for k, group in enumerate(groups) for p in group.inputs]
    out = []
    for k, group in enumerate(groups):
        layout = layouts[group.stage]

        def like(p: int, layout: StageLayout = layout) -> Hashable:
            aval = program.avals[p]
            return aval.shape, aval.dtype, _axes(layout.whole.get(p))

        room, own = Counter(map(like, group.outs)), []
        for p in group.inputs:
            again = [q for at, q in reads if at >= k and (at, q) != (k, p)]
            if p not in donated or any(_share(p, q, apart) for q in (*again, *results)):
                continue
            if room[like(p)]:
                room[like(p)] -= 1
                own.append(p)
        out.append(tuple(own))
    return out


def _share(p: int, q: int, apart: Stacked) -> bool:
    """Whether two places are of the same argument, and of layers in common."""
    one, other = apart.cuts.get(p), apart.cuts.get(q)
    if (one.argument if one else p) != (other.argument if other else q):
        return False
    return one is None or other is None or max(one.begin, other.begin) < min(one.end, other.end)


def _axes(spec: jax.P | None) -> tuple[tuple[str, ...], ...]:
    """How a spec splits each dim; specs that say the same are equal."""
    each = [() if s is None else (s,) if isinstance(s, str) else tuple(s) for s in spec or ()]
    while each and not each[-1]:
        each.pop()
    return tuple(each)
