"""Which gradients does a scheduler that hides latencies leave for last?

XLA's latency hiding scheduler works from the end of a program to its start, and fills the time that
a collective takes with what is ready, such as the product that gives a weight's gradient. So where
the pass itself exchanges something, rows picked of tables or sums over the batch that it normalizes
by, gradients of weights are made last, beside such exchanges and their own sums. Until then what
they multiply lies in memory: what each layer kept, and the gradient of what the layer gave. That
holds for each stretch of a program between its loops; in a loop's body gradients wait for their
stack. Gradients of tables, which are added to zeros, come behind those of weights. One as large as
half of what is summed at once has a sum of its own, and is made before it.

Seen on H100, and not on A100: unrolled steps of DLRM, GPT, RetNet and convolutional nets, by their
compiled programs (jax 0.10.2). In MLPs and ViT, which exchange nothing else, some gradients are
made late, too, beside the sums of others: from none to all of them, by rules that were not found.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Set

from passes.chains import PRODUCTS, reduces
from passes.ir.graph import LOOPS, Graph, Op

# Bytes that XLA:GPU sums at once: its default of xla_gpu_all_reduce_combine_threshold_bytes.
_AT_ONCE = 30 << 20


def run_last(graph: Graph, filled: Set[int]) -> dict[int, float]:
    """Operations outside loops that run at the end of their stretch: behind which place there.

    They are products and additions to zeros that only results wait for, what is computed for them
    alone, and what waits for them in the same stretch. filled: constants that are made as arrays.
    """
    consumers, producers = graph.consumers(), graph.producers()
    returned = set(graph.outputs)
    behind, late = set[int](), set[int]()  # no product waits; a gradient, or only for gradients
    for op in reversed(graph.ops):
        if op.region or op.effects or op.is_link:
            continue
        readers = [c for v in op.outputs for c, _ in consumers[v]]
        product = op.name in PRODUCTS
        if product and graph.values[op.outputs[0]].type.nbytes > _AT_ONCE / 2:
            continue
        gives = product or adds(op, filled)
        if behind.issuperset(readers) and (readers or returned.intersection(op.outputs)):
            (late if gives else behind).add(op.id)
        elif readers and not gives and late.issuperset(readers):
            late.add(op.id)
    tables = any(adds(graph.ops[o], filled) for o in late)
    if not tables and not _normalizes_the_batch(graph):
        return {}
    starts = [r.begin for r in graph.regions if r.id and not r.parent and r.kind in LOOPS]
    ends = [_end(starts, op, len(graph.ops)) for op in graph.ops]
    for op in graph.ops:
        made = [producers[v] for v in op.inputs]
        if op.id in behind and any(m in late and ends[m] == ends[op.id] for m in made):
            late.add(op.id)
    place = dict[int, float]()
    for o in sorted(late):
        op = graph.ops[o]
        second = adds(op, filled) or any(place.get(producers[v], 0) % 1 > 0.5 for v in op.inputs)
        place[o] = ends[o] - 1 + (second + (o + 1) / (len(graph.ops) + 1)) / 2
    return place


def adds(op: Op, filled: Set[int]) -> bool:
    """Whether it adds to zeros: the gradient of a table."""
    return op.name == "scatter-add" and op.inputs[0] in filled


def _normalizes_the_batch(graph: Graph) -> bool:
    """Whether a product waits for a reduction over the first dim of a value, other than to one."""
    consumers = graph.consumers()
    before = set[int]()  # operations that a product waits for
    for op in reversed(graph.ops):
        readers = [c for v in op.outputs for c, _ in consumers[v]]
        if any(c in before or graph.ops[c].name in PRODUCTS for c in readers):
            before.add(op.id)
            if reduces(op) and not op.region and graph.values[op.outputs[0]].type.size > 1:
                dims = op.rule.operands[0]
                if dims and dims[0] not in op.rule.results[0]:
                    return True
    return False


def _end(starts: list[int], op: Op, last: int) -> int:
    """The first operation of the next loop outside loops, or one past all."""
    at = bisect_right(starts, op.id)
    return starts[at] if at < len(starts) else last
