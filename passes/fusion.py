"""What does XLA fuse?  Which values hold memory, and who pays for what is read and written.

An operation on elements (and what only moves them) is computed inside the operations that read its
result, once in each, where that moves no more bytes than keeping the result would. What is left are
*roots*: products, reductions, opaque operations, and operations whose result is kept. A root reads
the kept values behind its operands. Roots over the same elements that share what they read, or that
read what another has just made, run together in one kernel: each byte is then read once.

On TPU a product's kernel also runs the elementwise chain that follows it, keeps a row at hand while
it finds the row's maximum (the first half of a softmax), and computes chains of its operands on the
fly. On other platforms a product is a library call, into which only moves and conversions go.
What is said of TPU was seen in compiled programs (jax 0.10.2, libtpu 0.0.42.1). What is said of
other platforms is assumed, and was not held against their compilers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from passes.attention import NONE, Attention
from passes.ir.graph import Graph, Op
from passes.stored_bytes import StoredBytes, stored_bytes

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"})

# What a product's operand may pass on its way into a library call.
_MOVES = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose"}
)
# XLA fuses nothing across it: what it is given is kept.
_BARRIER = "optimization_barrier"
# What hands a value on as it is.
_SAME = frozenset({"loop_enter", "region_enter", "region_exit", _BARRIER})

# Roots that read one value are told apart up to this many; more makes no difference.
_MANY = 8

# How many times the bytes of keeping a value XLA:TPU moves rather than keep it: a guess. Over 45
# plans for v5e (tests/accuracy) always computing again was nearer to the compiler than weighing
# bytes (compute 15 % off instead of 21, memory 8 instead of 10); this bounds chains that never end.
_READILY = 4

# (primitive, dtype, elements computed, FLOP)
Work = tuple[tuple[str, str, float, float], ...]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one run of an operation moves and computes on elements, all devices together.

    moved: per tensor, operands first and then results, what is read or written for its sake: bytes
    of each value, and whether it is made and used up by kernels of the program.
    work: likewise, by primitive and dtype, the elements that are computed and their FLOP.
    kernels: how many it starts. wide: whether a whole array of 32-bit elements is written.
    runs: how often a product is multiplied.
    """

    moved: tuple[tuple[tuple[float, bool], ...], ...]
    work: tuple[Work, ...]
    kernels: int
    wide: bool
    runs: int = 1


@dataclass(frozen=True, slots=True)
class Fusion:
    """stored: per value whether it has memory of its own. traffic: per operation what it pays.

    kept: bytes of values as they are kept and sent.
    """

    stored: tuple[bool, ...]
    traffic: tuple[Traffic, ...]
    kept: StoredBytes


def fuse(graph: Graph, platform: str, inside: Attention = NONE) -> Fusion:
    """What this platform's XLA keeps in memory, and the traffic of every operation.

    inside: attention that a kernel of its own computes; none of its inner values are kept or moved.
    """
    kept = stored_bytes(graph, platform)
    fuser = _Fuser(graph, kept.of_value, platform == "tpu", inside).run()
    if platform == "tpu":
        seen_whole = fuser.seen_whole()
        narrower = stored_bytes(graph, platform, seen_whole)
        if narrower.of_value != kept.of_value:
            kept = narrower
            fuser = _Fuser(graph, kept.of_value, True, inside).run()
    stored = tuple(s and v not in inside.inside for v, s in enumerate(fuser.stored))
    return Fusion(stored, fuser.traffic(), kept)


@dataclass(slots=True)
class _Behind:
    """What computing a value reads and runs: bytes by kept value, and operations."""

    leaves: dict[int, float] = field(default_factory=dict)
    ops: dict[int, None] = field(default_factory=dict)  # an ordered set

    def add(self, other: _Behind) -> None:
        for v, nbytes in other.leaves.items():
            self.leaves[v] = max(nbytes, self.leaves.get(v, 0.0))
        self.ops.update(other.ops)


@dataclass(slots=True)
class _Kernel:
    """Roots that run together. late: what is known only when it has seen all elements."""

    id: int
    region: int
    elements: int
    product: Op | None
    reads: set[int] = field(default_factory=set)
    ops: set[int] = field(default_factory=set)
    late: set[int] = field(default_factory=set)


