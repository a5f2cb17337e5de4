"""Which communication does a step wait for, and which runs beside its compute?

A gather of what is there before the program needs it (a weight, FSDP's gather in a scan) runs
beside the compute that comes before its use: only a share of it is waited for. Everything else
lies on the way from one operation to the next, and is waited for whole. A step takes its compute
and what it waits for; `Cost` has both bounds beside it, without any overlap and with all of it.
"""

from __future__ import annotations

from passes.ir.graph import Graph

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
# 0.0.42.1). Reductions and all-to-alls are all exposed there. No other platform has been examined:
# there a step is taken to wait for everything.
_WAITED = {"tpu": (0.25, 0.44)}


def early(graph: Graph) -> frozenset[int]:
    """Values of the state, which are there long before they are read."""
    found = {v.id for v in graph.values if v.kind in ("argument", "constant")}
    for op in graph.ops:
        if op.name in _HANDS_ON and op.inputs and op.inputs[0] in found:
            found.update(op.outputs)
    return frozenset(found)


def waited(platform: str, trips: float) -> float:
    """The share of the gather of an early value that a step waits for; trips: of its reader."""
    in_loop, outside = _WAITED.get(platform, (1.0, 1.0))
    return in_loop if trips > 1 else outside
