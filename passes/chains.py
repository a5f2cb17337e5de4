"""Which neighbours can share a kernel?  By what they are, whatever it would cost.

An operation on elements (and what only moves them) can be computed inside its readers. On TPU a
product's kernel also runs the elementwise chain that follows it, keeps a row at hand while it finds
the row's maximum (the first half of a softmax), and computes chains of its operands on the fly. On
other platforms a product is a library call or a kernel like one, into which only moves, conversions
and a ReLU go.

What is said of TPU was seen in compiled programs (jax 0.10.2, libtpu 0.0.42.1). What is said of
other platforms is assumed; how much of it stays in memory was held against XLA:GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from passes.ir.graph import Graph, Op

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"})

# What a product's operand may pass on its way into a library call.
MOVES = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose"}
)
# XLA fuses nothing across it: what it is given is kept.
BARRIER = "optimization_barrier"
# What hands a value on as it is.
SAME = frozenset({"loop_enter", "region_enter", "region_exit", BARRIER})

# Roots that read one value are told apart up to this many; more makes no difference.
_MANY = 8


class Chains:
    """What a program's operations can share kernels with. nbytes: of values as they are kept."""

    def __init__(self, graph: Graph, nbytes: Sequence[int], tpu: bool) -> None:
        self.graph, self.nbytes, self.tpu = graph, nbytes, tpu
        self.values, self.consumers = graph.values, graph.consumers()
        self.producers = graph.producers()
        self.results = frozenset(graph.outputs)
        self.one_hot = frozenset(
            op.id for op in graph.ops if tpu and _is_one_hot(graph, op, self.producers)
        )

    def fuses(self, op: Op) -> bool:
        """Whether it is computed element by element, so that readers can do it themselves."""
        return (op.rule.fuses and not op.is_link) or op.id in self.one_hot

    def could_be_inline(self) -> list[bool]:
        """Per value whether all its readers can compute it by themselves."""
        return [self._could(v.id) for v in self.values]

    def _could(self, v: int) -> bool:
        if self.producers[v] < 0 or v in self.results or not self.consumers[v]:
            return False
        maker = self.graph.ops[self.producers[v]]
        if maker.name in SAME:
            return True
        if not (self.fuses(maker) or maker.name == "scan_slice") or maker.effects:
            return False
        return all(self._absorbs(self.graph.ops[c], maker) for c, _ in self.consumers[v])

    def _absorbs(self, op: Op, maker: Op) -> bool:
        """Whether a reader can compute the maker's result by itself."""
        if op.is_link:
            return op.name in ("region_exit", "scan_stack")
        if op.name == BARRIER:
            return False
        if op.name in PRODUCTS:
            return self.tpu or maker.name in MOVES or maker.is_link or self.clips(maker)
        # It computes the few elements that it picks: a loss's scores are not kept in float32 for
        # it (a forward pass of GPT on 8 H100; jax 0.10.2).
        if op.name == "gather" and not self.tpu:
            return True
        return self.fuses(op) or reduces(op)

    def clips(self, op: Op) -> bool:
        """Whether it is the larger of a value and a constant: a ReLU."""
        return op.name == "max" and any(self.values[v].kind == "literal" for v in op.inputs)

    def ends(self, could: Sequence[bool]) -> list[frozenset[int]]:
        """Per value the roots that would compute it, were all that can be computed in readers.

        could: as of `could_be_inline`.
        """
        ends: list[frozenset[int]] = [frozenset()] * len(self.values)
        for v in sorted(range(len(self.values)), key=lambda v: -self.producers[v]):
            if not could[v]:
                continue
            found: set[int] = set()
            for c, _ in self.consumers[v]:
                outs = self.graph.ops[c].outputs
                through = [u for u in outs if could[u]]
                found.update(*(ends[u] for u in through))
                if len(through) < len(outs) or not outs:
                    found.add(c)
                if len(found) >= _MANY:
                    break
            ends[v] = frozenset(found)
        return ends

    def after_product(self, op: Op) -> list[int]:
        """The values that follow a product inside its kernel, the last of which is kept."""
        chain = [op.outputs[0]]
        size = self.values[chain[0]].type.size
        soft = False
        while chain[-1] not in self.results:
            v = chain[-1]
            readers = sorted({c for c, _ in self.consumers[v]})
            after = self._only(readers) or self._after_maximum(v, readers)
            if after is None or not (self.fuses(after) or after.name == "region_exit"):
                break
            u = after.outputs[0]
            if len(after.outputs) != 1 or self.values[u].type.size != size:
                break
            others = [w for w in after.inputs if w != v]
            if not all(self._is_early(w, op.id, v) for w in others):
                break
            if any(self.values[w].type.size == size and self.is_given(w) for w in others):
                break
            chain.append(u)
            soft = soft or len(readers) > 1
        if not soft:  # what is widened only later is kept narrow
            least = min(self.nbytes[v] for v in chain)
            last = max(k for k, v in enumerate(chain) if self.nbytes[v] == least)
            del chain[last + 1 :]
        return chain

    def _only(self, readers: Sequence[int]) -> Op | None:
        return self.graph.ops[readers[0]] if len(readers) == 1 else None

    def _after_maximum(self, v: int, readers: Sequence[int]) -> Op | None:
        """The reader that goes on with v and the maximum of its rows, which the other finds."""
        if len(readers) != 2:
            return None
        first, second = (self.graph.ops[c] for c in readers)
        if first.name != "reduce_max" or not self.fuses(second) or len(second.inputs) != 2:
            return None
        other = [u for u in second.inputs if u != v]
        for _ in range(8):  # the maximum, broadcast, perhaps made finite
            if not other or self.producers[other[0]] < 0:
                return None
            maker = self.graph.ops[self.producers[other[0]]]
            if maker.id == first.id:
                return second
            if not self.fuses(maker):
                return None
            other = [u for u in maker.inputs if self.values[u].kind != "literal"]
        return None

    def is_given(self, v: int, depth: int = 8) -> bool:
        """Whether it is an argument, or computed from one element by element: part of an update.

        A gradient is summed over the batch's axes before it meets one, so the chain ends there.
        """
        if self.producers[v] < 0:
            return self.values[v].kind in ("argument", "constant")
        op = self.graph.ops[self.producers[v]]
        if not (self.fuses(op) or op.name in SAME or op.name == "scan_slice") or not depth:
            return False
        size = self.values[v].type.size
        if op.name == "scan_slice":
            return self.is_given(op.inputs[0], depth - 1)
        return any(
            self.values[u].type.size == size and self.is_given(u, depth - 1) for u in op.inputs
        )

    def _is_early(self, v: int, product: int, chained: int, depth: int = 8) -> bool:
        """Whether an operand of a chain is there when its product runs."""
        maker = self.producers[v]
        if v == chained or maker < product:
            return True
        op = self.graph.ops[maker]
        if chained in op.inputs and op.name == "reduce_max":
            return True
        early = self.fuses(op) or op.name in SAME or op.name == "scan_slice"
        return early and depth > 0 and all(
            self._is_early(u, product, chained, depth - 1) for u in op.inputs
        )  # fmt: skip


def reduces(op: Op) -> bool:
    """Whether it is a reduction of one operand."""
    return (
        not op.is_link
        and not op.rule.fuses
        and len(op.inputs) == 1
        and any(f.kind == "reduction" for f in op.rule.factors)
    )


def _is_one_hot(graph: Graph, op: Op, producers: Sequence[int]) -> bool:
    """Whether it adds one element to each row of zeros: the gradient of picking one from each."""
    if op.name != "scatter-add" or producers[op.inputs[0]] < 0:
        return False
    zeros = graph.ops[producers[op.inputs[0]]]
    table, updates = (graph.values[op.inputs[k]].type for k in (0, 2))
    rows = [n for d, n in enumerate(table.shape) if table.size == n * updates.size]
    return zeros.name == "broadcast_in_dim" and bool(rows) and updates.size > 1
