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
# What only says how a value lies; nothing is left of it in a compiled program.
SAYS = frozenset({"autoshard_annotate", "sharding_constraint"})

# Which place is sought, and what stands there.
_PLACES = {"argmax": "reduce_max", "argmin": "reduce_min"}

# Roots that read one value are told apart up to this many; more makes no difference.
_MANY = 8
# Operations between two places of a product's chain where all of it is one value: of GELU's
# gradient there are a dozen.
_LONG = 32
# Elements of a row of which a kernel finds the maximum before it goes on.
_ROW = 8192


class Chains:
    """What a program's operations can share kernels with. nbytes: of values as they are kept."""

    def __init__(self, graph: Graph, nbytes: Sequence[int], tpu: bool) -> None:
        self.graph, self.nbytes, self.tpu = graph, nbytes, tpu
        self.values, self.consumers = graph.values, graph.consumers()
        self.producers = graph.producers()
        self.results = frozenset(graph.outputs)
        self.carried = frozenset(carry for carry, _ in graph.ties)
        self.one_hot = frozenset(
            op.id for op in graph.ops if tpu and _is_one_hot(graph, op, self.producers)
        )

    def fuses(self, op: Op) -> bool:
        """Whether it is computed element by element, so that readers can do it themselves."""
        return (op.rule.fuses and not op.is_link) or op.id in self.one_hot

    def hands_on(self, op: Op) -> bool:
        """Whether its result is its operand, with no kernel to make it.

        What says how a value lies does so on other platforms than TPU where the value is there:
        at the end of a chain it stands for the kernel that ends there.
        """
        if op.name in SAME:
            return True
        if op.name not in SAYS or self.tpu or self.results.intersection(op.outputs):
            return False
        maker = self.producers[op.inputs[0]]
        if maker < 0:
            return True
        made = self.graph.ops[maker]
        return self.hands_on(made) or not self.fuses(made)

    def could_be_inline(self) -> list[bool]:
        """Per value whether all its readers can compute it by themselves."""
        return [self._could(v.id) for v in self.values]

    def _could(self, v: int) -> bool:
        if self.producers[v] < 0 or v in self.results or not self.consumers[v]:
            return False
        maker = self.graph.ops[self.producers[v]]
        if self.hands_on(maker):
            return True
        if not (self.fuses(maker) or maker.name == "scan_slice") or maker.effects:
            return False
        return all(self._absorbs(self.graph.ops[c], maker) for c, _ in self.consumers[v])

    def _absorbs(self, op: Op, maker: Op) -> bool:
        """Whether a reader can compute the maker's result by itself."""
        if op.name == "loop_enter":
            return maker.name == "broadcast_in_dim" and self._enters_narrow(maker, op)
        if op.is_link:
            return op.name in ("region_exit", "scan_stack")
        if op.name == BARRIER:
            return False
        if op.name in SAYS and self.hands_on(op):
            readers = self.consumers[op.outputs[0]]
            return all(self._absorbs(self.graph.ops[c], maker) for c, _ in readers)
        if op.name in PRODUCTS:
            return self.tpu or maker.name in MOVES or maker.is_link or self.clips(maker)
        # It computes the few elements that it picks: a loss's scores are not kept in float32 for
        # it (a forward pass of GPT on 8 H100; jax 0.10.2).
        if op.name == "gather" and not self.tpu:
            return True
        return self.fuses(op) or reduces(op)

    def _enters_narrow(self, spread: Op, enter: Op) -> bool:
        """Whether what is spread out before a loop is spread out inside.

        By XLA:GPU and XLA:CPU constants only (the -inf of a mask, in a forward pass of GPT on 8
        H100; jax 0.10.2).
        """
        constant = self._is_constant(spread.inputs[0]) and enter.outputs[0] not in self.carried
        return self._widens(spread) and (self.tpu or constant)

    def _is_constant(self, v: int) -> bool:
        maker = self.producers[v]
        if maker >= 0 and self.graph.ops[maker].name == "convert_element_type":
            return self._is_constant(self.graph.ops[maker].inputs[0])
        return self.values[v].kind == "literal"

    def _widens(self, op: Op) -> bool:
        given, made = (self.values[v].type.size for v in (op.inputs[0], op.outputs[0]))
        return made > given

    def clips(self, op: Op) -> bool:
        """Whether it is the larger of a value and a constant: a ReLU."""
        return op.name == "max" and self._has_constant(op)

    def is_sign(self, v: int) -> bool:
        """Whether it says where a value is above or below a constant."""
        op = self.graph.ops[self.producers[v]] if self.producers[v] >= 0 else None
        return op is not None and op.name in ("gt", "lt", "ge", "le") and self._has_constant(op)

    def _has_constant(self, op: Op) -> bool:
        return any(self.values[v].kind == "literal" for v in op.inputs)

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

    def after_product(self, op: Op) -> tuple[list[int], bool]:
        """The values that follow a product inside its kernel, the last of which is kept.

        Each step takes in what reads the last value, up to where all of it meets in one value. The
        second result says whether it is a softmax's exponentials that are kept.
        """
        chain = [op.outputs[0]]
        ends = [0]  # places in the chain where nothing else is alive
        while chain[-1] not in self.results:
            soft = self._softmax(chain)
            if soft:
                return chain + soft, True
            step = self._next(chain[-1], op)
            if not step:
                break
            chain += step
            ends.append(len(chain) - 1)
        # What is widened only later is kept narrow.
        least = min(self.nbytes[chain[k]] for k in ends)
        return chain[: 1 + max(k for k in ends if self.nbytes[chain[k]] == least)], False

    def _next(self, v: int, product: Op) -> list[int]:
        """The values made of v by operations on elements, until one is made of all that was."""
        size = self.values[v].type.size
        inside = {v: None}
        waiting = sorted({c for c, _ in self.consumers[v]})
        while waiting and len(inside) <= _LONG:
            op = self.graph.ops[waiting.pop(0)]
            if not (self.fuses(op) or op.name == "region_exit") or len(op.outputs) != 1:
                return []
            u = op.outputs[0]
            if self.values[u].type.size != size:
                return []
            for w in op.inputs:
                if w in inside:
                    continue
                if not self._is_early(w, product.id):
                    return []
                if self.values[w].type.size == size and self.is_given(w):
                    return []
            inside[u] = None
            if not waiting:
                return [w for w in inside if w != v]
            if u in self.results:
                return []
            waiting = sorted({*waiting, *(c for c, _ in self.consumers[u])})
        return []

    def _softmax(self, chain: Sequence[int]) -> list[int]:
        """The end of a chain less the maximum of its rows, and exp of that, which is kept instead.

        XLA:TPU keeps a row at hand while it finds the maximum, up to 8192 elements of it, where the
        scores are just as the product makes them, or where the softmax is made narrower in the end;
        not where they are scaled or masked and stay float32 or bfloat16 throughout, nor where they
        are transposed (attentions of 197 to 16384 places on v5e, v5p, v6e; jax 0.10.2, libtpu
        0.0.42.1). Dims of one may change places: jax.nn.dot_product_attention moves one, and its
        exponentials are kept on all three. A lone product of two dims, which it does not treat so,
        is not told apart.
        """
        v = chain[-1]
        readers = sorted({c for c, _ in self.consumers[v]})
        if len(readers) != 2 or self.graph.ops[readers[0]].name != "reduce_max":
            return []
        first, second = (self.graph.ops[c] for c in readers)
        rows = self.values[first.outputs[0]].type.size
        if second.name != "sub" or self.values[v].type.size > _ROW * rows:
            return []
        if not self._is_made_of(second.inputs[1], first.id):
            return []
        less = second.outputs[0]
        exp = self._only_reader(less)
        if exp is None or exp.name != "exp":
            return []
        shares = [self.graph.ops[c] for c, _ in self.consumers[exp.outputs[0]]]
        narrowed = any(op.name == "div" and self._is_narrowed(op.outputs[0]) for op in shares)
        turned = any(self._turns(self.graph.ops[self.producers[u]]) for u in chain)
        kept = len(chain) == 1 or (narrowed and not turned)
        return [less, exp.outputs[0]] if kept else []

    def _turns(self, op: Op) -> bool:
        """Whether it is a transpose that changes the order of dims that are more than one long."""
        if op.name != "transpose":
            return False
        given = self.values[op.inputs[0]].shape
        order = [d for d in op.params["permutation"] if given[d] > 1]
        return order != sorted(order)

    def _only_reader(self, v: int) -> Op | None:
        readers = {c for c, _ in self.consumers[v]}
        return self.graph.ops[min(readers)] if len(readers) == 1 else None

    def _is_made_of(self, v: int, maker: int) -> bool:
        """Whether it is what an operation made, perhaps spread out or made finite since then."""
        for _ in range(8):
            op = self.graph.ops[self.producers[v]] if self.producers[v] >= 0 else None
            if op is None or op.id == maker:
                return op is not None
            if not self.fuses(op):
                return False
            given = [u for u in op.inputs if self.values[u].kind != "literal"]
            if len(given) != 1:
                return False
            v = given[0]
        return False

    def _is_narrowed(self, v: int) -> bool:
        """Whether it is read only to be converted to fewer bits."""
        readers = [self.graph.ops[c] for c, _ in self.consumers[v]]
        return bool(readers) and all(
            op.name == "convert_element_type"
            and self.values[op.outputs[0]].type.bits < self.values[v].type.bits
            for op in readers
        )

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

    def _is_early(self, v: int, product: int, depth: int = 8) -> bool:
        """Whether an operand of a chain is there when its product runs."""
        maker = self.producers[v]
        if maker < product:
            return True
        op = self.graph.ops[maker]
        early = self.fuses(op) or op.name in SAME or op.name == "scan_slice"
        return early and depth > 0 and all(
            self._is_early(u, product, depth - 1) for u in op.inputs
        )  # fmt: skip


