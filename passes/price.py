"""What does every choice cost?  `price(graph, mesh, cluster, ...) -> Priced`: a Problem, explained.

Nodes of the problem:
  group    values that share one sharding; its cost is the compute of the operations anchored on it
  op       an operation that chooses its own strategy
  copy     one value in another sharding, shared by its readers in a region, so that a gather wanted
           by three matmuls is paid once
Edges carry the reshards between producer and reader. A body's costs count as often as it runs.
Costs are whole picoseconds, usages bytes per device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cost_models.cluster import Cluster
from passes.bags import picked
from passes.compiler import sums_whole
from passes.decisions import CARRIES, Decisions, DimMap, Group
from passes.fusion import Fusion
from passes.ir.graph import Graph, Op
from passes.ir.mesh import Mesh
from passes.ir.sharding import PARTIAL
from passes.liveness import Liveness
from passes.loop_stacks import stacks
from passes.meshes import links_of
from passes.op_cost import OpCost, takes_time
from passes.overlap import overlap
from passes.priced import HintUnmet, Meaning, Priced, label_of
from passes.relaid import copied, copy_bytes
from passes.reshard_copies import Moved, copying_chip
from passes.reshard_table import PICO, ReshardTable
from passes.solve.problem import INFINITY, Costs, Edge, Node, Problem, Use
from passes.strategies import (
    Axes,
    Layouts,
    Strategy,
    strategies,
    strategy_from,
    value_choices,
)

# Picoseconds per byte of an argument, or of random bits, on a device: breaks ties for split ones,
# far below any real cost (HBM takes 300,000 times as long). Whole batches on every device are not
# free to fill. And random bits cost their readers as much as they read of them, but where a reader
# slices them, XLA draws them whole, and holds them all (haiku's BERT for v6e:4x4; jax 0.10.2).
_TIE = 2.0**-20
_DRAWS = frozenset({"random_bits", "rng_bit_generator", "threefry2x32"})


def price(
    graph: Graph,
    mesh: Mesh,
    cluster: Cluster,
    decisions: Decisions,
    live: Liveness,
    fusion: Fusion,
    limit: float | None,
    same: Sequence[int] = (),
) -> Priced:
    """Build the problem of one graph on one mesh. limit: bytes per device, None for none.

    same: per operation the first one like it (`passes.repeats`), which is priced for all of them;
    () where each stands for itself. Raises HintUnmet where a hard hint leaves a value without any
    sharding.
    """
    return _Pricer(graph, mesh, cluster, decisions, live, fusion, same).build(limit)


class _Pricer:
    def __init__(
        self,
        graph: Graph,
        mesh: Mesh,
        cluster: Cluster,
        decisions: Decisions,
        live: Liveness,
        fusion: Fusion,
        same: Sequence[int],
    ) -> None:
        self.graph, self.mesh, self.cluster, self.same = graph, mesh, cluster, same
        self.decisions, self.live = decisions, live
        self.sizes = mesh.sizes
        self.links = links_of(cluster, mesh)
        self.meanings: list[Meaning] = []
        self.costs: list[Costs] = []
        self.uses: list[list[Use]] = []
        self.labels: list[str] = []
        self.edges: list[Edge] = []
        self.constant = 0.0
        self.cache: dict[Any, Any] = {}
        self.copies: dict[tuple[int, int], int] = {}
        self.layouts = Layouts(mesh.sizes)
        self.fusion, self.kept = fusion, fusion.kept
        self.narrow: set[int] = set()
        self.overlap = overlap(graph, cluster, mesh.devices, self.links)
        sums, chip = sums_whole(cluster.platform), copying_chip(cluster)
        self.table = ReshardTable(mesh.sizes, self.links, sums, chip)
        self.picked = picked(graph) if chip else {}
        self.op_cost = OpCost(graph, fusion, mesh, cluster, self.links, self.layouts)
        self.copied = copied(graph, live, self.kept, cluster.platform)
        self.trips = [graph.trips(r.id) for r in graph.regions]
        self.producers = graph.producers()

    # nodes

    def node(self, meaning: Meaning, label: str) -> int:
        self.meanings.append(meaning)
        self.costs.append(np.zeros(len(meaning.choices)))
        self.uses.append([])
        self.labels.append(label)
        return len(self.meanings) - 1

    def build(self, limit: float | None) -> Priced:
        graph, decisions = self.graph, self.decisions
        self.node_of: list[int] = []
        self.only: list[Axes] = []
        self.lists: list[tuple[Axes, ...]] = []
        for group in decisions.groups:
            choices = self.group_choices(group)
            self.only.append(choices[0])
            self.lists.append(choices)
            many = len(choices) > 1
            label = label_of(graph, self.producers, group) if many else ""
            self.node_of.append(
                self.node(Meaning("group", group.id, choices), label) if many else -1
            )
        self.add_memory()
        self.add_copies()
        like = tuple(self.alike())
        times = Counter(like)
        added = {o: self.add_op(graph.ops[o], n) for o, n in times.items()}
        owners, tables = zip(*(added[o] for o in like), strict=True) if like else ((), ())
        nodes = tuple(
            Node(np.round(c), tuple(u), name)
            for c, u, name in zip(self.costs, self.uses, self.labels, strict=True)
        )
        problem = Problem(graph.name, nodes, tuple(self.edges), limit)
        return Priced(
            graph,
            self.mesh,
            self.links,
            self.cluster,
            decisions,
            self.live,
            problem,
            tuple(self.meanings),
            tuple(self.node_of),
            tuple(self.only),
            owners,
            tables,
            self.copies,
            self.fusion,
            self.constant,
            self.layouts,
            frozenset(self.narrow),
            self.overlap,
            self.copied,
            stacks(graph, self.live, self.cluster.platform),
            like,
            self.picked,
        )

    def group_choices(self, group: Group) -> tuple[Axes, ...]:
        key = ("choices", group.shape, group.partial, group.fixed)
        if key not in self.cache:
            found = value_choices(group.shape, self.sizes, group.partial)
            if group.hints:
                found = tuple(c for c in found if self.meets(c, group.fixed))
            self.cache[key] = found
        if not self.cache[key]:
            hint = group.hints[0]
            value = self.graph.values[next(iter(group.members))]
            raise HintUnmet(
                f"no sharding of {value.name or 'this value'} {value.type} on mesh {self.mesh} "
                f"meets the hint {hint.dims} ({hint.origin}): axes must divide the dims they split"
            )
        found = self.cache[key]
        assert isinstance(found, tuple)
        return found

    def meets(self, choice: Axes, fixed: tuple[tuple[str, ...] | None, ...]) -> bool:
        for d, wanted in enumerate(fixed):
            if wanted is None:
                continue
            real = {
                a
                for a in wanted
                if a in self.mesh.names and self.sizes[self.mesh.names.index(a)] > 1
            }
            if {self.mesh.names[a] for a, e in enumerate(choice) if e == d} != real:
                return False
        return not any(e == PARTIAL for e in choice)

    # memory

    def add_memory(self) -> None:
        arguments, parts = set(self.graph.inputs), self.fusion.parts
        drawn = {v for op in self.graph.ops if op.name in _DRAWS for v in op.outputs}
        for group in self.decisions.groups:
            node = self.node_of[group.id]
            uses: dict[tuple[int, int], Costs] = {}
            for v, mapping in group.members.items():
                span = self.live.spans[v]
                nbytes = self.kept.of_value[v] * parts.get(v, 1)
                usage = self.usage(self.choices_of(group.id), mapping, nbytes)
                if node >= 0 and (v in arguments or v in drawn):
                    self.costs[node] += usage * _TIE
                if span[0] >= span[1]:
                    continue
                uses[span] = uses[span] + usage if span in uses else usage
                if v in self.copied:
                    usage = self.copy_usage(v, self.choices_of(group.id), mapping)
                    copy = self.copied[v]  # hardly a plan for several devices gathers nothing
                    span = copy.early if self.mesh.devices > 1 else copy.begin, copy.end
                    uses[span] = uses[span] + usage if span in uses else usage
            if node < 0:
                node = self.fixed_memory(uses)
            else:
                self.uses[node].extend(Use(b, e, u) for (b, e), u in uses.items())

    def fixed_memory(self, uses: Mapping[tuple[int, int], Costs]) -> int:
        """Values with one choice still take room: one node holds them all."""
        if not hasattr(self, "rest"):
            self.rest = self.node(Meaning("rest", 0, ((),)), "values too small to split")
        for (b, e), u in uses.items():
            if u[0] >= 1024:
                self.uses[self.rest].append(Use(b, e, u[:1]))
        return -1

    def choices_of(self, group: int) -> tuple[Axes, ...]:
        return self.lists[group]

    def usage(self, choices: tuple[Axes, ...], mapping: DimMap, nbytes: int) -> Costs:
        key = ("usage", id(choices), nbytes)
        if key not in self.cache:
            split = np.array(
                [
                    np.prod([n for e, n in zip(c, self.sizes, strict=True) if e >= 0], initial=1.0)
                    for c in choices
                ]
            )
            self.cache[key] = np.ceil(nbytes / split)
        out: Costs = self.cache[key]
        return out

    def copy_usage(self, v: int, choices: tuple[Axes, ...], mapping: DimMap) -> Costs:
        """Bytes of the copy of what is laid anew, under every choice."""
        inverse = {d: i for i, d in enumerate(mapping) if d >= 0}
        kind = self.graph.values[v].type
        axes = [tuple(inverse[e] if e >= 0 else e for e in c) for c in choices]
        return np.array([copy_bytes(kind, a, self.sizes, self.copied[v].along) for a in axes])

    # copies

    def add_copies(self) -> None:
        consumers = self.graph.consumers()
        self.sent: dict[tuple[int, int, int], tuple[Costs, int]] = {}
        for value in self.graph.values:
            v = value.id
            group = self.decisions.group_of[v]
            node = self.node_of[group]
            several = node >= 0 or bool(self.decisions.groups[group].hints)
            if not several or len(consumers[v]) < 2 or self.decisions.partial[v]:
                continue
            for readers in self.readers_together(group, consumers[v]):
                self.add_copy(v, node, readers)
        for (u, copy, _), (matrix, times) in self.sent.items():
            self.place(matrix, u, copy, times)

    def readers_together(
        self, group: int, readers: Sequence[tuple[int, int]]
    ) -> list[list[tuple[int, int]]]:
        """Readers in the same region, that decide for themselves.

        However far apart: XLA makes one gather of two that are alike, and keeps its result.
        """
        out: dict[int, list[tuple[int, int]]] = {}
        for c, k in readers:
            op = self.graph.ops[c]
            if not op.is_link and self.anchor_group(op) != group:
                out.setdefault(op.region, []).append((c, k))
        return [found for found in out.values() if len({c for c, _ in found}) > 1]

    def anchor_group(self, op: Op) -> int:
        anchor = self.decisions.anchors[op.id]
        if anchor is None:
            return -1
        side, k = anchor
        return self.decisions.group_of[(op.inputs if side == "operand" else op.outputs)[k]]

    def add_copy(self, v: int, node: int, readers: list[tuple[int, int]]) -> None:
        group = self.decisions.groups[self.decisions.group_of[v]]
        axes = self.member_axes(self.choices_of(group.id), group.members[v])
        shape = tuple(group.shape[m] if m >= 0 else 1 for m in group.members[v])
        key = ("copy choices", shape)
        if key not in self.cache:
            self.cache[key] = value_choices(shape, self.sizes)
        choices = self.cache[key]
        if len(choices) == 1:
            return
        region = self.graph.ops[readers[0][0]].region
        narrow = self.kept.narrow.issuperset(readers)
        whole = self.kept.of_value[v]
        nbytes = self.kept.sent(v, narrow)
        trips = self.trips[region]
        share = self.overlap.waited(v, readers[0][0], trips, nbytes)
        copy = self.copy_of(v, group, choices, readers, (trips, share, narrow))
        if narrow:
            self.narrow.add(copy)
        moved = self.moved(v)
        matrix = self.table.matrix(axes, choices, nbytes, trips, whole, share, moved)
        before = self.sent.get((node, copy, id(matrix)), (matrix, 0))
        self.sent[node, copy, id(matrix)] = matrix, before[1] + 1
        for reader in readers:
            self.copies[reader] = copy

    def copy_of(
        self,
        v: int,
        group: Group,
        choices: tuple[Axes, ...],
        readers: list[tuple[int, int]],
        price: tuple[Any, ...],
    ) -> int:
        """The node of a copy: one for all copies of values that are alike, for readers alike."""
        like = tuple((self.same[o], k) for o, k in readers) if self.same else v
        key = ("copy", group.id, group.members[v], price, like)
        if key not in self.cache:
            label = f"copy of {label_of(self.graph, self.producers, group)}"
            self.cache[key] = self.node(Meaning("copy", v, choices), label)
        copy: int = self.cache[key]
        return copy

    # operations

    def alike(self) -> list[int]:
        """Per operation the first one that costs the same, at every choice of the same nodes."""
        if not self.same:
            return list(range(len(self.graph.ops)))
        first: dict[Any, int] = {}
        return [first.setdefault(self.like(op), op.id) for op in self.graph.ops]

    def like(self, op: Op) -> tuple[Any, ...]:
        copies = tuple([self.copies.get((op.id, k), -1) for k in range(len(op.inputs))])
        early = [v for v in op.inputs if v in self.overlap.early]
        trips = self.trips[op.region]
        return (
            self.same[op.id],
            copies,
            *(self.overlap.waited(v, op.id, trips, self.kept.of_value[v]) for v in early),
        )

    def add_op(self, op: Op, times: int) -> tuple[int, tuple[Strategy, ...]]:
        """Price an operation, for all those that cost the same."""
        owner, table, own = self.strategies_of(op)
        cost = self.compute(op, table) * times
        if own:
            owner = self.node(Meaning("op", op.id, table), f"{op.name} {op.source}".strip())
        if owner < 0:
            self.constant += float(cost[0]) / PICO
        else:
            self.costs[owner] += cost
        for k, v in enumerate(op.inputs):
            if self.graph.values[v].type.size > 1 and self.graph.values[v].kind != "literal":
                self.connect(op, "operand", k, v, owner, table, times)
        for k, v in enumerate(op.outputs):
            if self.graph.values[v].type.size > 1:
                self.connect(op, "result", k, v, owner, table, times)
        return owner, table

    def strategies_of(self, op: Op) -> tuple[int, tuple[Strategy, ...], bool]:
        """(owner node or -1, strategy per choice of the owner, whether it needs its own node)."""
        groups = self.linear_groups(op)
        anchor = self.decisions.anchors[op.id]
        if op.effects:
            return -1, self.cache.setdefault("nowhere", ((-1,) * len(self.sizes),)), False
        if anchor is None:
            key: tuple[Any, ...] = ("strategies", id(op.rule), groups)
            if key not in self.cache:
                self.cache[key] = strategies(op.rule, self.sizes, groups)
            table = self.cache[key]
            return -1, table, len(table) > 1
        side, k = anchor
        v = (op.inputs if side == "operand" else op.outputs)[k]
        group = self.decisions.group_of[v]
        mapping = self.decisions.groups[group].members[v]
        choices = self.choices_of(group)
        key = ("table", id(op.rule), anchor, id(choices), mapping, groups)
        if key not in self.cache:
            dims = (op.rule.operands if side == "operand" else op.rule.results)[k]
            self.cache[key] = tuple(
                strategy_from(op.rule, dims, axes, self.sizes, groups[0] if groups else None)
                for axes in self.member_axes(choices, mapping)
            )
        return self.node_of[group], self.cache[key], False

    def linear_groups(self, op: Op) -> tuple[int, ...]:
        """Linear groups of operands that may all be partial, when the results may be too."""
        if op.name not in CARRIES:
            return ()
        return tuple(
            g
            for g, members in enumerate(op.rule.linear)
            if all(self.decisions.partial[op.inputs[k]] for k in members)
        )

    def compute(self, op: Op, table: tuple[Strategy, ...], updates: bool = True) -> Costs:
        """Of every strategy. updates: a product hands its result on as made, see `OpCost`."""
        traffic = self.fusion.traffic[op.id]
        once = op.id in self.kept.one_pass
        kind = (id(op.rule), id(traffic), once, *self.op_cost.marks(op))
        key = ("compute", *kind, id(table), self.trips[op.region], updates)
        if key not in self.cache:
            if not takes_time(op, traffic):
                self.cache[key] = np.zeros(len(table))
            else:
                known: dict[Strategy, float] = {}
                for s in table:
                    if s not in known:
                        known[s] = self.op_cost.seconds(op, s, updates)
                trips = self.trips[op.region] * PICO
                self.cache[key] = np.array([known[s] for s in table]) * trips
        out: Costs = self.cache[key]
        return out

    def apart(
        self,
        matrix: Costs,
        op: Op,
        table: tuple[Strategy, ...],
        wants: tuple[Axes, ...],
        axes: tuple[Axes, ...],
    ) -> Costs:
        """With what a product takes longer where its result is changed before it is read."""
        at = id(self.fusion.traffic[op.id]), self.trips[op.region], op.id in self.kept.one_pass
        key = ("apart", id(matrix), id(op.rule), id(table), id(wants), id(axes), *at)
        if key not in self.cache:
            more = np.round(self.compute(op, table, updates=False) - self.compute(op, table))
            changed = np.array([[PARTIAL in w or w != a for a in axes] for w in wants])
            longer = np.where(changed, more[:, None], 0.0)
            self.cache[key] = np.minimum(matrix + longer, INFINITY)
        out: Costs = self.cache[key]
        return out

    # edges

    def moved(self, v: int) -> Moved:
        return Moved(self.graph.values[v].shape, self.picked.get(v, 0))

    def member_axes(self, choices: tuple[Axes, ...], mapping: DimMap) -> tuple[Axes, ...]:
        """Choices of a group as shardings of one member."""
        if mapping == tuple(range(len(mapping))):
            return choices
        key = ("member", id(choices), mapping)
        if key not in self.cache:
            inverse = {d: i for i, d in enumerate(mapping) if d >= 0}
            self.cache[key] = tuple(tuple(inverse[e] if e >= 0 else e for e in c) for c in choices)
        out: tuple[Axes, ...] = self.cache[key]
        return out

    def wants(self, op: Op, side: str, k: int, table: tuple[Strategy, ...]) -> tuple[Axes, ...]:
        key = ("wants", id(op.rule), side, k, id(table))
        if key not in self.cache:
            at = 0 if side == "operand" else 1
            self.cache[key] = tuple([self.layouts.of(op.rule, s)[at][k] for s in table])
        out: tuple[Axes, ...] = self.cache[key]
        return out

    def connect(
        self,
        op: Op,
        side: str,
        k: int,
        v: int,
        owner: int,
        table: tuple[Strategy, ...],
        times: int,
    ) -> None:
        wants = self.wants(op, side, k, table)
        group = self.decisions.group_of[v]
        node = self.node_of[group]
        copy = self.copies.get((op.id, k), -1) if side == "operand" else -1
        if copy >= 0:
            node, axes = copy, self.meanings[copy].choices
        else:
            axes = self.member_axes(self.choices_of(group), self.decisions.groups[group].members[v])
        whole, kind = self.kept.of_value[v], self.graph.values[v].type
        trips = self.trips[op.region]
        if side == "operand":
            nbytes = self.kept.sent(v, (op.id, k) in self.kept.narrow)
            share = self.overlap.waited(v, op.id, trips, nbytes)
            matrix = self.table.matrix(axes, wants, nbytes, trips, whole, share, self.moved(v))
        else:
            kept, whole = whole, kind.nbytes  # made, and summed, as it is
            matrix = self.table.matrix(wants, axes, kept, trips, whole, value=self.moved(v))
            if self.fusion.traffic[op.id].update is not None:
                matrix = self.apart(matrix, op, table, wants, axes)
        self.place(matrix, *((node, owner) if side == "operand" else (owner, node)), times)

    def place(self, matrix: Costs, u: int, v: int, times: int = 1) -> None:
        """Add a cost matrix so often between two nodes, one of which may be absent or the same."""
        if times > 1:
            matrix = self.multiple(matrix, times)
        if u >= 0 and u == v:
            self.costs[u] += np.diagonal(matrix)
        elif u >= 0 and v >= 0:
            if matrix.any():
                self.edges.append(Edge(u, v, matrix))
        elif u >= 0:
            self.costs[u] += matrix[:, 0]
        elif v >= 0:
            self.costs[v] += matrix[0, :]
        else:
            self.constant += float(matrix[0, 0]) / PICO

    def multiple(self, matrix: Costs, times: int) -> Costs:
        key = ("multiple", id(matrix), times)
        if key not in self.cache:
            many = np.where(matrix < INFINITY, matrix * times, INFINITY)
            self.cache[key] = many, matrix  # which stays alive, so that its id stays its
        out: Costs = self.cache[key][0]
        return out
