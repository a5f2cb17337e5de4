"""Which gradients wait until the backward pass is over, as XLA:TPU makes new state last?

A scheduler that hides latencies works from the end of a program to its start. XLA's takes first
what lets most others follow (`kCreatesMoreReadyNodes` of its latency_hiding_scheduler.cc): new
state, then the sum over devices that it is made of. So new state comes behind the last product that
another product waits for, and until then every whole gradient lies there, as a device made it or
summed. The products themselves stay about where they were traced. A program is scheduled so where
it gathers inside kernels (`passes.ahead`). Where it does not, it runs in an order that needs little
memory, each new state behind its own sum. A gradient that needs no sum is made in one kernel with
its new state (MLP as TP), and is not counted.

Seen outside loops, in steps split as FSDP, for v5e, and for v5p and v6e with the options that a
plan carries: MLPs of 4 to 24 layers and batches of 16384 to 65536, of 64 MiB a gradient, where all
new state comes after all products but at most the last two; pairs of products with a residual, and
Transformers, both of 4 and 8 layers (v5p). With a batch of 65536 for v6e two updates of six follow
their sums at once; why is not known. Not so without those options (v5e, v5p), nor where all weights
lie whole (v5e, v6e). Where a program that is no plan of ours has XLA gather weights once more for
the backward pass (8 layers of two products and a GELU, split by hand), new state is made between
those gathers. (jax 0.10.2, libtpu 0.0.42.1.)
"""

from __future__ import annotations

from passes.chains import PRODUCTS
from passes.ir.graph import Graph


def updated_last(graph: Graph) -> dict[int, int]:
    """Products outside loops that no other product waits for: each with the one it is used after.

    That is the last product outside loops that another product waits for; there may be none.
    """
    consumers = graph.consumers()
    awaited, free = set[int](), list[int]()  # what a product waits for, and products none waits for
    last = -1
    for op in reversed(graph.ops):
        readers = [c for v in op.outputs for c, _ in consumers[v]]
        product = op.name in PRODUCTS and not op.region
        if any(c in awaited or graph.ops[c].name in PRODUCTS for c in readers):
            awaited.add(op.id)
            last = max(last, op.id if product else -1)
        elif product:
            free.append(op.id)
    return {o: last for o in free if o < last}
