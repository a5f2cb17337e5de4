"""Which values play the same role?  `roles(graph) -> tuple[int, ...]`: layers that are alike.

A model is written as a loop over layers and traced as one long program. What stands in the same
place of two layers has the same surroundings: this is colour refinement (Weisfeiler and Leman
1968), over operations, values and decisions, for so many rounds that a role knows what is decided
around it, and no more: with all of the program in view, no two layers would be alike. Layers next
to the first or the last operation see it, and are roles of their own.

A search may give one role one sharding, and decide for one layer what holds for all of them. That
is a restriction, not an approximation: costs and memory are still those of the whole program.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from passes.decisions import Decisions, decide
from passes.fusion import Fusion
from passes.ir.graph import Graph, Hint

__all__ = ["Repeats", "repeats", "roles"]

Colours = npt.NDArray[np.uint64]

# How many decisions away a role sees. For GPT-2 small on 8 H100 (4 x 2), layers alike cost 0.53 %
# more than free ones after one round, 0.04 % after two, nothing after three.
_ROUNDS = 3
# Layers are worth looking for in programs of at least so many operations.
_LARGE = 2000


@dataclass(frozen=True, slots=True)
class Repeats:
    """A program whose layers decide together.

    graph: the program, with what plays one role tied. decisions: of it. same: per operation the
    first one that does the same to the same decisions.
    """

    graph: Graph
    decisions: Decisions
    same: tuple[int, ...]


def repeats(
    graph: Graph, decisions: Decisions, hints: Sequence[Hint], fusion: Fusion
) -> Repeats | None:
    """The program with its layers alike; None where most operations repeat no other.

    decisions: of the graph as it is.
    """
    if len(graph.ops) < _LARGE:
        return None
    found = roles(graph, decisions, hints)
    ties = tuple((first, v) for v, first in enumerate(found) if first != v)
    tied = replace(graph, ties=(*graph.ties, *ties))
    decided = decide(tied, hints)
    same = same_operations(graph, decided, fusion)
    return Repeats(tied, decided, same) if 2 * len(set(same)) < len(same) else None


def roles(graph: Graph, decisions: Decisions, hints: Sequence[Hint] = ()) -> tuple[int, ...]:
    """Per value the first one of the same role: itself where there is none before it.

    decisions: of the graph as it is. Values of one role have one type, and hints that say the same.
    """
    reads = np.array(
        [(op.id, k, v) for op in graph.ops for k, v in enumerate(op.inputs)], np.int64
    ).reshape(-1, 3)
    makes = np.array(
        [(op.id, k, v) for op in graph.ops for k, v in enumerate(op.outputs)], np.int64
    ).reshape(-1, 3)
    kinds, group_of = _kinds(graph, hints), np.array(decisions.group_of, np.int64)
    values, ops = _mixed(kinds), _mixed(_interned(_of_ops(graph)))
    for _ in range(_ROUNDS):
        seen = np.zeros_like(ops)
        for salt, edges in ((1, reads), (2, makes)):
            np.add.at(seen, edges[:, 0], _mixed(values[edges[:, 2]], edges[:, 1], salt))
        ops = _mixed(ops + seen)
        met = np.zeros_like(values)
        for salt, edges in ((3, reads), (4, makes)):
            np.add.at(met, edges[:, 2], _mixed(ops[edges[:, 0]], edges[:, 1], salt))
        values = _mixed(values + met)
        together = np.zeros(len(decisions.groups), np.uint64)
        np.add.at(together, group_of, values)
        values = _mixed(values + _mixed(together)[group_of])
    first: dict[tuple[int, int], int] = {}
    both = zip(values.tolist(), kinds.tolist(), strict=True)
    return tuple(first.setdefault(key, v) for v, key in enumerate(both))


def same_operations(graph: Graph, decisions: Decisions, fusion: Fusion) -> tuple[int, ...]:
    """Per operation the first one that does the same to the same decisions."""
    first: dict[Hashable, int] = {}
    group_of, groups, kept = decisions.group_of, decisions.groups, fusion.kept
    trips = [graph.trips(r.id) for r in graph.regions]
    of_value = [
        (g, groups[g].members[v.id], kept.of_value[v.id], v.type, v.kind)
        for v, g in zip(graph.values, group_of, strict=True)
    ]
    seen: dict[Hashable, int] = {}
    number = [seen.setdefault(key, len(seen)) for key in of_value]
    return tuple(
        first.setdefault(
            (
                op.name,
                id(op.rule),
                op.effects,
                trips[op.region],
                id(fusion.traffic[op.id]),
                op.id in kept.one_pass,
                tuple([number[v] for v in op.inputs]),
                tuple([number[v] for v in op.outputs]),
                tuple([(op.id, k) in kept.narrow for k in range(len(op.inputs))]),
            ),
            op.id,
        )
        for op in graph.ops
    )


def _kinds(graph: Graph, hints: Iterable[Hint]) -> npt.NDArray[np.int64]:
    """Numbers of what values are by themselves."""
    said: dict[int, list[Hashable]] = {}
    for h in hints:
        said.setdefault(h.value, []).append((h.dims, h.priority, h.hard))
    outputs = set(graph.outputs)
    return _interned(
        (v.type, v.kind, v.id in graph.donated, v.id in outputs, tuple(said.get(v.id, ())))
        for v in graph.values
    )


def _of_ops(graph: Graph) -> Iterable[Hashable]:
    """What operations are by themselves; equal rules are one object."""
    around: list[tuple[Hashable, ...]] = []
    for r in graph.regions:  # a region comes after the one around it
        above = around[r.parent] if r.id else ()
        around.append((*above, (r.kind, r.trips)))
    return ((op.name, id(op.rule), op.effects, around[op.region]) for op in graph.ops)


def _interned(keys: Iterable[Hashable]) -> npt.NDArray[np.int64]:
    """Equal keys by equal numbers, in the order in which they are met."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(k, len(known)) for k in keys], np.int64)


def _mixed(
    colours: npt.NDArray[np.int64] | Colours,
    place: npt.NDArray[np.int64] | int = 0,
    salt: int = 0,
) -> Colours:
    """Colours that differ wherever these do (SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    x = colours.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * (
        np.asarray(place).astype(np.uint64) * np.uint64(8) + np.uint64(salt + 1)
    )
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    out: Colours = x ^ (x >> np.uint64(31))
    return out
