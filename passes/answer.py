"""What does a choice mean?  Shardings of values, strategies of operations, and every reshard.

Everything here is read off the choice; nothing is decided any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from passes.compiler import sums_whole
from passes.decisions import DimMap
from passes.ir.graph import Op
from passes.ir.plan import Axes
from passes.ir.sharding import PARTIAL
from passes.op_cost import OpCost, takes_time
from passes.priced import Priced
from passes.reshard import WHOLE, Step, Waited, steps
from passes.reshard_copies import (
    Moved,
    copies,
    copy_seconds,
    copying_chip,
    exchanges,
    turned_seconds,
)
from passes.strategies import Strategy


@dataclass(frozen=True, slots=True)
class Change:
    """One value changed from one sharding to another: for an operand of op, or after a result.

    nbytes: of the whole value, as it is sent. waited: what a step loses by a gather. copied:
    seconds that a trip computes to lay the value anew (`passes.reshard_copies`). tiles: those of
    picked rows that are turned.
    """

    op: int
    side: str
    index: int
    value: int
    source: Axes
    target: Axes
    shared: int
    moves: tuple[Step, ...]
    trips: float
    nbytes: float
    waited: Waited
    copied: float = 0.0
    tiles: int = 0


def value_axes(priced: Priced, choice: Sequence[int]) -> tuple[Axes, ...]:
    """The sharding of every value under a choice."""
    out: list[Axes] = []
    groups = priced.decisions.groups
    known: dict[tuple[int, DimMap], Axes] = {}
    for v, g in enumerate(priced.decisions.group_of):
        mapping = groups[g].members[v]
        if (g, mapping) not in known:
            node = priced.node_of_group[g]
            chosen = priced.meanings[node].choices[choice[node]] if node >= 0 else priced.only[g]
            inverse = {d: i for i, d in enumerate(mapping) if d >= 0}
            known[g, mapping] = tuple(inverse[e] if e >= 0 else e for e in chosen)
        out.append(known[g, mapping])
    return tuple(out)


def op_strategies(priced: Priced, choice: Sequence[int]) -> tuple[Strategy, ...]:
    """The strategy of every operation under a choice."""
    return tuple(
        table[choice[owner]] if owner >= 0 else table[0]
        for owner, table in zip(priced.owner, priced.tables, strict=True)
    )


def changes(
    priced: Priced, choice: Sequence[int], values: Sequence[Axes], chosen: Sequence[Strategy]
) -> tuple[Change, ...]:
    """Every reshard, in program order; a shared copy's counts once, at its first reader."""
    out: list[Change] = []
    made: set[tuple[int, int]] = set()
    shared = {op for op, _ in priced.copies}
    agree: dict[int, bool] = {}
    for op, first in zip(priced.graph.ops, priced.like, strict=True):
        if first not in agree:
            wants, gives = priced.layouts.of(op.rule, chosen[op.id])
            have = [values[v] for v in (*op.inputs, *op.outputs)]
            agree[first] = have == [*wants, *gives]
        if not agree[first] or op.id in shared:
            layout = priced.layouts.of(op.rule, chosen[op.id])
            out += _changes_of(priced, op, choice, values, layout, made)
    return tuple(out)


def _changes_of(
    priced: Priced,
    op: Op,
    choice: Sequence[int],
    values: Sequence[Axes],
    layout: tuple[Sequence[Axes], Sequence[Axes]],
    made: set[tuple[int, int]],
) -> Iterator[Change]:
    """Those of one operation. layout: what it wants and gives. made: copies that are there."""
    wants, gives = layout
    all_values = priced.graph.values
    for k, v in enumerate(op.inputs):
        if all_values[v].type.size <= 1 or all_values[v].kind == "literal":
            continue
        have = values[v]
        copy = priced.copies.get((op.id, k), -1)
        if copy >= 0:
            through = priced.meanings[copy].choices[choice[copy]]
            if (copy, v) not in made and have != through:
                yield _change(
                    priced, op, ("copy", k, v), (have, through), copy in priced.narrow, copy
                )
            made.add((copy, v))
            have = through
        if have != wants[k]:
            narrow = (op.id, k) in priced.fusion.kept.narrow
            yield _change(priced, op, ("operand", k, v), (have, wants[k]), narrow, copy)
    for k, v in enumerate(op.outputs):
        if all_values[v].type.size > 1 and gives[k] != values[v]:
            yield _change(priced, op, ("result", k, v), (gives[k], values[v]), False)


