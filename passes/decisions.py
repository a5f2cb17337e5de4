"""What is there to decide?  Values that share one sharding, operations that choose a strategy.

Values joined by operations that keep every splittable dim (elementwise, transposes) and where a
change of sharding between them gains nothing are *tied*: they share one decision, up to a map of
dims. An operation's strategy follows from the sharding of one of its tensors (its *anchor*) when
that tensor has all its splittable factors; the others (matmuls, gathers, convolutions) are
decisions of their own. So a chain of forty elementwise operations in an optimizer is one decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from passes.ir.graph import Graph, Hint, Op
from passes.ir.rule import Rule

DimMap = tuple[int, ...]  # per dim of a value the dim of its decision, or -1


@dataclass(frozen=True, slots=True)
class Group:
    """Values that share one sharding. shape: lengths of the dims they have in common.

    members: per value the map of its dims to these. partial: whether an axis may stay partial on
    them. fixed: per dim the axis names a hard hint wants, or None where open.
    """

    id: int
    shape: tuple[int, ...]
    members: Mapping[int, DimMap]
    partial: bool
    fixed: tuple[tuple[str, ...] | None, ...]
    hints: tuple[Hint, ...]


@dataclass(frozen=True, slots=True)
class Decisions:
    """group_of: per value its group. anchor: per op ("operand" | "result", k), or None if free."""

    groups: tuple[Group, ...]
    group_of: tuple[int, ...]
    anchors: tuple[tuple[str, int] | None, ...]
    partial: tuple[bool, ...]


def decide(graph: Graph, hints: Sequence[Hint] = ()) -> Decisions:
    """Group the values of a graph and anchor its operations."""
    partial = _partial_values(graph)
    forest = _Forest(graph, partial, [h for h in hints if h.hard])
    for a, b in graph.ties:
        forest.tie(a, b, tuple(range(len(graph.values[a].shape))))
    ties = _Ties(graph)
    for op in graph.ops:
        for k in ties.operands(op):
            mapping = _same_dims(op.rule, k)
            if mapping is None:
                continue
            # A slice or a pad keeps some dims and forbids others: tying would forbid them to all.
            shape = graph.values[op.inputs[k]].shape
            lost = any(n > 1 and m < 0 for n, m in zip(shape, mapping, strict=True))
            if op.is_link or not lost:
                forest.tie(op.inputs[k], op.outputs[0], mapping)
    groups, group_of = forest.groups()
    anchors = tuple(_anchor(op) for op in graph.ops)
    return Decisions(groups, group_of, anchors, partial)


def _reader_counts(graph: Graph) -> list[int]:
    readers = [0] * len(graph.values)
    for op in graph.ops:
        for v in set(op.inputs):
            readers[v] += 1
    for v in graph.outputs:
        readers[v] += 1
    return readers


class _Ties:
    """Which operands of an operation share its result's sharding; operations come in order.

    One that nobody else reads; and the only large one, when it is itself a step of such a chain.
    What a residual stream carries is neither: there a change of sharding can pay (the switch
    between the spatial and the temporal blocks of a video transformer, DSP, arXiv 2403.10266). Such
    code transposes the stream, and there its chain ends: one move of the sum is cheaper than one
    move of each of its terms.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.readers = _reader_counts(graph)
        self.spread = [v.kind == "literal" for v in graph.values]  # made from nothing, or from less
        self.chained = [False] * len(graph.values)
        self.stream = [False] * len(graph.values)  # a sum of several large operands, and its chain

    def operands(self, op: Op) -> list[int]:
        """Operand indices to tie to the result."""
        if not op.rule.fuses or len(op.outputs) != 1 or op.name == "loop_enter":
            return []
        out = op.outputs[0]
        size = self.graph.values[out].type.size
        arrays = [k for k, v in enumerate(op.inputs) if self.graph.values[v].type.size > 1]
        self.spread[out] = op.name in ("broadcast_in_dim", "iota") or (
            bool(arrays) and all(self.spread[op.inputs[k]] for k in arrays)
        )
        if len(arrays) == 1 or op.name in ("scan_slice", "scan_stack"):
            self.chained[out] = not op.is_link
            self.stream[out] = bool(arrays) and self.stream[op.inputs[arrays[0]]]
            return [] if self.stream[out] and op.name == "transpose" else arrays
        large = [
            k
            for k in arrays
            if self.graph.values[op.inputs[k]].type.size == size and not self.spread[op.inputs[k]]
        ]
        alone = [k for k in arrays if self.readers[op.inputs[k]] == 1]
        if len(large) != 1:
            self.stream[out] = len(large) > 1
            return alone
        self.chained[out] = True
        self.stream[out] = self.stream[op.inputs[large[0]]]
        tie = alone + large if self.chained[op.inputs[large[0]]] else alone
        return list(dict.fromkeys(tie))


