"""How long does each operation take on one device?  To cut a function into parts as long as others.

Prices as those of a search, without any sharding: `op_seconds(graph, cluster)`.
"""

from __future__ import annotations

from cost_models.cluster import Cluster
from passes.answer import read_back
from passes.attention import NONE, attention
from passes.compiler import quotients_kept, tanh_bytes
from passes.decisions import decide
from passes.fusion import fuse
from passes.ir.graph import Graph
from passes.ir.mesh import Mesh
from passes.liveness import liveness
from passes.price import price

_ONE = Mesh(("model",), (1,))


def op_seconds(graph: Graph, cluster: Cluster, fused_attention: bool = False) -> tuple[float, ...]:
    """Seconds of each operation in one run of the function, by its number."""
    inside = attention(graph) if fused_attention else NONE
    fusion = fuse(graph, cluster.platform, inside, quotients_kept(cluster), tanh_bytes(cluster))
    live = liveness(graph, fusion.stored)
    priced = price(graph, _ONE, cluster, decide(graph, ()), live, fusion, float("inf"), ())
    return read_back(priced, [0] * len(priced.problem.nodes)).seconds