def _change(
    priced: Priced,
    op: Op,
    place: tuple[str, int, int],
    axes: tuple[Axes, Axes],
    narrow: bool,
    shared: int = -1,
) -> Change:
    (side, k, v), (source, target) = place, axes
    moves = steps(source, target, priced.mesh.sizes, sums_whole(priced.cluster.platform))
    assert moves is not None, f"{op.name} can not get value {v} from {source} to {target}"
    trips = priced.graph.trips(op.region)
    nbytes = _sent_bytes(priced, side, v, source, narrow)
    hides = side != "result"
    share = priced.overlap.waited(v, op.id, trips, nbytes) if hides else WHOLE
    taken = 0.0, 0
    if exchanges(moves):
        taken = _copied(priced, v, axes, nbytes, priced.picked.get(v, 0))
    return Change(op.id, side, k, v, source, target, shared, moves, trips, nbytes, share, *taken)


def _copied(
    priced: Priced, v: int, axes: tuple[Axes, Axes], nbytes: float, table: int
) -> tuple[float, int]:
    """Seconds of the copies around an all-to-all, and how many tiles of rows they turn."""
    chip = copying_chip(priced.cluster)
    if chip is None:
        return 0.0, 0
    value, size = Moved(priced.graph.values[v].shape, table), priced.graph.values[v].type.size
    found = copies(axes[:1], axes[1:], value, priced.mesh.sizes)
    number, parts, flat, tiles = (int(of[0, 0]) for of in found)
    taken = number * copy_seconds(chip, size / parts, nbytes / parts, bool(flat))
    return taken + (turned_seconds(chip, value, tiles) if table else 0.0), tiles


def _sent_bytes(priced: Priced, side: str, v: int, source: Axes, narrow: bool) -> float:
    """Bytes of a whole value as it is sent: summands as they are made, to a narrow reader half."""
    if PARTIAL not in source:
        return priced.fusion.kept.sent(v, narrow)
    if side == "result":
        return priced.graph.values[v].type.nbytes
    return priced.fusion.kept.of_value[v]


@dataclass(frozen=True, slots=True)
class Answer:
    """A choice read back: shardings of values, strategies and seconds of ops, and all reshards.

    Seconds of an operation are those of what its reshards copy, too.
    """

    values: tuple[Axes, ...]
    strategies: tuple[Strategy, ...]
    seconds: tuple[float, ...]
    changes: tuple[Change, ...]


def read_back(priced: Priced, choice: Sequence[int]) -> Answer:
    """What a choice means for every value and operation."""
    values, chosen = value_axes(priced, choice), op_strategies(priced, choice)
    changed = changes(priced, choice, values, chosen)
    seconds = list(_seconds(priced, values, chosen))
    for c in changed:
        seconds[c.op] += c.copied * c.trips
    return Answer(values, chosen, tuple(seconds), changed)


def _seconds(
    priced: Priced, values: Sequence[Axes], chosen: Sequence[Strategy]
) -> tuple[float, ...]:
    """Compute seconds per step of every operation; like operations are priced once."""
    graph, known = priced.graph, {}
    cost = OpCost(graph, priced.fusion, priced.mesh, priced.cluster, priced.links, priced.layouts)
    trips = [graph.trips(r.id) for r in graph.regions]
    out: list[float] = []
    for op, strategy, first in zip(graph.ops, chosen, priced.like, strict=True):
        traffic = priced.fusion.traffic[op.id]
        if first < op.id or not takes_time(op, traffic):
            out.append(out[first] if first < op.id else 0.0)
            continue
        updates = traffic.update is not None and _is_as_made(priced, op, values, strategy)
        once = op.id in priced.fusion.kept.one_pass
        key = (id(op.rule), strategy, id(traffic), once, updates, cost.marks(op))
        if key not in known:
            known[key] = cost.seconds(op, strategy, updates)
        out.append(known[key] * trips[op.region])
    return tuple(out)


def _is_as_made(priced: Priced, op: Op, values: Sequence[Axes], strategy: Strategy) -> bool:
    """Whether the result of a product is read as each device makes it, neither summed nor moved."""
    made = priced.layouts.of(op.rule, strategy)[1][0]
    return PARTIAL not in made and made == values[op.outputs[0]]
