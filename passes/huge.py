"""Which values of a body are huge: much larger than all that they are made of?

Scores of attention, logits over a vocabulary, the hidden layer of an FFN: a product *expands* where
its result has at least twice the elements of its operands together. So do a sum of what is cheap,
and a scatter into zeros (the gradient of a look-up). What is computed from such a
result element by element, or beside it, at half its size or more, is huge with it: probabilities,
their gradients, a mask that is spread over heads.

What is *cheap* is no reason to keep anything: a value that operations without a product make of
values half its size, its leaves (a causal mask of nothing at all, a row's maximum spread
over the row). It is made again wherever a part of it is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from passes.bodies import PLACED, RANDOM, Body
from passes.ir.graph import Graph, Op

PRODUCTS = ("conv_general_dilated", "dot_general")
_MAY_EXPAND = (*PRODUCTS, "reduce_", "scatter")
_EXPANDS = 2  # times the elements of all operands of a product
_AS_LARGE = 0.5  # of a huge value: what is huge with it
_SMALL = 0.5  # of a cheap value: all of its leaves together
PART = 1 / 256  # of the largest value of a program: what is cheap and smaller may be kept
BARRIER = "optimization_barrier"


@dataclass(frozen=True)
class Part:
    """A connected part of a body around huge values. units: places in the body, in order.

    root: the operation that expands first. values: those that are huge beside what it makes.
    """

    units: tuple[int, ...]
    root: int
    values: frozenset[int]


@dataclass(frozen=True)
class Huge:
    """What is huge in a body, in parts. leaves: of each cheap value."""

    parts: tuple[Part, ...]
    leaves: Mapping[int, tuple[int, ...]]

    @cached_property
    def values(self) -> frozenset[int]:
        """All huge values."""
        return frozenset().union(*(part.values for part in self.parts))


def is_plain(op: Op) -> bool:
    """Whether an operation can run on parts of its operands, as far as its kind tells.

    Random bits can where each element has its own (`autoshard.random_parts`).
    """
    drawn = op.name.startswith(RANDOM) and not (op.name == "random_bits" and op.rule.fuses)
    outside = op.name in PLACED or drawn or op.name == BARRIER
    return not (op.is_link or op.effects or outside)


def cheap_leaves(graph: Graph, body: Body) -> dict[int, tuple[int, ...]]:
    """Per cheap value of a body what it is made of."""
    out: dict[int, tuple[int, ...]] = {}
    sizes = [v.type.size for v in graph.values]
    for unit in body.units:
        if unit.op < 0:
            continue
        op = graph.ops[unit.op]
        if not op.rule.fuses or not is_plain(op) or len(op.outputs) != 1:
            continue
        leaves = {
            leaf: None
            for v in op.inputs
            if graph.values[v].kind != "literal"
            for leaf in out.get(v, (v,))
        }
        if sum(sizes[v] for v in leaves) <= _SMALL * sizes[op.outputs[0]]:
            out[op.outputs[0]] = tuple(leaves)
    return out


def find_huge(graph: Graph, body: Body) -> Huge:
    """The huge values of a body: those beside the largest first, which smaller ones leave alone."""
    found = _Finder(graph, body)
    parts = []
    for root in found.expanding():
        if root not in found.taken:
            parts.append(found.part(root))
    return Huge(tuple(sorted(parts, key=lambda part: part.units)), found.leaves)


def _expands(graph: Graph, op: Op, leaves: Mapping[int, tuple[int, ...]]) -> bool:
    if not is_plain(op) or not op.name.startswith(_MAY_EXPAND) or len(op.outputs) != 1:
        return False
    if op.name.startswith("scatter") and not any(map(op.rule.is_batch, op.rule.results[0])):
        return False  # the gradient of an embedding: a table as large as before
    made_of = {leaf for v in op.inputs for leaf in leaves.get(v, (v,))}
    size = graph.values[op.outputs[0]].type.size
    return size >= _EXPANDS * sum(graph.values[v].type.size for v in made_of)


class _Finder:
    """The parts of a body, one after the other. taken: operations of those found so far."""

    def __init__(self, graph: Graph, body: Body) -> None:
        self.graph = graph
        self.leaves = cheap_leaves(graph, body)
        self.ops = {u.op: k for k, u in enumerate(body.units) if u.op >= 0}
        self.producers, self.consumers = graph.producers(), graph.consumers()
        self.taken: set[int] = set()
        self.known: set[int] = set()  # huge values of other parts
        self.made_of: dict[int, list[int]] = {}
        for v, several in self.leaves.items():
            for leaf in several:
                self.made_of.setdefault(leaf, []).append(v)

    def expanding(self) -> list[int]:
        """Operations that expand, those with the largest results first."""
        found = [o for o in self.ops if _expands(self.graph, self.graph.ops[o], self.leaves)]
        return sorted(found, key=lambda o: (-self.size(self.graph.ops[o].outputs[0]), o))

    def size(self, v: int) -> int:
        return self.graph.values[v].type.size

    def part(self, root: int) -> Part:
        """What is huge beside what an operation makes, and all that touches it."""
        values = self.beside(root)
        ops = [o for o in self.ops if o not in self.taken and self.touches(o, values)]
        self.taken.update(ops)
        self.known |= values
        least = _AS_LARGE * self.size(self.graph.ops[root].outputs[0])
        begins = [o for o in ops if _expands(self.graph, self.graph.ops[o], self.leaves)]
        first = next(o for o in begins if self.size(self.graph.ops[o].outputs[0]) >= least)
        return Part(tuple(self.ops[o] for o in ops), first, frozenset(values))

    def beside(self, root: int) -> set[int]:
        """Values that are computed with what the root makes, at half its size or more.

        What is made of a huge value is not cheap: it is taken out of the leaves.
        """
        (made,) = self.graph.ops[root].outputs
        least = _AS_LARGE * self.size(made)
        values: set[int] = set()
        todo = [made]
        while todo:
            v = todo.pop()
            if v in values or v in self.leaves or v in self.known or self.size(v) < least:
                continue
            values.add(v)
            for u in self.made_of.get(v, ()):
                if self.leaves.pop(u, None) is not None:
                    todo.append(u)
            todo += self.next_to(v)
        return values

    def next_to(self, v: int) -> list[int]:
        """Values that operations make of one, or with it; none of one that comes from outside."""
        maker = self.producers[v]
        if maker not in self.ops or not is_plain(self.graph.ops[maker]):
            return []
        readers = [self.graph.ops[c] for c, _ in self.consumers[v] if c in self.ops]
        found = [u for op in readers if is_plain(op) for u in op.outputs]
        return [*found, *self.graph.ops[maker].inputs]

    def touches(self, o: int, values: Collection[int]) -> bool:
        op = self.graph.ops[o]
        touched = any(v in values for v in (*op.inputs, *op.outputs))
        return touched and is_plain(op) and not all(v in self.leaves for v in op.outputs)