def _same_dims(rule: Rule, k: int) -> DimMap | None:
    """Operand dim to result dim, when both have the same splittable factors; else None."""
    result = {}
    for d, dim in enumerate(rule.results[0]):
        long = [f for f in dim if rule.splittable(f)]
        if len(long) > 1 or (long and len([f for f in dim if rule.factors[f].size > 1]) > 1):
            return None
        if long:
            result[long[0]] = d
    out = []
    for dim in rule.operands[k]:
        long = [f for f in dim if rule.splittable(f)]
        if len(long) > 1 or any(f not in result for f in long):
            return None
        if long and len([f for f in dim if rule.factors[f].size > 1]) > 1:
            return None
        out.append(result.pop(long[0]) if long else -1)
    return None if result else tuple(out)


def _anchor(op: Op) -> tuple[str, int] | None:
    """The tensor that has every splittable factor in a place where it can be split, if any."""
    needed = {f for f in range(len(op.rule.factors)) if op.rule.splittable(f)}
    sides = [("result", k, t) for k, t in enumerate(op.rule.results)]
    sides += [("operand", k, t) for k, t in enumerate(op.rule.operands)]
    for side, k, dims in sides:
        if needed <= {f for dim in dims for f in dim}:
            return side, k
    return None


def _partial_values(graph: Graph) -> tuple[bool, ...]:
    """Values worth keeping partial: on their way from a reduction to a sum of several of them.

    Such a sum needs one all-reduce instead of several.
    """
    can = [False] * len(graph.values)
    for op in graph.ops:
        if op.is_link or op.effects:
            continue
        splits = any(
            f.kind == "reduction" and f.op == "add" and f.size > 1 for f in op.rule.factors
        )
        passes_on = _sums(op) and all(can[v] for v in op.inputs)
        for v in op.outputs:
            can[v] = splits or passes_on
    for v in (*graph.inputs, *graph.outputs):
        can[v] = False
    worth = [False] * len(graph.values)
    for op in reversed(graph.ops):
        if not _sums(op) or not can[op.outputs[0]] or not all(can[v] for v in op.inputs):
            continue
        if len(op.inputs) > 1 or worth[op.outputs[0]]:
            for v in op.inputs:
                worth[v] = True
    return tuple(worth)


# What a partial value may pass on its way to a sum: XLA moves all-reduces over these and merges
# those of a sum's operands (its all-reduce reassociation), so that the lowering needs no more than
# to leave such values unconstrained.
CARRIES = frozenset({"add", "add_any", "sub", "neg", "copy", "transpose", "reshape", "squeeze"})


def _sums(op: Op) -> bool:
    return op.name in CARRIES and bool(op.rule.linear)


