"""Which kernel pays for what is read, written and computed?

A kernel is a loop over an array. It reads each kept value once, whatever it does with it, and
writes what is kept of it. What it moves and computes is paid by the operations whose tensors these
bytes are, because it is they that are split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import accumulate

from passes.attention import Attention
from passes.chains import PRODUCTS, Chains, reduces
from passes.handed_on import FAR, waiting
from passes.ir.graph import Op
from passes.liveness import IN_PLACE
from passes.turned import is_computed, makes_turned

# (primitive, dtype, elements computed, FLOP)
Work = tuple[tuple[str, str, float, float], ...]


@dataclass(frozen=True, slots=True)
class Update:
    """What is done to a product's result together with arguments: a gradient updates the state.

    It runs in the product's kernel where the result is read as each device makes it, and in one of
    its own where it is summed or moved before. gradient: the result as it is handed on, as in
    `Traffic.moved`. by: what the operations that do it pay.
    """

    gradient: tuple[float, int]
    by: tuple[Traffic, ...]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one run of an operation moves and computes on elements, all devices together.

    moved: per tensor, operands first and then results, what is read or written for its sake: bytes
    of each value, and how long it waits for its last reader (`passes.handed_on`).
    work: likewise, by primitive and dtype, the elements that are computed and their FLOP.
    kernels: how many it starts. wide: whether a whole array of 32-bit elements is written.
    runs: how often a product is multiplied. update: behind a product. written: what a product's
    kernel writes of as many elements as it makes, each as in moved. turned: per tensor the bytes
    of arguments and results that lie in rows while it works in columns (`passes.turned`); empty
    where it does not. anew: per tensor bytes and elements of what is laid anew before it is read
    (`passes.own_softmax`); empty where nothing is.
    """

    moved: tuple[tuple[tuple[float, int], ...], ...]
    work: tuple[Work, ...]
    kernels: int
    wide: bool
    runs: int = 1
    update: Update | None = None
    written: tuple[tuple[float, int], ...] = ()
    turned: tuple[float, ...] = ()
    anew: tuple[tuple[float, float], ...] = ()


@dataclass(slots=True)
class Behind:
    """What computing a value reads and runs: bytes by kept value, and operations."""

    leaves: dict[int, float] = field(default_factory=dict)
    ops: dict[int, None] = field(default_factory=dict)  # an ordered set

    def add(self, other: Behind) -> None:
        """Both."""
        for v, nbytes in other.leaves.items():
            self.leaves[v] = max(nbytes, self.leaves.get(v, 0.0))
        self.ops.update(other.ops)


@dataclass(slots=True)
class Kernel:
    """Roots that run together. late: what is known only when it has seen all elements.

    payers: operations that pay for it. updates: a gradient, where all of it could run in the kernel
    of the product that makes it; -1 for none.
    """

    id: int
    region: int
    elements: int
    product: Op | None
    reads: set[int] = field(default_factory=set)
    ops: set[int] = field(default_factory=set)
    late: set[int] = field(default_factory=set)
    payers: dict[int, None] = field(default_factory=dict)  # an ordered set
    updates: int = -1


