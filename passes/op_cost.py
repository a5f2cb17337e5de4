"""How many seconds does one operation take under a strategy, and which traffic does it pay?

A roofline over its local shapes, and the window overhang that neighbours send. A chain that XLA
fuses reads what its operations share once, and what never leaves the chain not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.cluster import Cluster
from cost_models.collectives import seconds
from cost_models.roofline import compute_seconds
from cost_models.topology import AxisLink
from passes.decisions import Decisions
from passes.ir.graph import Graph, Op, Type
from passes.ir.mesh import Mesh
from passes.ir.sharding import BROADCAST
from passes.liveness import Liveness
from passes.strategies import Axes, Layouts, Strategy, factor_parts, operand_axes, parts

MATRIX_OPS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"})


def op_seconds(
    graph: Graph,
    op: Op,
    strategy: Strategy,
    layouts: Layouts,
    mesh: Mesh,
    cluster: Cluster,
    links: Sequence[AxisLink],
    counted: frozenset[int],
) -> float:
    """Seconds of one run of an operation under a strategy: roofline, and halo exchange.

    counted: tensors (operands first, then results) whose memory traffic this operation pays.
    """
    rule, split = op.rule, parts(strategy, mesh.sizes)
    types = [graph.values[v].type for v in (*op.inputs, *op.outputs)]
    ins, outs = layouts.of(rule, strategy)
    moved = 0.0
    for k in counted:
        axes = ins[k] if k < len(ins) else outs[k - len(ins)]
        moved += types[k].nbytes / _shards(axes, mesh.sizes)
    if rule.moved is not None:  # a slice does not read all of its operand
        moved = min(moved, rule.moved / split) if rule.fuses else rule.moved / split
    flops = rule.flops / split
    time = compute_seconds(
        cluster.chip, flops, moved, types[0].dtype if types else "float32", op.name in MATRIX_OPS
    )
    return time + _halo_seconds(op, strategy, mesh, links, types)


def _shards(axes: Axes, sizes: Sequence[int]) -> int:
    out = 1
    for e, n in zip(axes, sizes, strict=True):
        if e > BROADCAST:
            out *= n
    return out


def _halo_seconds(
    op: Op, strategy: Strategy, mesh: Mesh, links: Sequence[AxisLink], types: Sequence[Type]
) -> float:
    """Seconds to fetch the window's overhang from the neighbours."""
    total = 0.0
    for f, n in factor_parts(strategy, mesh.sizes).items():
        factor = op.rule.factors[f]
        if not factor.halo:
            continue
        axis = strategy.index(f)
        for k, dims in enumerate(op.rule.operands):
            for d, dim in enumerate(dims):
                if f in dim:
                    axes = operand_axes(op.rule, k, strategy, mesh.sizes)
                    local = types[k].nbytes / _shards(axes, mesh.sizes)
                    # The halo is counted in the operand's elements along this dim.
                    share = local * min(1.0, factor.halo * n / types[k].shape[d])
                    total += seconds("permute", share, links[axis])
    return total


def counted_reads(graph: Graph, decisions: Decisions, live: Liveness) -> tuple[frozenset[int], ...]:
    """Per op the tensors whose traffic it pays: a fused chain reads what it shares only once."""
    seen: set[tuple[int, int, int]] = set()
    out = []
    for op in graph.ops:
        fused = op.rule.fuses
        counted = set()
        for k, v in enumerate(op.inputs):
            if graph.values[v].kind == "literal":
                continue
            if not fused:
                counted.add(k)
                continue
            key = (v, decisions.group_of[op.outputs[0]] if op.outputs else -1, op.region)
            if live.stored[v] and key not in seen:
                seen.add(key)
                counted.add(k)
        for k, v in enumerate(op.outputs):
            if live.stored[v] or not fused:
                counted.add(len(op.inputs) + k)
        out.append(frozenset(counted))
    return tuple(out)
