"""What would an expert have written?  Data parallel, FSDP, Megatron tensor parallel, and both.

Each baseline is a few hints on inputs and weights, spread by propagation and read back as one
choice per node of the Problem: so it is a point of the search space, priced by the same model.

  propagate  the user's hints alone, spread as GSPMD would
  dp         the batch split over every axis (Goyal et al., arXiv 1706.02677)
  fsdp       and every other input split along its longest dim (ZeRO-3, arXiv 1910.02054; FSDP)
  tp         weights split by columns, then by rows, then by columns (Megatron, arXiv 1909.08053;
             Redco's two rules, arXiv 2310.16355), over the last axis; the batch over the others
  fsdp+tp    fsdp over the first axis, tp over the last
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from passes.decisions import DimMap
from passes.ir.graph import Graph, Hint
from passes.ir.mesh import Mesh
from passes.ir.sharding import BROADCAST
from passes.priced import Priced
from passes.propagate import Wiring, propagate
from passes.solve.problem import INFINITY, Costs
from passes.strategies import Axes

BASELINES = ("dp", "fsdp", "tp", "fsdp+tp")


def baseline(
    name: str,
    priced: Priced,
    hints: Sequence[Hint],
    batch: Sequence[int],
    wiring: Wiring | None = None,
) -> list[int]:
    """One choice per node for a baseline; name: one of BASELINES or "propagate".

    batch: input values whose leading dim is the batch. wiring: of the graph, if it is at hand.
    """
    graph, mesh = priced.graph, priced.mesh
    seeds = list(hints)
    if name != "propagate":
        seeds += _SEEDS[name](graph, mesh, batch)
    spread = propagate(graph, mesh, seeds, wiring)
    return choose(priced, [s.axes for s in spread.shardings], name == "propagate")


def _batch_hints(
    graph: Graph, batch: Sequence[int], mesh: Mesh, axes: tuple[str, ...]
) -> list[Hint]:
    """The batch dim of the inputs split over these axes, as many as divide it."""
    out = []
    for v in batch:
        shape = graph.values[v].shape
        if not shape:
            continue
        used, parts = [], 1
        for axis in axes:
            size = mesh.as_dict()[axis]
            if shape[0] % (parts * size) == 0:
                used.append(axis)
                parts *= size
        if used:
            out.append(_soft(v, len(shape), {0: tuple(used)}, 0))
    return out


def _soft(v: int, rank: int, split: dict[int, tuple[str, ...]], priority: int) -> Hint:
    dims = tuple(split.get(d) for d in range(rank))
    return Hint(v, dims, "baseline", priority, hard=False)


def _dp(graph: Graph, mesh: Mesh, batch: Sequence[int]) -> list[Hint]:
    return _batch_hints(graph, batch, mesh, mesh.names)


def _fsdp_over(
    graph: Graph, mesh: Mesh, batch: Sequence[int], axes: tuple[str, ...], taken: dict[int, int]
) -> list[Hint]:
    """Every input that is no batch split along its longest free dim. taken: dims tp has split."""
    size = int(np.prod([mesh.as_dict()[a] for a in axes]))
    out = []
    for v in graph.inputs:
        shape = graph.values[v].shape
        dims = [d for d, n in enumerate(shape) if n % size == 0 and n >= size and d != taken.get(v)]
        if v not in batch and dims:
            longest = max(dims, key=lambda d: (shape[d], -d))
            # The lowest priority: weights are gathered where they meet activations.
            out.append(_soft(v, len(shape), {longest: axes}, 9))
    return out


def _fsdp(graph: Graph, mesh: Mesh, batch: Sequence[int]) -> list[Hint]:
    return _dp(graph, mesh, batch) + _fsdp_over(graph, mesh, batch, mesh.names, {})


def _tp(graph: Graph, mesh: Mesh, batch: Sequence[int]) -> list[Hint]:
    *others, last = mesh.names
    return _batch_hints(graph, batch, mesh, tuple(others)) + megatron(graph, mesh, last, batch)


def _fsdp_tp(graph: Graph, mesh: Mesh, batch: Sequence[int]) -> list[Hint]:
    if len(mesh.names) == 1:
        return _fsdp(graph, mesh, batch)
    first, last = mesh.names[:-1], mesh.names[-1]
    weights = megatron(graph, mesh, last, batch)
    taken = {
        h.value: next(d for d, axes in enumerate(h.dims) if axes)
        for h in weights
        if h.value in graph.inputs
    }
    return (
        _batch_hints(graph, batch, mesh, first)
        + weights
        + _fsdp_over(graph, mesh, batch, first, taken)
    )


_SEEDS: dict[str, Callable[[Graph, Mesh, Sequence[int]], list[Hint]]] = {
    "dp": _dp,
    "fsdp": _fsdp,
    "tp": _tp,
    "fsdp+tp": _fsdp_tp,
}


# Megatron's weights, by a walk


def megatron(graph: Graph, mesh: Mesh, axis: str, batch: Sequence[int]) -> list[Hint]:
    """Hints that split every weight matrix over one axis, columns and rows in turn.

    A forward walk: where a matmul meets an activation split along the contracted dim, the weight
    is split by rows and the result is whole again; where it meets a whole activation, by columns.
    """
    size = mesh.as_dict()[axis]
    weight = _weights(graph, batch)
    split: dict[int, int | None] = {}
    out: dict[int, Hint] = {}
    for op in graph.ops:
        sides = [weight[v] for v in op.inputs]
        if op.name == "dot_general" and sum(s is not None for s in sides) == 1:
            k = 0 if sides[0] is not None else 1
            _column_or_row(graph, op.id, k, size, axis, split, weight, out)
        else:
            _follow(graph, op.id, size, split)
    return list(out.values())


def _weights(graph: Graph, batch: Sequence[int]) -> list[int | None]:
    """Per value the input it is a mere view of (cast, transposed, sliced from a stack), or None."""
    out: list[int | None] = [None] * len(graph.values)
    for v in graph.inputs:
        if v not in batch:
            out[v] = v
    views = {"convert_element_type", "transpose", "reshape", "scan_slice", "loop_enter", "squeeze"}
    for op in graph.ops:
        if op.name in views or op.name == "copy":
            for v in op.outputs:
                out[v] = out[op.inputs[0]]
    return out


def _column_or_row(
    graph: Graph,
    o: int,
    k: int,
    size: int,
    axis: str,
    split: dict[int, int | None],
    weight: Sequence[int | None],
    out: dict[int, Hint],
) -> None:
    op = graph.ops[o]
    rule, w = op.rule, op.inputs[k]
    activation = rule.operands[1 - k]
    at = split.get(op.inputs[1 - k])
    theirs = set(activation[at]) if at is not None and at < len(activation) else set()
    dims = rule.operands[k]
    shape = graph.values[w].shape
    rows = [d for d, dim in enumerate(dims) if theirs & set(dim)]
    results = {f for dim in rule.results[0] for f in dim}
    columns = [
        d
        for d, dim in enumerate(dims)
        if dim and dim[0] in results and not set(dim) & {f for x in activation for f in x}
    ]
    root = weight[w]
    fresh = root is not None and root not in out
    chosen = rows or [d for d in columns if shape[d] % size == 0 and not theirs]
    if not chosen or shape[chosen[0]] % size:
        _follow(graph, o, size, split)
        return
    d = chosen[0]  # of columns as (head, feature) the heads
    if fresh:
        out[root if root is not None else w] = _soft(w, len(shape), {d: (axis,)}, 1)
    for r, dim in enumerate(rule.results[0]):
        if set(dim) & set(dims[d]):
            split[op.outputs[0]] = r


def _follow(graph: Graph, o: int, size: int, split: dict[int, int | None]) -> None:
    """Carry the split dim of an operand through an operation, where its rule lets it pass."""
    op = graph.ops[o]
    for k, v in enumerate(op.inputs):
        at = split.get(v)
        if at is None or at >= len(op.rule.operands[k]):
            continue
        for f in op.rule.operands[k][at][:1]:
            if not op.rule.splittable(f) or op.rule.factors[f].size % size:
                continue
            for out, dims in zip(op.outputs, op.rule.results, strict=True):
                for r, dim in enumerate(dims):
                    if dim and dim[0] == f:
                        split.setdefault(out, r)


# From shardings to a choice


def choose(priced: Priced, axes: Sequence[Axes], as_it_comes: bool = False) -> list[int]:
    """The choice nearest to these value shardings: groups as they say, operations as is cheapest.

    as_it_comes: operations split only as their tensors already are, as a partitioner that does not
    search would: they look at what is to be moved and not at what there is to compute.
    """
    choice = [0] * len(priced.meanings)
    fixed = [False] * len(priced.meanings)
    for group in priced.decisions.groups:
        node = priced.node_of_group[group.id]
        if node < 0:
            continue
        choices = {c: i for i, c in enumerate(priced.meanings[node].choices)}
        choice[node] = _nearest(choices, _wanted(group.members, axes))
        fixed[node] = True
    _settle(priced, choice, fixed, as_it_comes)
    return choice


def _wanted(members: Mapping[int, DimMap], axes: Sequence[Axes]) -> Axes:
    """What a group's members ask for; the first member that splits anything speaks."""
    best: Axes | None = None
    seen: set[tuple[Axes, DimMap]] = set()
    for v, mapping in members.items():
        if (axes[v], mapping) in seen:
            continue
        seen.add((axes[v], mapping))
        found = tuple(
            mapping[e] if 0 <= e < len(mapping) and mapping[e] >= 0 else BROADCAST for e in axes[v]
        )
        if best is None or sum(e >= 0 for e in found) > sum(e >= 0 for e in best):
            best = found
    assert best is not None, "a group has members"
    return best


def _nearest(choices: dict[Axes, int], wanted: Axes) -> int:
    """The same sharding, or the one that agrees on most axes."""
    if wanted in choices:
        return choices[wanted]
    return max(
        choices.items(),
        key=lambda c: (sum(a == b for a, b in zip(c[0], wanted, strict=True)), -c[1]),
    )[1]


def _settle(priced: Priced, choice: list[int], fixed: Sequence[bool], as_it_comes: bool) -> None:
    """Let every node that is not fixed take what is cheapest beside its neighbours, twice over."""
    problem = priced.problem
    around: list[list[tuple[int, Costs]]] = [[] for _ in choice]
    for edge in problem.edges:
        if not fixed[edge.u]:
            around[edge.u].append((edge.v, edge.costs))
        if not fixed[edge.v]:
            around[edge.v].append((edge.u, edge.costs.T))
    known = list(fixed)
    for _ in range(3):
        for node, free in enumerate(fixed):
            if free:
                continue
            own = problem.nodes[node].costs
            total = np.where(own < INFINITY, own * 1e-9, own) if as_it_comes else own.copy()
            for other, costs in around[node]:
                total += costs[:, choice[other]] if known[other] else costs.min(axis=1)
            choice[node] = int(total.argmin())
            known[node] = True
