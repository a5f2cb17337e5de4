"""Which communication does a step wait for, and which runs beside its compute?

A gather of what is there before the program needs it (a weight, FSDP's gather in a scan) runs
beside the compute that comes before its use: only a share of it is waited for, where there is as
much before, and what runs beside it takes longer. Everything else lies on the way from one
operation to the next, and is waited for whole. A step takes its compute and what it waits for;
`Cost` has both bounds beside it, without any overlap and with all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from cost_models.cluster import Cluster
from cost_models.roofline import peak_flops
from cost_models.topology import AxisLink
from passes.ir.graph import Graph
from passes.reshard import WHOLE, Waited

# What hands on a value of the state as it is, or converted.
_HANDS_ON = frozenset(
    {
        "convert_element_type",
        "copy",
        "loop_enter",
        "region_enter",
        "region_exit",
        "reshape",
        "scan_slice",
        "squeeze",
        "transpose",
    }
)

# The share of an early gather that a step waits for, inside a loop and outside. TPU: XLA gathers
# inside the kernels that run before (async fusions). In the compiled schedules of FSDP plans for
# v5e:4x4 (tests/accuracy) 0.21 to 0.31 of the gathers is exposed in four train steps that scan
# over layers, and 0.22 to 0.59, median 0.44, in seven that are unrolled (jax 0.10.2, libtpu
# 0.0.42.1). Reductions and all-to-alls are all exposed there. v5p and v6e, with the options of
# `passes.compiler`, hide about as much: 0.26 and 0.20 of all communication on average, v5e 0.23
# (docs/accuracy.md). No other platform has been examined: there a step is taken to wait for
# everything.
_WAITED = {"tpu": (0.25, 0.44)}


@dataclass(frozen=True, slots=True)
class Overlap:
    """early: values that are there long before they are read. before: per operation the seconds of
    arithmetic before it, at best. bandwidth: bytes/s of the quickest axis. in_loop, outside: the
    shares of their gathers that a step waits for. slows: seconds that each of these costs beside.
    """

    early: frozenset[int]
    before: tuple[float, ...]
    bandwidth: float
    in_loop: float
    outside: float
    slows: float

    def waited(self, value: int, reader: int, trips: float, nbytes: float) -> Waited:
        """What a step loses by a gather for an operation that runs so often."""
        if value not in self.early:
            return WHOLE
        if trips > 1:
            return Waited(self.in_loop, self.slows)
        enough = self.before[reader] >= nbytes / self.bandwidth
        return Waited(self.outside, self.slows) if enough else WHOLE


def overlap(graph: Graph, cluster: Cluster, devices: int, links: Sequence[AxisLink]) -> Overlap:
    """What may overlap in a program on a mesh with these links."""
    rate = devices * peak_flops(cluster.chip, "bfloat16")
    busy = accumulate(op.rule.flops * graph.trips(op.region) / rate for op in graph.ops)
    before = (0.0, *busy)[: len(graph.ops)]
    bandwidth = max((link.bandwidth for link in links), default=1.0)
    in_loop, outside = _WAITED.get(cluster.platform, (1.0, 1.0))
    slows = cluster.chip.fitted.gather_inside if cluster.chip.fitted else 0.0
    return Overlap(early(graph), before, bandwidth, in_loop, outside, slows)


def early(graph: Graph) -> frozenset[int]:
    """Values of the state, which are there long before they are read."""
    found = {v.id for v in graph.values if v.kind in ("argument", "constant")}
    for op in graph.ops:
        if op.name in _HANDS_ON and op.inputs and op.inputs[0] in found:
            found.update(op.outputs)
    return frozenset(found)
