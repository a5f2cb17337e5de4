"""How many seconds does one operation take under a strategy?

What its kernel reads, writes and computes on one device, priced by the chip's cost model, and the
window overhang that neighbours send. What a kernel of several fused operations does is paid by the
one that `passes.fusion` names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cost_models.cluster import Cluster
from cost_models.collectives import seconds
from cost_models.fitted import LANES
from cost_models.product import conv_seconds, fetched_ahead, product_seconds
from cost_models.roofline import compute_seconds
from cost_models.topology import AxisLink
from cost_models.vector import kernel_seconds, tile_rows, vector_seconds, work_seconds
from passes.bags import SCATTERS, bags, tile_bytes, tiles
from passes.chains import MOVES, PRODUCTS
from passes.fusion import Fusion
from passes.handed_on import FAR, moved_part
from passes.ir.graph import Graph, Op
from passes.ir.mesh import Mesh
from passes.ir.rule import Rule
from passes.ir.sharding import BROADCAST
from passes.kernels import Traffic, Update, Work
from passes.relaid import PASSES, laid_anew, overwritten, slice_laid_anew
from passes.strategies import Axes, Layouts, Strategy, factor_parts, operand_axes, parts
from passes.tile_padding import DOT, batch_dims, padded, wasteful
from passes.zeros import added_to, filled_inside

# A window of more places than this is no forward convolution's, but that of a weight's gradient.
_MOST_TAPS = 128

# Operands and results of a product stay in VMEM, as they are laid for it, up to this share of it:
# copies there take next to no time (crossings of DLRM for v5e and v6e; jax 0.10.2).
_LAID_NEAR = 0.5

# What the kernel of a product does that goes on to a softmax.
_SOFTMAX = frozenset({"reduce_max", "exp"})


class _Local(NamedTuple):
    """Of one device: bytes moved, arithmetic in FLOP and in seconds, bytes moved by operand."""

    moved: float
    flops: float
    work: float
    of_operand: list[float]


class _Paid(NamedTuple):
    """What an operation pays for one of its tensors, were it whole on one device.

    tensor: its number, operands first. nbytes: what is moved at any size. near: bytes of values
    that may be handed on in VMEM, and how long each waits. work: seconds of arithmetic.
    """

    tensor: int
    nbytes: float
    near: tuple[tuple[float, int], ...]
    work: float


class _Facts(NamedTuple):
    """What no strategy changes of an operation."""

    paid: tuple[_Paid, ...]
    idle: bool  # it does nothing that takes time
    reduces: bool  # a product whose kernel reduces what it makes, but for a softmax
    computed: tuple[bool, ...]  # per operand of a product whether its kernel computes it
    halos: frozenset[int]  # factors


class OpCost:
    """Seconds of operations on one mesh."""

    def __init__(
        self,
        graph: Graph,
        fusion: Fusion,
        mesh: Mesh,
        cluster: Cluster,
        links: Sequence[AxisLink],
        layouts: Layouts,
    ) -> None:
        self.graph, self.fusion, self.layouts = graph, fusion, layouts
        self.mesh, self.sizes, self.chip, self.links = mesh, mesh.sizes, cluster.chip, links
        f = cluster.chip.fitted
        self.overwritten = overwritten(graph) if f else {}
        self.bags = bags(graph) if f and f.tile_folded else {}
        self.zeros = added_to(graph) if f else {}  # what fills a table: with who adds rows to it
        self.adds = frozenset(self.zeros.values())
        self.near = f.handed_on * f.vmem if f else 0.0  # what is copied stays there up to this size
        self.vmem = f.vmem if f and f.handed_on else 0.0  # where kernels hand results on
        self.known: dict[tuple[int, int, tuple[str, ...]], _Facts] = {}  # by rule, traffic, dtypes
        self.roles: dict[int, tuple[tuple[int, ...], ...]] = {}

    def seconds(self, op: Op, strategy: Strategy, updates: bool = False) -> float:
        """Seconds of one run of an operation under a strategy.

        updates: whether a product hands its result to the update behind it as it is made. Their one
        kernel takes what the update is priced at by itself, and the seconds of the product.
        """
        traffic = self.fusion.traffic[op.id]
        facts = self._facts(op, traffic)
        if facts.idle:
            return 0.0
        local = self._local(op, facts, strategy)
        if op.name == "dot_general":
            time = self._product(op, traffic, strategy, local, facts, updates)
        elif op.name == "conv_general_dilated":
            time = self._convolution(op, traffic, strategy, local)
        elif op.name in PRODUCTS:
            time = compute_seconds(self.chip, local.flops, local.moved, self._dtype(op), True)
        else:
            time = self._elements(op, traffic, strategy, local)
        if traffic.anew:
            time += self._anew(op, traffic.anew, strategy)
        return time + self._halo(op, strategy) if facts.halos else time

    def _anew(self, op: Op, anew: Sequence[tuple[float, float]], strategy: Strategy) -> float:
        """Seconds to take slices of stacks in one kernel each, and to copy them in another.

        What stays in VMEM takes next to no time.
        """
        ins, outs = self.layouts.of(op.rule, strategy)
        total = 0.0
        for (nbytes, elements), axes in zip(anew, (*ins, *outs), strict=True):
            shards = _shards(axes, self.sizes)
            if self.chip.fitted and nbytes / shards > _LAID_NEAR * self.vmem:
                moved, wide = 2 * nbytes / shards, nbytes >= 4 * elements
                for alone in (False, True):
                    args = elements / shards, moved, wide, 0.0, alone
                    total += kernel_seconds(self.chip, *args)
        return total

    def marks(self, op: Op) -> tuple[bool, ...]:
        """What tells apart operations of one rule and one traffic: who else works on their values.

        Those that differ here are priced by themselves.
        """
        of = (self.overwritten, self.bags, self.zeros, self.adds)
        return tuple([op.id in those for those in of])

    def _facts(self, op: Op, traffic: Traffic) -> _Facts:
        kinds = tuple(self.graph.values[v].type.dtype for v in op.inputs[:2])
        key = id(op.rule), id(traffic), kinds
        if key not in self.known:
            paid = []
            for k, (moved, work) in enumerate(zip(traffic.moved, traffic.work, strict=True)):
                if moved or work:
                    far = sum(n for n, wait in moved if wait == FAR or not self.vmem)
                    near = tuple(of for of in moved if of[1] != FAR and self.vmem)
                    paid.append(_Paid(k, far, near, self._work(work, op.name in PRODUCTS)))
            halos = frozenset(f for f, factor in enumerate(op.rule.factors) if factor.halo)
            runs = op.name in PRODUCTS or not (op.rule.fuses or _reduces(op))
            idle = not (paid or halos or runs or traffic.kernels)
            done = {name for work in traffic.work for name, *_ in work}
            reduces = any(name.startswith("reduce_") for name in done) and not done >= _SOFTMAX
            computed = self._computed(op, traffic) if op.name in PRODUCTS else ()
            self.known[key] = _Facts(tuple(paid), idle, reduces, computed, halos)
        return self.known[key]

    def _local(self, op: Op, facts: _Facts, strategy: Strategy) -> _Local:
        ins, outs = self.layouts.of(op.rule, strategy)
        of_operand = [0.0] * len(ins)
        total = work = 0.0
        for paid in facts.paid:
            at = paid.tensor
            shards = _shards(ins[at] if at < len(ins) else outs[at - len(ins)], self.sizes)
            moved = paid.nbytes + (self._near(paid.near, shards) if paid.near else 0.0)
            if at < len(ins):
                of_operand[at] = moved / shards
            total += moved / shards
            work += paid.work / shards
        split = parts(strategy, self.sizes)
        if op.rule.moved is not None and not op.rule.fuses:  # it does not touch all of its tensors
            total += op.rule.moved / split
        return _Local(total, op.rule.flops / split, work, of_operand)

    def _near(self, paid: Iterable[tuple[float, int]], shards: int) -> float:
        """Bytes that are moved of values, as they would be were they whole on one device."""
        if not self.vmem:
            return sum(n for n, _ in paid)
        return sum(n * moved_part(n / shards / self.vmem, wait) for n, wait in paid)

    def _work(self, work: Work, product: bool) -> float:
        """Seconds of arithmetic on elements, in the kernel of a product or in another."""
        if self.chip.fitted is None:
            return sum(flops for _, _, _, flops in work) / self.chip.vector_flops
        total = sum(work_seconds(self.chip, name, elements) for name, _, elements, _ in work)
        done = {name: elements for name, _, elements, _ in work}
        if product and done.keys() >= _SOFTMAX:
            return max(total, done["exp"] * self.chip.fitted.product_softmax)
        return total

    def _dtype(self, op: Op) -> str:
        """What a product multiplies: bfloat16 where its operands are kept so for it."""
        kept = self.fusion.kept
        dtype = self.graph.values[op.inputs[0]].type.dtype
        if op.id in kept.one_pass and dtype == "float32":
            plain = [v for v in op.inputs if kept.of_value[v] == self.graph.values[v].type.nbytes]
            return "float32" if plain else "bfloat16"
        return dtype

    def _product(
        self,
        op: Op,
        traffic: Traffic,
        strategy: Strategy,
        local: _Local,
        facts: _Facts,
        updates: bool,
    ) -> float:
        sizes = self._sizes(op.rule, strategy)
        chip, dtype = self.chip, self._dtype(op)
        spread = sizes[0] > 1 and op.name == DOT
        more, laid = self._spread(op, strategy) if spread else (0.0, 0.0)
        plain = [n for n, made in zip(local.of_operand, facts.computed, strict=False) if not made]
        rows = self._rows(op, strategy) if chip.fitted and 1 in sizes[1:] else 8
        far = self._far(op, traffic, strategy)

        def seconds(moved: float) -> float:
            time = product_seconds(
                chip,
                *sizes,
                dtype,
                moved_bytes=moved - fetched_ahead(chip, local.flops, dtype, moved, plain),
                result_dtype="float32" if traffic.wide else "bfloat16",
                rows=rows,
                reduces=facts.reduces,
                computed=all(facts.computed),
                far=far,
            )
            return max(time * traffic.runs, local.work)

        time = seconds(local.moved + more)
        if updates and traffic.update is not None:
            bytes_more, less = self._update(traffic.update, math.prod(sizes[:3]), op, strategy)
            time = min(time, max(0.0, seconds(local.moved + more + bytes_more) - less))
        return time + laid

    def _far(self, op: Op, traffic: Traffic, strategy: Strategy) -> float:
        """Which share of what a product writes goes to HBM; the rest is handed on in VMEM."""
        whole = sum(n for n, _ in traffic.written)
        if not whole or not self.vmem:
            return 1.0
        return self._near(traffic.written, self._shards_of_result(op, strategy)) / whole

    def _shards_of_result(self, op: Op, strategy: Strategy) -> int:
        return _shards(self.layouts.of(op.rule, strategy)[1][0], self.sizes)

    def _update(
        self, update: Update, elements: float, op: Op, strategy: Strategy
    ) -> tuple[float, float]:
        """Bytes that a product moves more where it updates the state by the gradient that it makes,
        and the seconds that the update, which is priced by itself, takes less.
        """
        shards = self._shards_of_result(op, strategy)
        gradient = self._near([update.gradient], shards) / shards
        moved = alone = 0.0
        for traffic in update.by:
            paid = sum(self._near(of, shards) for of in traffic.moved) / shards
            work = sum(self._work(of, False) for of in traffic.work) / shards
            moved += paid
            alone += self._kernel(traffic, elements, paid, work, self._rows(op, strategy))
        return moved - 2 * gradient, alone

    def _spread(self, op: Op, strategy: Strategy) -> tuple[float, float]:
        """Bytes more that a batched product moves as its tensors are tiled, and seconds to lay
        them so, where that takes a lot more memory than they need.
        """
        f, kept = self.chip.fitted, self.fusion.kept
        if f is None:
            return 0.0, 0.0
        ins, outs = self.layouts.of(op.rule, strategy)
        sides = (*op.inputs, *op.outputs), (*ins, *outs), (*op.rule.operands, *op.rule.results)
        more = seconds = 0.0
        for k, (v, axes, dims) in enumerate(zip(*sides, strict=True)):
            shape, outer = self._local_shape(v, axes), batch_dims(op.rule, dims)
            each = kept.sent(v, (op.id, k) in kept.narrow) / self.graph.values[v].type.size
            elements = math.prod(shape)
            full = elements * padded(shape, outer)
            if wasteful(shape, outer) and full * each > _LAID_NEAR * f.vmem:
                more += (full - elements) * each
                moved = (elements * padded(shape) + full) * each
                seconds += kernel_seconds(self.chip, full, moved, False)
        return more, seconds

    def _computed(self, op: Op, traffic: Traffic) -> tuple[bool, ...]:
        """Per operand of a product whether its kernel computes it, and does not only read it."""
        kinds = [self.graph.values[v].type for v in op.inputs[:2]]
        of_operands = zip(kinds, traffic.moved, traffic.work, strict=False)
        return tuple(
            any(name not in MOVES or name == "convert_element_type" for name, *_ in work)
            or (kind.dtype == "bfloat16" and sum(n for n, _ in moved) > 1.9 * kind.nbytes)
            for kind, moved, work in of_operands
        )

    def _sizes(self, rule: Rule, strategy: Strategy) -> tuple[int, int, int, int]:
        """batch, m, n, k of one device."""
        if id(rule) not in self.roles:
            left, right = ({f for dim in t for f in dim} for t in rule.operands[:2])
            out = {f for dim in rule.results[0] for f in dim}
            self.roles[id(rule)] = (
                tuple(left & right & out),
                tuple((left - right) & out),
                tuple((right - left) & out),
                tuple((left & right) - out),
            )
        split = factor_parts(strategy, self.sizes)
        batch, m, n, k = (
            math.prod(rule.factors[f].size // split.get(f, 1) for f in role)
            for role in self.roles[id(rule)]
        )
        return batch, m, n, k

    def _convolution(self, op: Op, traffic: Traffic, strategy: Strategy, local: _Local) -> float:
        moved, dtype = local.moved, self._dtype(op)
        numbers = op.params["dimension_numbers"]
        right, out = (self.graph.values[v].type for v in (op.inputs[1], op.outputs[0]))
        features, channels, *window = (right.shape[d] for d in numbers["rhs_spec"])
        taps = math.prod(window)
        split = parts(strategy, self.sizes)
        results = out.size / split
        if self.chip.fitted is None or taps > _MOST_TAPS:
            time = compute_seconds(self.chip, local.flops, moved, dtype, True)
        else:
            ways = factor_parts(strategy, self.sizes)
            rule = op.rule
            features //= math.prod(ways.get(f, 1) for f in rule.operands[1][numbers["rhs_spec"][0]])
            channels //= math.prod(ways.get(f, 1) for f in rule.operands[1][numbers["rhs_spec"][1]])
            positions = max(1, round(local.flops / (2 * features * channels * taps)))
            wide = "float32" if traffic.wide else "bfloat16"
            time = conv_seconds(
                self.chip, positions, channels, features, taps, dtype, moved, int(results), wide
            )
        return max(time, local.work)

    def _elements(self, op: Op, traffic: Traffic, strategy: Strategy, local: _Local) -> float:
        """Reductions, chains of operations on elements, and whatever is neither."""
        moved, chip = local.moved, self.chip
        if not op.rule.fuses and not _reduces(op):
            elements = max(self._elements_of(op, strategy), default=0.0)
            dtype = self.graph.values[(op.outputs or op.inputs)[0]].type.dtype
            if chip.fitted is None:
                time = compute_seconds(chip, local.flops, moved, dtype, False)
                return time + chip.kernel_latency
            if op.name == "gather" or op.name in SCATTERS:
                time = chip.fitted.start + moved / chip.fitted.stream + self._filled(op, strategy)
            else:
                time = vector_seconds(chip, op.name, elements, moved, dtype, True)
            return max(local.work, time) + self._laid_anew(op, strategy)
        if op.id in self.zeros and chip.fitted:  # by its scatter, which pays for the kernel
            return moved / chip.fitted.stream
        if op.id in self.bags and (bags_take := self._bags(op, strategy, local)):
            return bags_take
        of = self._elements_of(op, strategy)
        elements = max(of[len(op.inputs) if op.is_link else 0 :], default=0.0)  # of a stack, a part
        time = self._kernel(traffic, elements, moved, local.work, self._rows(op, strategy))
        return time + self._turned(op, traffic.turned, strategy) if traffic.turned else time

    def _bags(self, op: Op, strategy: Strategy, local: _Local) -> float:
        """Seconds to add up bags of rows, or spread over them, and to copy rows into tiles.

        0 where they take what others do.
        """
        f, v = self.chip.fitted, self.bags[op.id]
        ins, outs = self.layouts.of(op.rule, strategy)
        shape = self._local_shape(v, ins[0] if v in op.inputs else outs[0])
        if f is None or not tiles(shape):
            return 0.0
        nbytes = tile_bytes(shape, self.graph.values[v].type.bits)
        time = max(tiles(shape) * f.tile_folded, (local.moved + nbytes) / f.stream)
        if nbytes:
            time += kernel_seconds(self.chip, 0.0, nbytes * (1 + shape[-1] / LANES), True)
        return f.start + time

    def _turned(self, op: Op, turned: Sequence[float], strategy: Strategy) -> float:
        """Seconds to lay in columns what an update reads of the state, and to lay back the new.

        A copy reads from VMEM, or writes there, what is small. An array of fewer columns than lanes
        lies in columns anyway.
        """
        f = self.chip.fitted
        if f is None or not f.turned_stream:
            return 0.0
        ins, outs = self.layouts.of(op.rule, strategy)
        if self._local_shape(op.outputs[0], outs[0])[-1] < LANES:
            return 0.0
        of = (n / _shards(axes, self.sizes) for n, axes in zip(turned, (*ins, *outs), strict=True))
        return sum(n * (2 if n > self.near else 1) for n in of) / f.turned_stream

    def _kernel(
        self, traffic: Traffic, elements: float, moved: float, work: float, rows: int
    ) -> float:
        """A reduction or a chain of operations on elements."""
        chip = self.chip
        if not traffic.kernels:  # it runs in another's kernel
            rate = chip.fitted.stream if chip.fitted else chip.hbm_bandwidth * chip.hbm_efficiency
            return max(moved / rate, work)
        if chip.fitted is None:
            return max(kernel_seconds(chip, 0.0, moved, True, work), 0.0) + chip.kernel_latency
        alone = sum(map(len, traffic.work)) == 1
        return kernel_seconds(chip, elements, moved, traffic.wide, work, alone, rows)

    def _rows(self, op: Op, strategy: Strategy) -> int:
        """Rows of a tile of its largest tensor, as one device has it."""
        ins, outs = self.layouts.of(op.rule, strategy)
        tensors = zip((*op.inputs, *op.outputs), (*ins, *outs), strict=True)
        v, axes = max(tensors, key=lambda t: self.graph.values[t[0]].type.size)
        return tile_rows(self._local_shape(v, axes))

    def _local_shape(self, v: int, axes: Axes) -> list[int]:
        shape = list(self.graph.values[v].shape)
        for d, n in zip(axes, self.sizes, strict=True):
            if d > BROADCAST:
                shape[d] //= n
        return shape

    def _filled(self, op: Op, strategy: Strategy) -> float:
        """Seconds of a kernel that fills a table with zeros, but for its traffic; 0 for none."""
        f = self.chip.fitted
        if f is None or op.id not in self.adds:
            return 0.0
        ins = self.layouts.of(op.rule, strategy)[0]
        table, bits = self._local_shape(op.inputs[0], ins[0]), self._bits(op.inputs[0])
        added = math.prod(self._local_shape(op.inputs[2], ins[2])[:-1])
        if filled_inside(table, bits, added, f.filled_inside):
            return 0.0
        elements = math.prod(table)
        nbytes = elements * bits / 8
        time = kernel_seconds(self.chip, elements, nbytes, True, 0.0, True, tile_rows(table))
        return time - nbytes / f.stream

    def _bits(self, v: int) -> int:
        return self.graph.values[v].type.bits

    def _laid_anew(self, op: Op, strategy: Strategy) -> float:
        """Seconds to copy what it picks from, or overwrites a part of: a table, or a cache's slice.

        A table is copied into rows of whole tiles, and back.
        """
        if op.id in self.overwritten:
            return self._slice_laid_anew(op, strategy)
        copies, more = PASSES.get(op.name, (0, 0))
        if not copies or len(self.graph.values[op.inputs[0]].shape) != 2:
            return 0.0
        rows, width = self._local_shape(op.inputs[0], self.layouts.of(op.rule, strategy)[0][0])
        if not laid_anew((rows, width)):
            return 0.0
        nbytes = rows * self.graph.values[op.inputs[0]].type.bits / 8
        moved = nbytes * (copies * (LANES + width) + more * (LANES - width))
        time = kernel_seconds(self.chip, 0.0, moved, True)
        if self.chip.fitted and nbytes * LANES > self.near:
            # A copy is nothing but that, and so is the filling with zeros.
            lone = rows * (copies * width + (LANES if more else 0))
            time += lone * self.chip.fitted.alone
        return time

    def _slice_laid_anew(self, op: Op, strategy: Strategy) -> float:
        """Seconds of a trip's share of the copy of a whole cache before the loop."""
        v, along = op.inputs[0], self.overwritten[op.id][1]
        axes = self.layouts.of(op.rule, strategy)[0][0]
        shape = self._local_shape(v, axes)
        if along not in axes or not slice_laid_anew(shape, along):
            return 0.0
        nbytes = math.prod(shape) * self.graph.values[v].type.bits / 8
        return kernel_seconds(self.chip, 0.0, 2 * nbytes, True)

    def _elements_of(self, op: Op, strategy: Strategy) -> list[float]:
        ins, outs = self.layouts.of(op.rule, strategy)
        return [
            self.graph.values[v].type.size / _shards(axes, self.sizes)
            for v, axes in zip((*op.inputs, *op.outputs), (*ins, *outs), strict=True)
        ]

    def _halo(self, op: Op, strategy: Strategy) -> float:
        """Seconds to fetch the window's overhang from the neighbours."""
        total = 0.0
        for f, n in factor_parts(strategy, self.sizes).items():
            factor = op.rule.factors[f]
            if not factor.halo:
                continue
            axis = strategy.index(f)
            for k, dims in enumerate(op.rule.operands):
                type = self.graph.values[op.inputs[k]].type
                for d, dim in enumerate(dims):
                    if f in dim:
                        axes = operand_axes(op.rule, k, strategy, self.sizes)
                        local = type.nbytes / _shards(axes, self.sizes)
                        # The halo is counted in the operand's elements along this dim.
                        share = local * min(1.0, factor.halo * n / type.shape[d])
                        total += seconds("permute", share, self.links[axis])
        return total


def takes_time(op: Op, traffic: Traffic) -> bool:
    """Whether it does anything: of links only a slice of a stack that is converted."""
    return not op.is_link or (op.name == "scan_slice" and traffic.kernels > 0)


def _reduces(op: Op) -> bool:
    return len(op.inputs) == 1 and any(f.kind == "reduction" for f in op.rule.factors)


def _shards(axes: Axes, sizes: Sequence[int]) -> int:
    out = 1
    for e, n in zip(axes, sizes, strict=True):
        if e > BROADCAST:
            out *= n
    return out
