"""What does a scan take from outside that it could rather make by itself?

A scan over layers stacks what its backward scan reads: the probabilities of every layer at once.
And jax computes a mask once, ahead of both. No loop over blocks inside a body would help then. So
the backward scan makes huge values again, from what is small (`passes.huge`): of the forward scan's
body the operations that made them, of values that the forward scan stacks instead. Of what is cheap
and made ahead of a scan, the operations go into its body.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from passes.bodies import Body, Path, Unit
from passes.huge import PART, PRODUCTS, Huge, find_huge
from passes.ir.graph import Graph, Op


@dataclass(frozen=True, slots=True)
class Chain:
    """Operations by which a scan's body makes some of its inputs itself.

    writer: the path of the scan in whose body they stand, None for the body around. equations:
    their paths, in order. makes: by the number of an input of the scan, the value. leaves: values
    that the operations read and do not make.
    """

    writer: Path | None
    equations: tuple[Path, ...]
    makes: Mapping[int, int]
    leaves: tuple[int, ...]


@dataclass(frozen=True)
class ThroughScans:
    """chains: by the path of the scan that makes values again. sources: of each product that is
    computed again its name and its line.
    """

    chains: Mapping[Path, tuple[Chain, ...]]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Scan:
    """A scan: its links from outside by number, and to outside."""

    unit: Unit
    enters: Mapping[int, Op]
    leaves: Mapping[int, Op]
    trips: float


def made_again(graph: Graph, bodies: Sequence[Body], least: float) -> ThroughScans:
    """What scans should make again. least: bytes of a value, or of a stack, worth doing so."""
    at = {body.path: body for body in bodies}
    huge = {path: find_huge(graph, body) for path, body in at.items()}
    most = max((v.type.size for v in graph.values), default=0)
    chains: dict[Path, tuple[Chain, ...]] = {}
    for body in bodies:
        scans = scans_of(graph, body, at)
        stacks = {op.outputs[0]: (s, op) for s in scans.values() for op in s.leaves.values()}
        for scan in scans.values():
            found = _from_around(graph, body, huge[body.path], scan, least, PART * most)
            for writer in scans.values():
                if writer is not scan and writer.trips == scan.trips:
                    inner = at[(*writer.unit.path, "body")]
                    mine = {
                        k: stacks[op.inputs[0]][1].inputs[0]
                        for k, op in scan.enters.items()
                        if op.name == "scan_slice"
                        and op.inputs[0] in stacks
                        and stacks[op.inputs[0]][0] is writer
                        and stacks[op.inputs[0]][1].name == "scan_stack"
                        and graph.values[op.inputs[0]].type.nbytes > least
                    }
                    found += _from_writer(graph, inner, huge[inner.path], writer, mine, most)
            if found:
                chains[scan.unit.path] = tuple(found)
    by_path = {op.path: op for op in graph.ops}
    made = (by_path[path] for cs in chains.values() for c in cs for path in c.equations)
    lines = {f"{op.name} at {op.source}": None for op in made if op.name in PRODUCTS}
    return ThroughScans(chains, tuple(lines))


def scans_of(graph: Graph, body: Body, at: Mapping[Path, Body]) -> dict[Path, Scan]:
    """The scans of a body, by path. at: all bodies."""
    loops = {op.path[:-2] for op in graph.ops if graph.regions[op.region].kind == "scan"}
    units = {u.path: u for u in body.units if (*u.path, "body") in at and u.path in loops}
    enters: dict[Path, dict[int, Op]] = {path: {} for path in units}
    leaves: dict[Path, dict[int, Op]] = {path: {} for path in units}
    trips = dict.fromkeys(units, 0.0)
    for op in graph.ops:
        path = op.path[:-2]
        if op.is_link and path in units:
            side = enters if op.path[-2] == "in" else leaves
            side[path][int(op.path[-1])] = op
            if side is leaves:
                trips[path] = graph.regions[op.region].trips
    return {p: Scan(u, enters[p], leaves[p], trips[p]) for p, u in units.items()}


def _from_around(
    graph: Graph, body: Body, huge: Huge, scan: Scan, least: float, size: float
) -> list[Chain]:
    """What is made ahead of a scan, and is cheap."""
    carried = {c for c, _ in graph.ties}
    makes = {
        k: op.inputs[0]
        for k, op in scan.enters.items()
        if op.name == "loop_enter"
        and op.outputs[0] not in carried
        and op.inputs[0] in huge.leaves
        and graph.values[op.inputs[0]].type.size >= size
        and graph.values[op.inputs[0]].type.nbytes > least
    }
    ops, leaves = _made_of(graph, body, huge, makes.values())
    return [Chain(None, ops, makes, leaves)] if makes else []


def _from_writer(
    graph: Graph, inner: Body, huge: Huge, writer: Scan, makes: Mapping[int, int], most: int
) -> list[Chain]:
    """What a forward scan stacks, and is huge or cheap."""
    carried = {c for c, _ in graph.ties}
    there = {op.outputs[0] for op in writer.enters.values()} - carried  # not stacked for it
    good: dict[int, int] = {}
    for k, v in makes.items():
        cheap = v in huge.leaves and graph.values[v].type.size >= PART * most
        if v in huge.values or cheap:
            _, leaves = _made_of(graph, inner, huge, [v])
            if v not in leaves and there.issuperset(u for u in leaves if u in huge.values):
                good[k] = v
    ops, leaves = _made_of(graph, inner, huge, good.values())
    return [Chain(writer.unit.path, ops, good, leaves)] if good else []


def _made_of(
    graph: Graph, body: Body, huge: Huge, values: Iterable[int]
) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    """The operations that make huge and cheap values of small ones, and these."""
    makers = {v: u.op for u in body.units for v in u.makes if u.op >= 0}
    within = {body.units[k].op for part in huge.parts for k in part.units}
    ops: set[int] = set()
    leaves: dict[int, None] = {}
    todo = list(values)
    while todo:
        v = todo.pop()
        maker = makers.get(v, -1)
        again = v in huge.leaves or (v in huge.values and maker in within)
        if maker < 0 or not again:
            if graph.values[v].kind != "literal":
                leaves[v] = None
        elif maker not in ops:
            ops.add(maker)
            todo += graph.ops[maker].inputs
    return tuple(graph.ops[o].path for o in sorted(ops)), tuple(sorted(leaves))
