"""Which results of a forward scan can its backward scan make again?

A scan over layers stacks what its backward scan reads: activations of all layers, the *residuals*.
Made again, they are one layer's at a time. The body of the backward scan begins then with the
operations of the forward body that make them, from

  - slices of what the forward scan takes apart, such as weights, and what is the same in all rounds
  - the carry as it enters each round, which is stacked instead
  - what is not computed twice: operations with effects, and those of the user's own jax.checkpoint

(Chen et al., arXiv 1604.06174, with a layer for a segment.) A residual that a part of the user's
jax.checkpoint reads stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from passes.bodies import Body, Path
from passes.checkpointed import done_again
from passes.ir.graph import Graph, Op
from passes.remat_region import RematRegion, maker_of, under
from passes.through_scans import Chain, Scan, scans_of


def remat_scans(
    graph: Graph, bodies: Sequence[Body], backward: Collection[Path], user: Collection[int]
) -> Iterator[RematRegion]:
    """Scans over layers. user: operations in parts that `jax.checkpoint` computes again."""
    at = {body.path: body for body in bodies}
    ops = under(graph)
    for body in bodies:
        scans = scans_of(graph, body, at)
        for reader in scans.values():
            for writer in scans.values():
                path = writer.unit.path
                if reader.unit.path in backward and path not in backward:
                    inner = at[(*path, "body")]
                    found = _Pair(graph, inner, writer, reader, ops, user).region()
                    if found is not None:
                        yield found


class _Pair:
    """A forward scan and its gradient."""

    def __init__(
        self,
        graph: Graph,
        inner: Body,
        writer: Scan,
        reader: Scan,
        ops: Mapping[Path, Sequence[Op]],
        user: Collection[int],
    ) -> None:
        self.graph, self.inner, self.writer, self.reader = graph, inner, writer, reader
        self.ops, self.user = ops, user
        self.read = _handed_on(graph, writer, reader)
        self.maker = maker_of(inner)

    def region(self) -> RematRegion | None:
        """What can be made again; None where that frees nothing."""
        if not self.read or self.writer.trips != self.reader.trips:
            return None
        fixed, kept = self.fixed(), self.kept_for_user()
        values, trips = self.graph.values, self.writer.trips
        carried = {a for a, _ in self.graph.ties}
        outside = {op.outputs[0] for op in self.writer.enters.values()} - carried
        wanted = {k: v for k, v in self.read.items() if v not in kept and v not in carried}
        units, leaves = self.made_of(wanted.values(), fixed, kept)
        makes = {k: v for k, v in wanted.items() if v not in leaves or v in outside}
        if not makes:
            return None
        stacked = {v for k, v in self.read.items() if k not in makes}
        more = [v for v in leaves if v not in outside and v not in stacked]
        equations = tuple(self.inner.units[u].path for u in units)
        chain = Chain(self.writer.unit.path, equations, makes, leaves)
        enters = self.reader.enters
        return RematRegion(
            f"scan of {trips:g} rounds",
            enters[min(makes)].source,
            tuple(op.id for path in equations for op in self.ops[path]),
            tuple(dict.fromkeys(enters[k].inputs[0] for k in makes)),
            sum(values[v].type.nbytes for v in more) * trips,
            reader=self.reader.unit.path,
            chain=chain,
        )

    def fixed(self) -> frozenset[int]:
        """Places in the body of equations that are not computed again."""
        inside = (*self.reader.unit.path, "body")
        forward = [op for u in self.inner.units for op in self.ops[u.path]]
        again = [
            op for op in self.graph.ops if op.id in self.user and op.path[: len(inside)] == inside
        ]
        outer = {op.inputs[0]: op.outputs[0] for op in self.writer.enters.values()}
        same = {op.outputs[0]: outer[op.inputs[0]] for op in self.reader.enters.values()
                if op.inputs[0] in outer}  # fmt: skip
        same |= {self.reader.enters[k].outputs[0]: v for k, v in self.read.items()}
        done = done_again(self.graph, forward, again, same)
        return frozenset(
            k
            for k, u in enumerate(self.inner.units)
            if u.effects or any(op.id in done for op in self.ops[u.path])
        )

    def kept_for_user(self) -> frozenset[int]:
        """Residuals that a part of the user's jax.checkpoint reads."""
        consumers = self.graph.consumers()
        return frozenset(
            v
            for k, v in self.read.items()
            if any(o in self.user for o, _ in consumers[self.reader.enters[k].outputs[0]])
        )

    def made_of(
        self, values: Collection[int], fixed: Collection[int], kept: Collection[int]
    ) -> tuple[list[int], tuple[int, ...]]:
        """Places of the equations that make values, in order, and what these read beside.

        Of values that no equation makes, the values.
        """
        units: set[int] = set()
        leaves: set[int] = set()
        todo = list(values)
        while todo:
            v = todo.pop()
            unit = self.maker.get(v, -1)
            if unit < 0 or unit in fixed or v in kept:
                if self.graph.values[v].kind not in ("literal", "constant"):
                    leaves.add(v)
            elif unit not in units:
                units.add(unit)
                todo += self.inner.units[unit].reads
        return sorted(units), tuple(sorted(leaves))


def _handed_on(graph: Graph, writer: Scan, reader: Scan) -> dict[int, int]:
    """By the number of the reader's input, the value that the writer stacks for it."""
    stacks = {op.outputs[0]: op for op in writer.leaves.values() if op.name == "scan_stack"}
    found = {
        k: stacks[op.inputs[0]].inputs[0]
        for k, op in reader.enters.items()
        if op.name == "scan_slice" and op.inputs[0] in stacks
    }
    return {k: v for k, v in found.items() if graph.values[v].kind == "result"}
