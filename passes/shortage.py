"""Why does nothing fit?  The arrays that can not be together at one moment, and the hints on them.

Every array is as small as any sharding makes it, and still there is too much. Where hints keep some
of them larger than they had to be, the fewest such hints are named without which there would be
room: the largest saving first, which for one moment is the fewest there can be.
"""

from __future__ import annotations

import math

from cost_models.units import format_bytes
from passes.decisions import Group
from passes.priced import Priced, label_of
from passes.solve.problem import Shortage
from passes.strategies import Axes, value_choices
from passes.worth import moment

_MOST = 4  # arrays that are named


def shortage_text(priced: Priced, short: Shortage) -> str:
    """What is too much and when: `1 GiB short even at its smallest, at train.py:3, dot: ...`."""
    there = [(group, _bytes(priced, group, short.time)) for group in priced.decisions.groups]
    held = [(nbytes / _pieces(priced, group), group) for group, nbytes in there if nbytes]
    held.sort(key=lambda h: (-h[0], h[1].id))
    producers = priced.graph.producers()
    named = [f"{label_of(priced.graph, producers, g)} {format_bytes(b)}" for b, g in held[:_MOST]]
    if rest := held[_MOST:]:
        named.append(f"{len(rest)} more {format_bytes(sum(b for b, _ in rest))}")
    where = moment(priced, short.time)
    text = f"{format_bytes(short.short)} short even at its smallest, {where}: {', '.join(named)}"
    hints = _hints_to_loosen(priced, short)
    return f"{text}; without {' and '.join(hints)} there would be room" if hints else text


def _hints_to_loosen(priced: Priced, short: Shortage) -> list[str]:
    """The hints without which there would be room, if there would be."""
    saved: dict[str, float] = {}
    for group in priced.decisions.groups:
        if group.hints:
            nbytes = _bytes(priced, group, short.time)
            free = value_choices(group.shape, priced.mesh.sizes, group.partial)
            less = nbytes / _pieces(priced, group) - nbytes / _most_pieces(priced, free)
            origin = group.hints[0].origin
            saved[origin] = saved.get(origin, 0.0) + less
    out: list[str] = []
    missing = short.short
    for origin, less in sorted(saved.items(), key=lambda s: (-s[1], s[0])):
        if missing > 0 and less > 0:
            out.append(origin)
            missing -= less
    return out if missing <= 0 else []


def _bytes(priced: Priced, group: Group, time: int) -> float:
    """Bytes of all that shares a sharding and lies there at this moment, were it on one device."""
    spans, of_value, parts = priced.live.spans, priced.fusion.kept.of_value, priced.fusion.parts
    alive = (v for v in group.members if spans[v][0] <= time < spans[v][1])
    return float(sum(of_value[v] * parts.get(v, 1) for v in alive))


def _pieces(priced: Priced, group: Group) -> int:
    """Into how many parts the hints let it be split at most."""
    node = priced.node_of_group[group.id]
    only = (priced.only[group.id],)
    return _most_pieces(priced, priced.meanings[node].choices if node >= 0 else only)


def _most_pieces(priced: Priced, choices: tuple[Axes, ...]) -> int:
    sizes = priced.mesh.sizes
    return max(
        math.prod(n for e, n in zip(choice, sizes, strict=True) if e >= 0) for choice in choices
    )
