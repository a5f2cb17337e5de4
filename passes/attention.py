"""Where is attention, and which of its values would a fused kernel never store?

Attention is a product of queries and keys, a softmax of its rows, and a product with values:

    scores = q k^T;  weights = exp(scores - max) / sum;  out = weights v

A fused kernel (FlashAttention, arXiv 2205.14135) makes scores and weights a block at a time and
keeps none of them; of each row it keeps the sum. Backward it makes the scores again, from q and k.
`attention(graph)` finds every such place by its form, with its scaling, mask, conversions, dropout
and gradients, also where layers are scanned or computed again. What is *inside* are all values as
large as the scores that lie between its products.

A softmax whose product has no batch dims is none: a cross entropy over a vocabulary, for example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from passes.ir.graph import Graph, Op

# What may lie between the maximum of a row and its subtraction.
_SPREAD = frozenset(
    {
        "autoshard_annotate",
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "max",
        "optimization_barrier",
        "reshape",
        "select_n",
        "squeeze",
        "stop_gradient",
    }
)
_FAR = 24  # operations between one product and the other, at most


@dataclass(frozen=True, slots=True)
class Attention:
    """inside: values that a fused kernel never stores. again: products by id, of backward passes,
    before which it multiplies queries and keys once more. softmaxes: operations that begin one.
    """

    inside: frozenset[int] = frozenset()
    again: frozenset[int] = frozenset()
    softmaxes: tuple[int, ...] = ()


NONE = Attention()


def attention(graph: Graph) -> Attention:
    """Every attention of a graph."""
    return _Finder(graph).find()


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.values = graph, graph.values
        self.producers, self.consumers = graph.producers(), graph.consumers()
        self.inside: set[int] = set()
        self.sizes: set[int] = set()

    def find(self) -> Attention:
        first, softmaxes = set[int](), []
        for op in self.graph.ops:
            product = self._softmax(op)
            if product is not None:
                first.add(product.id)
                softmaxes.append(op.id)
                self.inside.add(product.outputs[0])
                self.sizes.add(self._size(product.outputs[0]))
        if not softmaxes:
            return NONE
        before = -1
        while before != len(self.inside):  # gradients join what they meet
            before = len(self.inside)
            self._forward()
            self._backward()
        again = {
            op.id
            for op in self.graph.ops
            if op.name == "dot_general" and op.outputs[0] in self.inside and op.id not in first
        }
        inside = frozenset(self.inside - set(self.graph.outputs))
        return Attention(inside, frozenset(again), tuple(softmaxes))

    # the softmax between two products

    def _softmax(self, op: Op) -> Op | None:
        """The product that makes the scores, if this is the `exp` of an attention's softmax."""
        if op.name != "exp" or self.producers[op.inputs[0]] < 0:
            return None
        less = self.graph.ops[self.producers[op.inputs[0]]]
        if less.name != "sub" or not self._is_maximum(less.inputs[1]):
            return None
        product = self._product_behind(less.inputs[0])
        return product if product is not None and self._meets_product(op.outputs[0]) else None

    def _is_maximum(self, v: int, depth: int = 8) -> bool:
        op = self.graph.ops[self.producers[v]] if self.producers[v] >= 0 else None
        if op is None or not depth:
            return False
        if op.name == "reduce_max":
            return True
        return op.name in _SPREAD and any(self._is_maximum(u, depth - 1) for u in op.inputs)

    def _product_behind(self, v: int, depth: int = _FAR) -> Op | None:
        """The product of which these are the elements, scaled, masked or converted."""
        if self.producers[v] < 0 or not depth:
            return None
        op = self.graph.ops[self.producers[v]]
        if _is_batched_product(op):
            return op
        if not op.rule.fuses or op.is_link:
            return None
        same = [u for u in op.inputs if self._size(u) == self._size(v)]
        found = (self._product_behind(u, depth - 1) for u in same)
        return next((product for product in found if product is not None), None)

    def _meets_product(self, v: int, depth: int = _FAR) -> bool:
        """Whether these elements, divided, dropped or converted, are multiplied in batches."""
        for c, _ in self.consumers[v]:
            op = self.graph.ops[c]
            if _is_batched_product(op):
                return True
            if op.rule.fuses and not op.is_link and depth:
                out = [u for u in op.outputs if self._size(u) == self._size(v)]
                if any(self._meets_product(u, depth - 1) for u in out):
                    return True
        return False

    # what lies inside

    def _forward(self) -> None:
        """What is computed from what is inside, and products whose result meets it."""
        for op in self.graph.ops:
            if op.is_link:
                pairs = zip(op.inputs, op.outputs, strict=False)
                self.inside.update(o for i, o in pairs if i in self.inside)
            elif op.rule.fuses and not self.inside.isdisjoint(op.inputs):
                self.inside.update(self._as_large(op.outputs))
            elif _is_batched_product(op) and self._joins(op.outputs[0]):
                self.inside.add(op.outputs[0])

    def _backward(self) -> None:
        """What is made for them alone: masks, what is broadcast along rows, and stacks of it."""
        for op in reversed(self.graph.ops):
            if not op.rule.fuses and not op.is_link:
                continue
            made = op.outputs if op.name == "scan_stack" else self._as_large(op.outputs)
            for v in made:
                readers = [self.graph.ops[c] for c, _ in self.consumers[v]]
                if readers and all(not self.inside.isdisjoint(r.outputs) for r in readers):
                    self.inside.add(v)

    def _joins(self, v: int, depth: int = 8) -> bool:
        """Whether a product's elements meet some that are inside."""
        if self._size(v) not in self.sizes:
            return False
        for c, _ in self.consumers[v]:
            op = self.graph.ops[c]
            if not op.rule.fuses or op.is_link:
                continue
            if not self.inside.isdisjoint(op.inputs):
                return True
            if depth and any(self._joins(u, depth - 1) for u in op.outputs):
                return True
        return False

    def _as_large(self, values: Iterable[int]) -> Iterator[int]:
        return (v for v in values if self._size(v) in self.sizes)

    def _size(self, v: int) -> int:
        return self.values[v].type.size


def _is_batched_product(op: Op) -> bool:
    if op.name != "dot_general":
        return False
    _, (batch, _) = op.params["dimension_numbers"]
    return bool(batch)
