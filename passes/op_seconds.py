"""How long does each operation take on one device?  To cut a function into parts as long as others.

Prices as those of a search, where there is one device and nothing to decide:
`op_seconds(graph, cluster)`.
"""

from __future__ import annotations

from typing import Any

from cost_models.cluster import Cluster
from passes.attention import NONE, attention
from passes.compiler import quotients_kept, tanh_bytes
from passes.fusion import fuse
from passes.ir.graph import Graph
from passes.ir.mesh import Mesh
from passes.meshes import links_of
from passes.op_cost import OpCost, takes_time
from passes.strategies import NOWHERE, Layouts

_ONE = Mesh(("model",), (1,))


def op_seconds(graph: Graph, cluster: Cluster, fused_attention: bool = False) -> tuple[float, ...]:
    """Seconds of each operation in one run of the function, by its number."""
    inside = attention(graph) if fused_attention else NONE
    fusion = fuse(graph, cluster.platform, inside, quotients_kept(cluster), tanh_bytes(cluster))
    cost = OpCost(graph, fusion, _ONE, cluster, links_of(cluster, _ONE), Layouts(_ONE.sizes))
    trips = [graph.trips(r.id) for r in graph.regions]
    known: dict[tuple[Any, ...], float] = {}
    out: list[float] = []
    for op in graph.ops:
        traffic = fusion.traffic[op.id]
        if not takes_time(op, traffic):
            out.append(0.0)
            continue
        key = id(op.rule), id(traffic), op.id in fusion.kept.one_pass, cost.marks(op)
        if key not in known:
            known[key] = cost.seconds(op, (NOWHERE,), updates=traffic.update is not None)
        out.append(known[key] * trips[op.region])
    return tuple(out)
