"""What does XLA fuse?  Which values hold memory, and who pays for what is read and written.

An operation on elements (and what only moves them) is computed inside the operations that read its
result, once in each, where that moves no more bytes than keeping the result would. What is left are
*roots*: products, reductions, opaque operations, and operations whose result is kept. A root reads
the kept values behind its operands. Roots over the same elements that share what they read, or that
read what another has just made, run together in one kernel: each byte is then read once.

Which neighbours can share a kernel, `passes.chains` says; `passes.kernels` keeps the accounts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from passes.attention import NONE, Attention
from passes.chains import BARRIER, MOVES, PRODUCTS, Chains, picks_the_largest, reduces
from passes.ir.graph import Graph, Op
from passes.kernels import Behind, Kernel, Kernels, Traffic
from passes.liveness import IN_PLACE
from passes.own_softmax import own_softmaxes
from passes.stored_bytes import StoredBytes, stored_bytes
from passes.tile_padding import DOT, batch_dims, outer_dims, wasteful
from passes.weight_casts import WeightCast, weight_casts

# How many times the bytes of keeping a value XLA:TPU moves rather than keep it: a guess. Over 45
# plans for v5e (tests/accuracy) 4 was nearer to the compiler than weighing bytes (compute 15 % off
# instead of 21, memory 8 instead of 10). Of a residual conv net 4 misses what XLA keeps of the sums
# (memory 15 to 33 % too small); 2 is 11 to 13 % off there, and as near as 4 elsewhere. Whether a
# value is above a constant, the mask of a ReLU, it computes again twice as readily: that net keeps
# no mask.
_READILY = 2


@dataclass(frozen=True, slots=True)
class Fusion:
    """stored: per value whether it has memory of its own. traffic: per operation what it pays.

    kept: bytes of values as they are kept and sent. filled: constants made as arrays. outer: per
    value dims that are not minor in memory, on TPU. casts: weights that are converted once.
    together: values made by a kernel that makes others, too, on TPU. quotients: those that are made
    narrower for several readers, and that each of them computes.
    """

    stored: tuple[bool, ...]
    traffic: tuple[Traffic, ...]
    kept: StoredBytes
    filled: frozenset[int] = frozenset()
    outer: tuple[frozenset[int], ...] = ()
    casts: tuple[WeightCast, ...] = ()
    together: frozenset[int] = frozenset()
    quotients: frozenset[int] = frozenset()

    @property
    def parts(self) -> dict[int, int]:
        """How many slices of a stack lie in memory with the one of this value."""
        return {c.values[0]: c.parts for c in self.casts if c.parts > 1}


def fuse(
    graph: Graph,
    platform: str,
    inside: Attention = NONE,
    quotients_kept: bool = False,
    tanh_bytes: float = 0.0,
) -> Fusion:
    """What this platform's XLA keeps in memory, and the traffic of every operation.

    inside: attention that a kernel of its own computes; none of its inner values are kept or moved.
    quotients_kept: as of `cost_models.fitted`. tanh_bytes: as of `passes.compiler`.
    """
    kept = stored_bytes(graph, platform)
    casts = weight_casts(graph, kept) if platform == "tpu" else ()
    chains = Chains(graph, kept.of_value, platform == "tpu")
    fuser = _Fuser(chains, inside, casts, quotients_kept, tanh_bytes).run()
    if platform == "tpu":
        seen_whole = fuser.seen_whole()
        narrower = stored_bytes(graph, platform, seen_whole)
        if narrower.of_value != kept.of_value:
            kept = narrower
            chains = Chains(graph, kept.of_value, True)
            fuser = _Fuser(chains, inside, casts, quotients_kept, tanh_bytes).run()
    filled = _filled(graph) if platform == "gpu" else frozenset[int]()
    stored = tuple(
        (s or v in filled) and v not in inside.inside for v, s in enumerate(fuser.stored)
    )
    outer = outer_dims(graph) if platform == "tpu" else ()
    together = fuser.kernels.together() if platform == "tpu" else frozenset[int]()
    quotients = frozenset(v for v in fuser.quotients() if not stored[v] and v not in inside.inside)
    traffic = fuser.kernels.traffic()
    return Fusion(stored, traffic, kept, filled, outer, casts, together, quotients)


def _filled(graph: Graph) -> frozenset[int]:
    """Constants that XLA:GPU makes as arrays: those that an operation then adds to in place.

    Another constant like it is no longer computed inside its reader either, but copied from the
    same array (seen in compiled programs: zeros of a scattered gradient, and of a `where` in the
    optimizer).
    """
    like: list[tuple[object, ...] | None] = [
        (v.name, v.type.dtype) if v.kind == "literal" else None for v in graph.values
    ]
    filled = dict[int, tuple[object, ...]]()
    for op in graph.ops:
        made_of = like[op.inputs[0]] if len(op.inputs) == 1 else None
        if made_of and op.name in ("convert_element_type", "broadcast_in_dim"):
            kind = graph.values[op.outputs[0]].type
            like[op.outputs[0]] = (made_of[0], kind.dtype)
            if kind.size > 1:
                filled[op.outputs[0]] = (made_of[0], kind)
    added = {filled.get(op.inputs[0]) for op in graph.ops if op.name in IN_PLACE}
    return frozenset(v for v, made_of in filled.items() if made_of in added)


class _Fuser:
    def __init__(
        self,
        chains: Chains,
        attention: Attention,
        casts: Sequence[WeightCast],
        quotients_kept: bool,
        tanh_bytes: float,
    ) -> None:
        self.quotients_kept, self.tanh_bytes = quotients_kept, tanh_bytes
        self.chains, self.graph, self.nbytes = chains, chains.graph, chains.nbytes
        self.values, self.consumers = chains.values, chains.consumers
        self.tpu, self.inside = chains.tpu, attention.inside
        self.stored = [v.kind != "literal" for v in chains.values]
        self.could = chains.could_be_inline()
        self.again = {v: c.values[0] for c in casts for v in c.values[1:]}
        for cast in casts:
            self.could[cast.values[0]] = False
        self.narrowed = {c.values[0] for c in casts}
        softmaxes = [s for s in own_softmaxes(self.graph) if s.slices] if self.tpu else []
        laid_anew = [v for s in softmaxes for v in s.slices]
        for v in (*(s.exp for s in softmaxes), *laid_anew):
            self.could[v] = False
        self.ends = chains.ends(self.could)
        self.behind: dict[int, Behind] = {}
        self.inner: dict[int, Kernel] = {}  # values inside a product's kernel
        self.soft: set[int] = set()  # what a product keeps of a softmax
        self.last: dict[int, Kernel] = {}  # what a product's kernel keeps at the end of its chain
        stacks = {c.values[0] for c in casts if c.parts > 1}
        self.kernels = Kernels(chains, attention, stacks)
        self.kernels.lies_otherwise.update(laid_anew)

    def run(self) -> _Fuser:
        for op in self.graph.ops:
            self.visit(op)
        return self

    def seen_whole(self) -> frozenset[tuple[int, int]]:
        """Reads, as (operation, operand), made by the very kernel that makes the value.

        There it is at hand as it was computed, however it is kept for others.
        """
        return frozenset(
            (c, k)
            for v, kernel in self.kernels.made.items()
            if kernel.product is not None
            for c, k in self.consumers[v]
            if reduces(self.graph.ops[c]) and c in kernel.ops
        )

    def quotients(self) -> Iterator[int]:
        """Quotients that are made narrower and that several read."""
        for op in self.graph.ops:
            yield from (v for v in op.outputs if self._is_narrowed_quotient(v))

    def visit(self, op: Op) -> None:
        if self.chains.hands_on(op):
            self._hand_on(op)
        elif op.outputs and op.outputs[0] in self.again:  # a weight that was converted before
            v = op.outputs[0]
            self.stored[v], self.behind[v] = False, self._source(self.again[v])
        elif op.name == "scan_slice":
            self._slice(op)
        elif op.name == "scan_stack":
            self._stack(op)
        elif op.is_link:
            pass
        elif op.name in PRODUCTS:
            self._product(op)
        elif self.chains.fuses(op) and not op.effects:
            self._elementwise(op)
        elif reduces(op):
            self._root(op, self.values[op.inputs[0]].type.size, late=True)
        else:
            self._opaque(op)

    def _slice(self, op: Op) -> None:
        """A slice of a stack; one that is only read narrow is converted by a kernel of its own."""
        (v,) = op.outputs
        self.stored[v] = not self.could[v]
        if v in self.narrowed:
            at = (op.id, len(op.inputs))
            kernel = self.kernels.start(op, self.values[v].type.size)
            self.kernels.add(at, v, float(self.values[v].type.nbytes))
            self.kernels.keep(kernel, at, v)

    def _source(self, v: int) -> Behind:
        """What an operand costs its reader."""
        if v in self.behind:
            return self.behind[v]
        if self.values[v].kind == "literal" or v in self.inner:
            return Behind()
        return Behind({v: float(self.nbytes[v])})

    def _hand_on(self, op: Op) -> None:
        for given, v in zip(op.inputs, op.outputs, strict=False):
            self.stored[v] = False
            self.behind[v] = self._source(given)
            if op.name == BARRIER:
                self.kernels.barred.update(self.behind[v].leaves)
            if given in self.inner:
                self.inner[v] = self.inner[given]

    def _stack(self, op: Op) -> None:
        """A step's part is written into the whole stack, by whoever makes it.

        What a product makes is written by another kernel where it is laid out anew first, or where
        it is a softmax. What was updated in place is read for that once more.
        """
        v = op.inputs[0]
        behind = self._source(v)
        maker = self.chains.producers[v]
        home = self.graph.ops[maker] if maker >= 0 and not self.graph.ops[maker].is_link else op
        size = self.values[v].type.size
        kernel = self.inner.get(v) or self.kernels.join(home, behind, size)
        if kernel.product is not None:
            shape = self.values[kernel.product.outputs[0]].shape
            if self.tpu and (v in self.soft or self.values[v].shape != shape):
                behind = Behind({v: float(self.nbytes[v])})
                kernel = self.kernels.start(home, size)
        if kernel.product is not None:
            at = (kernel.product.id, len(kernel.product.inputs))
        elif home is not op:
            at = (maker, len(home.inputs))
        else:
            return  # a copy from one stack to another; nobody computes it
        self.kernels.pay(kernel, at, behind)
        again = 1 + (home.name in IN_PLACE)
        self.kernels.write(kernel, at, v, float(again * self.nbytes[v]))

    def _product(self, op: Op) -> None:
        kernel = self.kernels.start(op, self.values[op.outputs[0]].type.size, op)
        for k, v in enumerate(op.inputs):
            self.kernels.pay(kernel, (op.id, k), self._source(v))
        v = op.outputs[0]
        goes_on = self.tpu and not self._is_spread(op)
        chain, soft = self.chains.after_product(op) if goes_on else ([v], False)
        for u in chain[:-1]:
            self.inner[u] = kernel
            self.stored[u] = False
        end = chain[-1]
        if soft:
            self.soft.add(end)
        readers = {c for c, _ in self.consumers[end]}
        if goes_on and end not in self.chains.results and len(readers) == 1:
            only = self.graph.ops[min(readers)]
            if (reduces(only) and not self._picks(only)) or only.name == "scan_stack":
                self.inner[end] = kernel
                self.stored[end] = False
                return
        self.last[end] = kernel
        if end == v:
            self.kernels.keep(kernel, (op.id, len(op.inputs)), v)

    def _elementwise(self, op: Op) -> None:
        kernel = next((self.inner[v] for v in op.inputs if v in self.inner), None)
        if kernel is not None and kernel.product is not None:  # of a product's chain
            at = (kernel.product.id, len(kernel.product.inputs))
            for v in op.inputs:
                self.kernels.pay(kernel, at, self._source(v))
            self.kernels.run(kernel, at, [op.id])
            for v in op.outputs:
                if v in self.last:
                    self.kernels.keep(kernel, at, v)
            return
        behind = Behind()
        for v in op.inputs:
            behind.add(self._source(v))
        if op.rule.moved is not None and op.inputs:  # a slice reads a part
            given = self.values[op.inputs[0]].type.size
            part = min(1.0, sum(self.values[v].type.size for v in op.outputs) / max(given, 1))
            behind.leaves = {v: nbytes * part for v, nbytes in behind.leaves.items()}
        behind.ops[op.id] = None
        keep = [v for v in op.outputs if not self._inline(v, behind)]
        for v in op.outputs:
            if v not in keep:
                self.stored[v] = False
                self.behind[v] = behind
        if keep:
            self._root(op, self.values[keep[0]].type.size, keep=keep)

    def _inline(self, v: int, behind: Behind) -> bool:
        """Whether computing a value in each of its readers moves no more bytes than keeping it.

        n readers read what is behind it n times; kept, it is computed once, written and read n
        times. XLA:TPU counts less, and computes again far more readily.
        """
        if not self.could[v] or v in self.inside or not self._taken(v, behind):
            return False
        n = len(self.ends[v])
        if self.quotients_kept and self._is_narrowed_quotient(v):
            return False
        kept = (n + 1) * self.nbytes[v] * (_READILY if self.tpu else 1)
        if self.tpu and self.chains.is_sign(v):
            kept *= 2
        again = sum(behind.leaves.values()) + self._computed(behind)
        return (n - 1) * again <= kept

    def _computed(self, behind: Behind) -> float:
        """The bytes that could be moved while what is slow to compute is computed once."""
        if not self.tanh_bytes:
            return 0.0
        slow = (o for o in behind.ops if self.graph.ops[o].name == "tanh")
        return (
            sum(self.values[self.graph.ops[o].outputs[0]].type.size for o in slow) * self.tanh_bytes
        )

    def _is_spread(self, op: Op) -> bool:
        """Whether a product's result is laid anew for its readers: none runs in its kernel."""
        shape = self.values[op.outputs[0]].shape
        return op.name == DOT and wasteful(shape, batch_dims(op.rule, op.rule.results[0]))

    def _is_narrowed_quotient(self, v: int) -> bool:
        """Whether several read it, and it is a quotient made narrower: weights of an attention."""
        op = self.graph.ops[self.chains.producers[v]]
        if len({c for c, _ in self.consumers[v]}) < 2 or op.name != "convert_element_type":
            return False
        maker = self.chains.producers[op.inputs[0]]
        return self._narrows(op) and maker >= 0 and self.graph.ops[maker].name == "div"

    def _taken(self, v: int, behind: Behind) -> bool:
        """Whether the products that read a value take all that is behind it into their kernels."""
        if self.tpu or all(self.graph.ops[c].name not in PRODUCTS for c, _ in self.consumers[v]):
            return True
        ops = [self.graph.ops[n] for n in behind.ops]
        if self.chains.clips(ops[-1]):  # a ReLU, of what a bias was added to
            return all(op.name in (*MOVES, "add") or op is ops[-1] for op in ops)
        return all(op.name in MOVES and not self._narrows(op) for op in ops)

    def _narrows(self, op: Op) -> bool:
        """Whether it makes fewer bytes than it reads.

        XLA:GPU's products read what is fewer: a step of a video transformer on 8 H100 keeps its
        weights in bfloat16 beside float32 (jax 0.10.2).
        """
        given, made = (self.values[v].type for v in (op.inputs[0], op.outputs[0]))
        return made.dtype != given.dtype and made.nbytes < given.nbytes

    def _root(
        self, op: Op, elements: int, *, keep: Iterable[int] | None = None, late: bool = False
    ) -> None:
        """A reduction, or an operation on elements whose results are kept."""
        whole = Behind()
        for v in op.inputs:
            whole.add(self._source(v))
        kernel = next((self.inner[v] for v in op.inputs if v in self.inner), None)
        kernel = kernel or self.kernels.join(op, whole, elements, self._picks(op))
        product = kernel.product
        count = len(op.inputs)
        for k, v in enumerate(op.inputs):
            at = (op.id, k) if product is None else (product.id, len(product.inputs))
            self.kernels.pay(kernel, at, self._source(v))
        at = (op.id, count) if product is None else (product.id, len(product.inputs))
        self.kernels.run(kernel, at, [op.id])
        for k, v in enumerate(op.outputs):
            if keep is None or v in keep:
                own = (op.id, count + k) if product is None else at
                self.kernels.keep(kernel, own, v)
                if late:
                    kernel.late.add(v)

    def _picks(self, op: Op) -> bool:
        return self.tpu and picks_the_largest(self.graph, self.consumers, op)

    def _opaque(self, op: Op) -> None:
        """It reads and writes all of its tensors; where its rule says what it moves, no more."""
        kernel = self.kernels.start(op, -1)
        for k, v in enumerate(op.inputs):
            if self.values[v].kind != "literal" and op.rule.moved is None:
                self.kernels.add((op.id, k), v, float(self.nbytes[v]))
        self.kernels.run(kernel, (op.id, len(op.inputs)), [op.id])
        for k, v in enumerate(op.outputs):
            self.kernels.made[v] = kernel
            if op.rule.moved is None:
                self.kernels.add((op.id, len(op.inputs) + k), v, float(self.nbytes[v]))