class _Fuser:
    def __init__(
        self, graph: Graph, nbytes: Sequence[int], tpu: bool, attention: Attention
    ) -> None:
        self.graph, self.nbytes, self.tpu = graph, nbytes, tpu
        self.attention, self.inside = attention, attention.inside
        self.values, self.consumers = graph.values, graph.consumers()
        self.producers = graph.producers()
        self.results = frozenset(graph.outputs)
        self.stored = [v.kind != "literal" for v in graph.values]
        self.one_hot = frozenset(
            op.id for op in graph.ops if tpu and _is_one_hot(graph, op, self.producers)
        )
        self.could = [self._could(v.id) for v in graph.values]
        self.ends = self._ends()
        self.behind: dict[int, _Behind] = {}
        self.inner: dict[int, _Kernel] = {}  # values inside a product's kernel
        self.last: dict[int, _Kernel] = {}  # what a product's kernel keeps at the end of its chain
        self.made: dict[int, _Kernel] = {}
        self.read: dict[int, _Kernel] = {}
        self.barred: set[int] = set()  # values that went through a barrier
        self.moved: dict[tuple[int, int], list[tuple[int, float]]] = {}  # (value, bytes)
        self.work: dict[tuple[int, int], dict[tuple[str, str], list[float]]] = {}
        self.kernels: dict[int, int] = {}
        self.wide: set[int] = set()  # operations

    # which values could be computed inside their readers

    def _could(self, v: int) -> bool:
        if self.producers[v] < 0 or v in self.results or not self.consumers[v]:
            return False
        maker = self.graph.ops[self.producers[v]]
        if maker.name in _SAME:
            return True
        if not (self._fuses(maker) or maker.name == "scan_slice") or maker.effects:
            return False
        return all(self._absorbs(self.graph.ops[c], maker) for c, _ in self.consumers[v])

    def _absorbs(self, op: Op, maker: Op) -> bool:
        """Whether a reader can compute the maker's result by itself."""
        if op.is_link:
            return op.name in ("region_exit", "scan_stack")
        if op.name == _BARRIER:
            return False
        if op.name in PRODUCTS:
            return self.tpu or maker.name in _MOVES or maker.is_link
        return self._fuses(op) or _reduces(op)

    def _ends(self) -> list[frozenset[int]]:
        """Per value the roots that would compute it, were all others computed inside readers."""
        ends: list[frozenset[int]] = [frozenset()] * len(self.values)
        for v in sorted(range(len(self.values)), key=lambda v: -self.producers[v]):
            if not self.could[v]:
                continue
            found: set[int] = set()
            for c, _ in self.consumers[v]:
                outs = self.graph.ops[c].outputs
                through = [u for u in outs if self.could[u]]
                found.update(*(ends[u] for u in through))
                if len(through) < len(outs) or not outs:
                    found.add(c)
                if len(found) >= _MANY:
                    break
            ends[v] = frozenset(found)
        return ends

    # one operation after the other

    def _fuses(self, op: Op) -> bool:
        """Whether it is computed element by element, so that readers can do it themselves."""
        return (op.rule.fuses and not op.is_link) or op.id in self.one_hot

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
            for v, kernel in self.made.items()
            if kernel.product is not None
            for c, k in self.consumers[v]
            if _reduces(self.graph.ops[c]) and c in kernel.ops
        )

    def visit(self, op: Op) -> None:
        if op.name in _SAME:
            self._hand_on(op)
        elif op.name == "scan_slice":
            for v in op.outputs:
                self.stored[v] = not self.could[v]
        elif op.name == "scan_stack":
            self._stack(op)
        elif op.is_link:
            pass
        elif op.name in PRODUCTS:
            self._product(op)
        elif self._fuses(op) and not op.effects:
            self._elementwise(op)
        elif _reduces(op):
            self._root(op, self.values[op.inputs[0]].type.size, late=True)
        else:
            self._opaque(op)

    def _source(self, v: int) -> _Behind:
        """What an operand costs its reader."""
        if v in self.behind:
            return self.behind[v]
        if self.values[v].kind == "literal" or v in self.inner:
            return _Behind()
        return _Behind({v: float(self.nbytes[v])})

    def _hand_on(self, op: Op) -> None:
        for given, v in zip(op.inputs, op.outputs, strict=False):
            self.stored[v] = False
            self.behind[v] = self._source(given)
            if op.name == _BARRIER:
                self.barred.update(self.behind[v].leaves)
            if given in self.inner:
                self.inner[v] = self.inner[given]

    def _stack(self, op: Op) -> None:
        """A step's part is written into the whole stack, by whoever makes it."""
        v = op.inputs[0]
        behind = self._source(v)
        kernel = self.inner.get(v) or self._join(op, behind, self.values[v].type.size)
        maker = self.producers[v]
        if kernel.product is not None:
            at = (kernel.product.id, len(kernel.product.inputs))
        elif maker >= 0 and not self.graph.ops[maker].is_link:
            at = (maker, len(self.graph.ops[maker].inputs))
        else:
            return  # a copy from one stack to another; nobody computes it
        self._pay(kernel, at, behind)
        self._add(at, v, float(self.nbytes[v]))

    def _product(self, op: Op) -> None:
        kernel = _Kernel(op.id, op.region, self.values[op.outputs[0]].type.size, op)
        self.kernels[op.id] = 1
        for k, v in enumerate(op.inputs):
            self._pay(kernel, (op.id, k), self._source(v))
        v = op.outputs[0]
        chain = self._chain(op) if self.tpu else [v]
        for u in chain[:-1]:
            self.inner[u] = kernel
            self.stored[u] = False
        end = chain[-1]
        readers = {c for c, _ in self.consumers[end]}
        if self.tpu and end not in self.results and len(readers) == 1:
            only = self.graph.ops[min(readers)]
            if _reduces(only) or only.name == "scan_stack":
                self.inner[end] = kernel
                self.stored[end] = False
                return
        self.last[end] = kernel
        if end == v:
            self._keep(kernel, (op.id, len(op.inputs)), v)

    def _chain(self, op: Op) -> list[int]:
        """The values that follow a product inside its kernel, the last of which is kept."""
        chain = [op.outputs[0]]
        size = self.values[chain[0]].type.size
        soft = False
        while chain[-1] not in self.results:
            v = chain[-1]
            readers = sorted({c for c, _ in self.consumers[v]})
            after = self._only(readers) or self._after_maximum(v, readers)
            if after is None or not (self._fuses(after) or after.name == "region_exit"):
                break
            u = after.outputs[0]
            if len(after.outputs) != 1 or self.values[u].type.size != size:
                break
            others = [w for w in after.inputs if w != v]
            if not all(self._is_early(w, op.id, v) for w in others):
                break
            if any(self.values[w].type.size == size and self._is_given(w) for w in others):
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
        if first.name != "reduce_max" or not self._fuses(second) or len(second.inputs) != 2:
            return None
        other = [u for u in second.inputs if u != v]
        for _ in range(8):  # the maximum, broadcast, perhaps made finite
            if not other or self.producers[other[0]] < 0:
                return None
            maker = self.graph.ops[self.producers[other[0]]]
            if maker.id == first.id:
                return second
            if not self._fuses(maker):
                return None
            other = [u for u in maker.inputs if self.values[u].kind != "literal"]
        return None

    def _is_given(self, v: int, depth: int = 8) -> bool:
        """Whether it is an argument, or computed from one element by element: part of an update.

        A gradient is summed over the batch's axes before it meets one, so the chain ends there.
        """
        if self.producers[v] < 0:
            return self.values[v].kind in ("argument", "constant")
        op = self.graph.ops[self.producers[v]]
        if not (self._fuses(op) or op.name in _SAME or op.name == "scan_slice") or not depth:
            return False
        size = self.values[v].type.size
        if op.name == "scan_slice":
            return self._is_given(op.inputs[0], depth - 1)
        return any(
            self.values[u].type.size == size and self._is_given(u, depth - 1) for u in op.inputs
        )

    def _is_early(self, v: int, product: int, chained: int, depth: int = 8) -> bool:
        """Whether an operand of a chain is there when its product runs."""
        maker = self.producers[v]
        if v == chained or maker < product:
            return True
        op = self.graph.ops[maker]
        if chained in op.inputs and op.name == "reduce_max":
            return True
        early = self._fuses(op) or op.name in _SAME or op.name == "scan_slice"
        return early and depth > 0 and all(
            self._is_early(u, product, chained, depth - 1) for u in op.inputs
        )  # fmt: skip

    def _elementwise(self, op: Op) -> None:
        kernel = next((self.inner[v] for v in op.inputs if v in self.inner), None)
        if kernel is not None and kernel.product is not None:  # of a product's chain
            at = (kernel.product.id, len(kernel.product.inputs))
            for v in op.inputs:
                self._pay(kernel, at, self._source(v))
            self._run(kernel, at, [op.id])
            for v in op.outputs:
                if v in self.last:
                    self._keep(kernel, at, v)
            return
        behind = _Behind()
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

    def _inline(self, v: int, behind: _Behind) -> bool:
        """Whether computing a value in each of its readers moves no more bytes than keeping it.

        n readers read what is behind it n times; kept, it is computed once, written and read n
        times. XLA:TPU counts less, and computes again far more readily.
        """
        if not self.could[v] or v in self.inside or not self._taken(v, behind):
            return False
        n = len(self.ends[v])
        kept = (n + 1) * self.nbytes[v] * (_READILY if self.tpu else 1)
        return (n - 1) * sum(behind.leaves.values()) <= kept

    def _taken(self, v: int, behind: _Behind) -> bool:
        """Whether the products that read a value take all that is behind it into their kernels."""
        if self.tpu or all(self.graph.ops[c].name not in PRODUCTS for c, _ in self.consumers[v]):
            return True
        return all(self.graph.ops[n].name in _MOVES for n in behind.ops)

    def _root(
        self, op: Op, elements: int, *, keep: Iterable[int] | None = None, late: bool = False
    ) -> None:
        """A reduction, or an operation on elements whose results are kept."""
        whole = _Behind()
        for v in op.inputs:
            whole.add(self._source(v))
        kernel = next((self.inner[v] for v in op.inputs if v in self.inner), None)
        kernel = kernel or self._join(op, whole, elements)
        product = kernel.product
        count = len(op.inputs)
        for k, v in enumerate(op.inputs):
            at = (op.id, k) if product is None else (product.id, len(product.inputs))
            self._pay(kernel, at, self._source(v))
        at = (op.id, count) if product is None else (product.id, len(product.inputs))
        self._run(kernel, at, [op.id])
        for k, v in enumerate(op.outputs):
            if keep is None or v in keep:
                own = (op.id, count + k) if product is None else at
                self._keep(kernel, own, v)
                if late:
                    kernel.late.add(v)

    def _opaque(self, op: Op) -> None:
        """It reads and writes all of its tensors; where its rule says what it moves, no more."""
        kernel = _Kernel(op.id, op.region, -1, None)
        self.kernels[op.id] = 1
        for k, v in enumerate(op.inputs):
            if self.values[v].kind != "literal" and op.rule.moved is None:
                self._add((op.id, k), v, float(self.nbytes[v]))
        self._run(kernel, (op.id, len(op.inputs)), [op.id])
        for k, v in enumerate(op.outputs):
            self.made[v] = kernel
            if op.rule.moved is None:
                self._add((op.id, len(op.inputs) + k), v, float(self.nbytes[v]))

    # kernels

    def _join(self, op: Op, behind: _Behind, elements: int) -> _Kernel:
        """The kernel an operation runs in: one that has what it reads at hand, or a new one."""
        total = sum(behind.leaves.values())
        leaves = behind.leaves.items()
        large = [v for v, nbytes in leaves if 4 * nbytes >= total and v not in self.barred]
        for v in sorted(large, key=lambda v: (-behind.leaves[v], v)):
            for kernel in (self.made.get(v), self.read.get(v)):
                if kernel is not None and self._fits(kernel, op, behind, elements):
                    return kernel
        self.kernels[op.id] = 1
        return _Kernel(op.id, op.region, elements, None)

    def _fits(self, kernel: _Kernel, op: Op, behind: _Behind, elements: int) -> bool:
        """Whether it runs over the same elements, and all that is read is there in time."""
        if kernel.region != op.region or kernel.elements != elements:
            return False
        if kernel.product is not None and not self.tpu:
            return False
        for v in behind.leaves:
            maker = self.made.get(v)
            if maker is kernel and v in kernel.late:
                return False
            if maker is not None and maker.id > kernel.id and maker.region == op.region:
                return False
            of_all = self.values[v].type.size == elements
            if of_all and kernel.product is not None and self._is_given(v):
                return False
        return True

    def _pay(self, kernel: _Kernel, at: tuple[int, int], behind: _Behind) -> None:
        """Reads that the kernel has not paid yet, and what is computed on the way."""
        for v, nbytes in behind.leaves.items():
            if v not in kernel.reads and self.made.get(v) is not kernel:
                kernel.reads.add(v)
                self.read[v] = kernel
                self._add(at, v, nbytes)
        self._run(kernel, at, behind.ops)

    def _run(self, kernel: _Kernel, at: tuple[int, int], ops: Iterable[int]) -> None:
        for number in ops:
            if number not in kernel.ops:
                kernel.ops.add(number)
                op = self.graph.ops[number]
                sides = (*op.outputs, *(op.inputs if _reduces(op) else ()))
                elements = max((self.values[v].type.size for v in sides), default=0)
                dtype = self.values[(op.inputs or op.outputs)[0]].type.dtype
                done = self.work.setdefault(at, {}).setdefault((op.name, dtype), [0.0, 0.0])
                done[0] += elements
                done[1] += op.rule.flops

    def _keep(self, kernel: _Kernel, at: tuple[int, int], v: int) -> None:
        self.made[v] = kernel
        size = self.values[v].type.size
        if size == kernel.elements and self.nbytes[v] >= 4 * size:
            self.wide.add(at[0])
        self._add(at, v, float(self.nbytes[v]))

    def _add(self, at: tuple[int, int], v: int, nbytes: float) -> None:
        if v not in self.inside:
            self.moved.setdefault(at, []).append((v, nbytes))

    def _is_inside(self, op: Op) -> bool:
        """Whether it runs in the kernel of an attention: its products count as its kernels."""
        sides = (*op.inputs, *op.outputs)
        return op.name not in PRODUCTS and not self.inside.isdisjoint(sides)

    def _passes_by(self, v: int) -> bool:
        return v in self.made and v not in self.results

    def traffic(self) -> tuple[Traffic, ...]:
        """What every operation pays; equal ones are one object."""
        known: dict[Traffic, Traffic] = {}
        out = []
        for op in self.graph.ops:
            tensors = range(len(op.inputs) + len(op.outputs))
            moved = tuple(
                tuple((n, self._passes_by(v)) for v, n in self.moved.get((op.id, k), ()))
                for k in tensors
            )
            work = tuple(_sorted(self.work.get((op.id, k), {})) for k in tensors)
            kernels = 0 if self._is_inside(op) else self.kernels.get(op.id, 0)
            runs = 2 if op.id in self.attention.again else 1
            found = Traffic(moved, work, kernels, op.id in self.wide, runs)
            out.append(known.setdefault(found, found))
        return tuple(out)


def _sorted(work: Mapping[tuple[str, str], Sequence[float]]) -> Work:
    return tuple((*key, work[key][0], work[key][1]) for key in sorted(work))


def _is_one_hot(graph: Graph, op: Op, producers: Sequence[int]) -> bool:
    """Whether it adds one element to each row of zeros: the gradient of picking one from each."""
    if op.name != "scatter-add" or producers[op.inputs[0]] < 0:
        return False
    zeros = graph.ops[producers[op.inputs[0]]]
    table, updates = (graph.values[op.inputs[k]].type for k in (0, 2))
    rows = [n for d, n in enumerate(table.shape) if table.size == n * updates.size]
    return zeros.name == "broadcast_in_dim" and bool(rows) and updates.size > 1


def _reduces(op: Op) -> bool:
    """Whether it is a reduction of one operand."""
    return (
        not op.is_link
        and not op.rule.fuses
        and len(op.inputs) == 1
        and any(f.kind == "reduction" for f in op.rule.factors)
    )