class _Forest:
    """Union-find over values; each root knows how its members' dims map to its own."""

    def __init__(self, graph: Graph, partial: Sequence[bool], hints: Sequence[Hint]) -> None:
        self.graph = graph
        self.partial = partial
        self.parent = list(range(len(graph.values)))
        self.map: list[DimMap] = [tuple(range(len(v.shape))) for v in graph.values]
        # Per root the dims that all its members have: only these may be split.
        self.common = [frozenset(m) for m in self.map]
        self.hints: dict[int, list[Hint]] = {}
        for h in hints:
            self.hints.setdefault(h.value, []).append(h)

    def root(self, v: int) -> tuple[int, DimMap]:
        """The root of v, and the map from v's dims to the root's."""
        path = []
        while self.parent[v] != v:
            path.append(v)
            v = self.parent[v]
        mapping: DimMap = tuple(range(len(self.graph.values[v].shape)))
        for u in reversed(path):
            mapping = tuple(mapping[d] if d >= 0 else -1 for d in self.map[u])
            self.parent[u], self.map[u] = v, mapping
        return v, (mapping if path else tuple(range(len(self.graph.values[v].shape))))

    def tie(self, a: int, b: int, mapping: DimMap) -> None:
        """Let a share b's sharding, a's dim i being b's dim mapping[i]; no-op where it can't."""
        if self.partial[a] != self.partial[b]:
            return
        root_a, of_a = self.root(a)
        root_b, of_b = self.root(b)
        if root_a == root_b:
            return
        inverse = {r: i for i, r in enumerate(of_a) if r >= 0}
        # root_a's dims, through a and b, to root_b's
        new = tuple(
            of_b[mapping[inverse[d]]] if d in inverse and mapping[inverse[d]] >= 0 else -1
            for d in range(len(self.graph.values[root_a].shape))
        )
        common = self.common[root_b] & {new[d] for d in self.common[root_a]}
        if self.forbids(root_a, {d for d, e in enumerate(new) if e in common}) or self.forbids(
            root_b, common
        ):
            return
        moved = [
            Hint(root_b, _moved(h.dims, new, len(self.graph.values[root_b].shape)), h.origin)
            for h in self.hints.get(root_a, ())
        ]
        here = self.hints.get(root_b, [])
        if moved and here and _together(moved) != _together(here):
            return  # hints that differ: each keeps its own decision
        if root_a in self.hints:
            self.hints.setdefault(root_b, []).extend(moved)
        self.parent[root_a], self.map[root_a] = root_b, new
        self.common[root_b] = common

    def forbids(self, root: int, common: Set[int]) -> bool:
        """Whether a hint wants to split a dim of this root that is not among these."""
        hints = self.hints.get(root, ())
        return any(axes and d not in common for h in hints for d, axes in enumerate(h.dims))

    def groups(self) -> tuple[tuple[Group, ...], tuple[int, ...]]:
        members: dict[int, dict[int, DimMap]] = {}
        for v in range(len(self.parent)):
            root, mapping = self.root(v)
            members.setdefault(root, {})[v] = mapping
        groups: list[Group] = []
        group_of = [0] * len(self.parent)
        for root, found in members.items():
            rank, common = len(self.graph.values[root].shape), self.common[root]
            shape = tuple(
                n if d in common else 1 for d, n in enumerate(self.graph.values[root].shape)
            )
            hints = tuple(self.hints.get(root, ()))
            fixed = _together(hints) if hints else (None,) * rank
            for v in found:
                group_of[v] = len(groups)
            groups.append(Group(len(groups), shape, found, self.partial[root], fixed, hints))
        return tuple(groups), tuple(group_of)


def _together(hints: Sequence[Hint]) -> tuple[tuple[str, ...] | None, ...]:
    """What several hints ask of one value: per dim the first that does not leave it open.

    An axis splits one dim only; propagation names the hints that contradict each other.
    """
    out: list[tuple[str, ...] | None] = []
    for dim in zip(*(h.dims for h in hints), strict=True):
        wanted = next((e for e in dim if e is not None), None)
        taken = {a for e in out for a in e or ()}
        out.append(None if taken & set(wanted or ()) else wanted)
    return tuple(out)


def _moved(
    dims: tuple[tuple[str, ...] | None, ...], mapping: DimMap, rank: int
) -> tuple[tuple[str, ...] | None, ...]:
    out: list[tuple[str, ...] | None] = [None] * rank
    for d, entry in enumerate(dims):
        if mapping[d] >= 0:
            out[mapping[d]] = entry
    return tuple(out)