class Kernels:
    """The kernels of a program, and what each operation pays.

    made, read: per value the kernel that makes it, or has read it last. far: values that are parts
    of something larger, which is moved however small they are.
    """

    def __init__(self, chains: Chains, attention: Attention, far: Set[int] = frozenset()) -> None:
        self.graph, self.chains, self.attention = chains.graph, chains, attention
        self.values, self.nbytes, self.inside = self.graph.values, chains.nbytes, attention.inside
        self.far = far
        self.started: list[Kernel] = []
        self.made: dict[int, Kernel] = {}
        self.read: dict[int, Kernel] = {}
        self.barred: set[int] = set()  # values that went through a barrier
        self.moved: dict[tuple[int, int], list[tuple[int, float]]] = {}  # (value, bytes)
        self.work: dict[tuple[int, int], dict[tuple[str, str], list[float]]] = {}
        self.written: dict[int, list[tuple[int, float]]] = {}  # by product
        self.count: dict[int, int] = {}  # kernels that an operation starts
        self.wide: set[int] = set()  # operations
        self.of_gradients: dict[int, Kernel] = {}  # by the product that makes the gradient
        self.computed: set[tuple[int, int]] = set()  # operands: (product, number)
        self.lies_otherwise: set[int] = set()  # values that are laid anew for who reads them first
        self.anew: dict[tuple[int, int], int] = {}  # those, by (operation, number)

    def start(self, op: Op, elements: int, product: Op | None = None) -> Kernel:
        """A new kernel, over so many elements."""
        self.count[op.id] = 1
        self.started.append(Kernel(op.id, op.region, elements, product))
        return self.started[-1]

    def join(self, op: Op, behind: Behind, elements: int, apart: bool = False) -> Kernel:
        """The kernel an operation runs in: one that has what it reads at hand, or a new one.

        apart: it can not run in a product's.
        An update has one of its own: its gradient may have to be summed before. `Update` says
        where else it could run.
        """
        total = sum(behind.leaves.values())
        leaves = behind.leaves.items()
        large = [v for v, nbytes in leaves if 4 * nbytes >= total and v not in self.barred]
        gradient, maker = -1, None
        for v in sorted(large, key=lambda v: (-behind.leaves[v], v)):
            for kernel in (self.made.get(v), self.read.get(v)):
                if kernel is None or not self._fits(kernel, op, behind, elements):
                    continue
                if apart and kernel.product is not None:
                    continue
                if kernel.product is None or not self._is_update(behind, elements):
                    self._look_at_update(kernel, behind)
                    return kernel
                if kernel is self.made.get(v) and maker is None:
                    gradient, maker = v, kernel
        new = self.start(op, elements)
        if maker is not None and maker.id not in self.of_gradients:
            new.updates = gradient
            self.of_gradients[maker.id] = new
        return new

    def _fits(self, kernel: Kernel, op: Op, behind: Behind, elements: int) -> bool:
        """Whether it runs over the same elements, and all that is read is there in time."""
        if kernel.region != op.region or kernel.elements != elements:
            return False
        if kernel.product is not None and not self.chains.tpu:
            return False
        for v in behind.leaves:
            maker = self.made.get(v)
            if maker is kernel and v in kernel.late:
                return False
            if maker is not None and maker.id > kernel.id and maker.region == op.region:
                return False
        return True

    def _is_update(self, behind: Behind, elements: int) -> bool:
        """Whether it reads something of the state, of all these elements."""
        return any(
            self.values[v].type.size == elements and self.chains.is_given(v) for v in behind.leaves
        )

    def _look_at_update(self, kernel: Kernel, behind: Behind) -> None:
        """Where part of an update waits for what comes later, its product is long done."""
        if kernel.updates >= 0:
            product = self.made[kernel.updates].id
            makers = [self.made[v] for v in behind.leaves if v in self.made]
            if any(m is not kernel and m.id > product for m in makers):
                kernel.updates = -1

    def pay(self, kernel: Kernel, at: tuple[int, int], behind: Behind) -> None:
        """Reads that the kernel has not paid yet, and what is computed on the way."""
        kernel.payers[at[0]] = None
        if kernel.id == at[0] and is_computed(self.graph, behind.ops):
            self.computed.add(at)
        for v, nbytes in behind.leaves.items():
            if v not in kernel.reads and self.made.get(v) is not kernel:
                kernel.reads.add(v)
                self.read[v] = kernel
                self.add(at, v, nbytes)
            if v in self.lies_otherwise:
                self.lies_otherwise.remove(v)
                self.anew[at] = v
        self.run(kernel, at, behind.ops)

    def run(self, kernel: Kernel, at: tuple[int, int], ops: Iterable[int]) -> None:
        """It computes these operations, if it has not done so."""
        for number in ops:
            if number not in kernel.ops:
                kernel.ops.add(number)
                op = self.graph.ops[number]
                sides = (*op.outputs, *(op.inputs if reduces(op) else ()))
                elements = max((self.values[v].type.size for v in sides), default=0)
                dtype = self.values[(op.inputs or op.outputs)[0]].type.dtype
                done = self.work.setdefault(at, {}).setdefault((op.name, dtype), [0.0, 0.0])
                done[0] += elements
                done[1] += op.rule.flops

    def keep(self, kernel: Kernel, at: tuple[int, int], v: int) -> None:
        """It writes a value, which others read."""
        self.made[v] = kernel
        self.write(kernel, at, v, float(self.nbytes[v]))

    def write(self, kernel: Kernel, at: tuple[int, int], v: int, nbytes: float) -> None:
        """It writes so many bytes of a value."""
        kernel.payers[at[0]] = None
        size = self.values[v].type.size
        if size == kernel.elements and self.nbytes[v] >= 4 * size:
            self.wide.add(at[0])
        if size == kernel.elements and kernel.product is not None:
            self.written.setdefault(at[0], []).append((v, nbytes))
        self.add(at, v, nbytes)

    def add(self, at: tuple[int, int], v: int, nbytes: float) -> None:
        """Bytes of a value are moved for the sake of a tensor: at is (operation, number)."""
        if v not in self.inside:
            self.moved.setdefault(at, []).append((v, nbytes))

    def _is_inside(self, op: Op) -> bool:
        """Whether it runs in the kernel of an attention: its products count as its kernels."""
        sides = (*op.inputs, *op.outputs)
        return op.name not in PRODUCTS and not self.inside.isdisjoint(sides)

    def _waiting(self) -> dict[int, int]:
        """Per value that kernels hand on, how long it waits: its class."""
        place = list(accumulate(self.count.get(op.id, 0) for op in self.graph.ops))
        last: dict[int, int] = {}
        for (reader, _), moved in self.moved.items():
            for v, _ in moved:
                last[v] = max(last.get(v, 0), place[reader])
        return {
            v: waiting(max(0, last.get(v, 0) - place[maker.id]))
            for v, maker in self.made.items()
            if v not in self.chains.results and v not in self.far and not self._lies(v)
        }

    def _lies(self, v: int) -> bool:
        """Whether it is written in place into an argument or a stack, which lie in HBM."""
        op = self.graph.ops[self.chains.producers[v]]
        while op.name in IN_PLACE:
            v = op.inputs[0]
            if v not in self.made:
                return True
            op = self.graph.ops[self.chains.producers[v]]
        return False

    def together(self) -> frozenset[int]:
        """Values that are made by a kernel that makes others, too."""
        count = Counter(kernel.id for kernel in self.made.values())
        return frozenset(v for v, kernel in self.made.items() if count[kernel.id] > 1)

    def traffic(self) -> tuple[Traffic, ...]:
        """What every operation pays; equal ones are one object."""
        known: dict[Traffic, Traffic] = {}
        wait = self._waiting()
        paid = [self._paid(op, wait) for op in self.graph.ops]
        for number, kernel in self.of_gradients.items():
            v = kernel.updates
            if v >= 0:
                by = tuple(known.setdefault(paid[o], paid[o]) for o in kernel.payers)
                update = Update((float(self.nbytes[v]), wait.get(v, FAR)), by)
                paid[number] = replace(paid[number], update=update)
        for o in self._in_columns():
            paid[o] = replace(paid[o], turned=self._laid_in_rows(self.graph.ops[o]))
        for o in dict.fromkeys(o for o, _ in self.anew):
            paid[o] = replace(paid[o], anew=self._laid(self.graph.ops[o]))
        return tuple(known.setdefault(found, found) for found in paid)

    def _in_columns(self) -> Iterator[int]:
        """What pays for updates by gradients made in columns, and for what goes on with them."""
        kernels = set[int]()
        for number, kernel in self.of_gradients.items():
            product = self.graph.ops[number]
            if makes_turned(self.graph, product, {*self.computed, *self._masked(product)}):
                kernels.add(kernel.id)
        for kernel in self.started if kernels else ():
            made = (self.made[v] for v in kernel.reads if v in self.made)
            if kernel.id in kernels or any(
                m.id in kernels and m.elements == kernel.elements for m in made
            ):
                kernels.add(kernel.id)
                yield from kernel.payers

    def _laid_in_rows(self, op: Op) -> tuple[float, ...]:
        given, count = self.chains.producers, len(op.inputs)
        return tuple(
            sum(
                n
                for v, n in self.moved.get((op.id, k), ())
                if (given[v] < 0 if k < count else v in self.chains.results)
            )
            for k in range(count + len(op.outputs))
        )

    def _laid(self, op: Op) -> tuple[tuple[float, float], ...]:
        laid = (self.anew.get((op.id, k)) for k in range(len(op.inputs) + len(op.outputs)))
        return tuple(
            (0.0, 0.0) if v is None else (float(self.nbytes[v]), float(self.values[v].type.size))
            for v in laid
        )

    def _masked(self, op: Op) -> Iterator[tuple[int, int]]:
        """Operands that it masks by itself: those that no other product reads.

        XLA:TPU keeps what was made before the mask (a sum of the masked runs in the kernel that
        makes it). What two products read it keeps masked, where there is such a sum.
        """
        for k, v in enumerate(op.inputs):
            maker = self.made.get(v)
            select = self.graph.ops[self.chains.producers[v]] if maker is not None else None
            if maker is None or maker.product is None or select is None:
                continue
            masks = select.name == "select_n" and self.chains.is_sign(select.inputs[0])
            readers = (self.graph.ops[c] for c, _ in self.chains.consumers[v])
            if masks and sum(r.name in PRODUCTS for r in readers) == 1:
                yield op.id, k

    def _paid(self, op: Op, wait: Mapping[int, int]) -> Traffic:
        tensors = range(len(op.inputs) + len(op.outputs))
        moved = tuple(
            tuple((n, wait.get(v, FAR)) for v, n in self.moved.get((op.id, k), ())) for k in tensors
        )
        work = tuple(_sorted(self.work.get((op.id, k), {})) for k in tensors)
        kernels = 0 if self._is_inside(op) else self.count.get(op.id, 0)
        runs = 2 if op.id in self.attention.again else 1
        written = tuple((n, wait.get(v, FAR)) for v, n in self.written.get(op.id, ()))
        return Traffic(moved, work, kernels, op.id in self.wide, runs, written=written)


def _sorted(work: Mapping[tuple[str, str], Sequence[float]]) -> Work:
    return tuple((*key, work[key][0], work[key][1]) for key in sorted(work))