def reduces(op: Op) -> bool:
    """Whether it is a reduction of one operand."""
    return (
        not op.is_link
        and not op.rule.fuses
        and len(op.inputs) == 1
        and any(f.kind == "reduction" for f in op.rule.factors)
    )


def picks_the_largest(graph: Graph, consumers: Sequence[Sequence[tuple[int, int]]], op: Op) -> bool:
    """Whether it is an argmax, or the maximum along dims whose argmax is wanted, too.

    XLA:TPU makes both in one kernel, which no product's can be (for v5e, v5p and v6e; jax 0.10.2,
    libtpu 0.0.42.1). Likewise of the least.
    """
    if op.name in _PLACES:
        return True
    if op.name not in _PLACES.values():
        return False
    beside = (graph.ops[c] for c, _ in consumers[op.inputs[0]])
    return any(
        _PLACES.get(o.name) == op.name and o.params.get("axes") == op.params.get("axes")
        for o in beside
    )


def _is_one_hot(graph: Graph, op: Op, producers: Sequence[int]) -> bool:
    """Whether it adds one element to each row of zeros: the gradient of picking one from each."""
    if op.name != "scatter-add" or producers[op.inputs[0]] < 0:
        return False
    zeros = graph.ops[producers[op.inputs[0]]]
    table, updates = (graph.values[op.inputs[k]].type for k in (0, 2))
    rows = [n for d, n in enumerate(table.shape) if table.size == n * updates.size]
    return zeros.name == "broadcast_in_dim" and bool(rows) and updates.size > 1
