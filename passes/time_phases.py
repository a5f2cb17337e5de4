"""Which equations run before a loop over time, which in it, which after?  `followed(...)`.

The program is followed in its order, from the inputs that are split. What is split and is needed
whole by what is split, too, *couples* the steps: a batch norm's mean, say. Such an equation comes
after the loop, and all that depends on it, which is right, but keeps what the loop was to spare.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from passes.ir.graph import Graph, Op
from passes.time_axis import (
    INSIDE,
    LATE,
    PARTIAL,
    WHOLE,
    OverTime,
    Split,
    View,
    cut_to_make,
    over_time,
)
from passes.time_loop import Coupling, Path, TimeLoop, unit_path

_ROUNDS = 12  # until the views of a loop's carry agree; each may change once or twice
# Primitives whose parts are not what their primitive makes of parts of the operands.
_PLACED = frozenset({"ragged_dot_general", "custom_linear_solve", "shard_map"})
_RANDOM = ("random_", "rng_", "threefry")
_BARRIER = "optimization_barrier"
# Links through which a loop's body is reached by what wants a part of its results, or reaches it.
_SINKS = frozenset({"loop_enter", "scan_slice", "scan_stack", _BARRIER})


def followed(
    graph: Graph,
    seeds: Mapping[int, Split],
    steps: int,
    deciders: Mapping[Path, int],
    ahead: frozenset[int],
) -> TimeLoop:
    """The loop in which these inputs are split. ahead: operations computed whole, before it.

    deciders: by the path of a branch or while loop, the value that decides it.
    """
    return _Follow(graph, seeds, steps, deciders, ahead).run()


@dataclass
class _Unit:
    """The operations of one equation of the outermost level."""

    path: Path
    ops: list[Op] = field(default_factory=list)


class _Follow:
    """One walk through the program. ahead: operations computed whole, ahead of the loop."""

    def __init__(
        self,
        graph: Graph,
        seeds: Mapping[int, Split],
        steps: int,
        deciders: Mapping[Path, int],
        ahead: frozenset[int],
    ) -> None:
        self.graph, self.seeds, self.steps, self.deciders = graph, seeds, steps, deciders
        self.ahead = ahead
        self.views: list[View] = [WHOLE] * len(graph.values)
        for v, view in seeds.items():
            self.views[v] = view
        self.phases: dict[Path, str] = {}
        self.cut: dict[tuple[int, int], Split] = {}
        self.once: set[tuple[int, int]] = set()
        self.couplings: list[Coupling] = []
        self.zeros = _zeros(graph)
        self.entries = {op.outputs[0]: op.inputs[0] for op in graph.ops if op.name == "loop_enter"}
        self.first_round = False
        self.stuck: int | None = None  # the operation that can not run in steps, of an equation
        self.carries = {out: carry for carry, out in graph.ties}  # by what the next round gets
        self.carried = set(self.carries.values())

    def run(self) -> TimeLoop:
        units = list(_units(self.graph))
        for unit in units:
            self.phases[unit.path] = self.phase(unit)
        self.sink(units)
        return TimeLoop(
            self.graph,
            self.steps,
            self.seeds,
            tuple(self.views),
            self.phases,
            self.cut,
            frozenset(self.once),
            tuple(self.couplings),
            tuple(sorted(self.ahead)),
        )

    # phases

    def phase(self, unit: _Unit) -> str:
        """Where one equation goes, and what becomes of its results."""
        outer = self.outer(unit)
        views = [self.views[v] for v in outer]
        self.stuck = None
        if unit.ops[0].id in self.ahead:
            return self.all_are(unit, WHOLE, "before")
        if all(v is WHOLE for v in views):
            return self.all_are(unit, WHOLE, "before")
        if LATE in views:
            self.note_coupling(unit, outer)
            return self.all_are(unit, LATE, "after")
        if not self.in_loop(unit) or self.better_after(unit):
            if any(isinstance(v, Split) for v in views):
                self.note_coupling(unit, outer)
            return self.all_are(unit, LATE, "after")
        for v in (v for op in unit.ops for v in op.outputs if self.views[v] is WHOLE):
            self.views[v] = INSIDE  # what a scan makes beside parts is not there before it
        return "loop"

    def outer(self, unit: _Unit) -> list[int]:
        """The values that an equation takes from outside."""
        made = {v for op in unit.ops for v in op.outputs}
        out = {v: None for op in unit.ops for v in op.inputs if v not in made}
        for op in unit.ops:
            for path, v in self.deciding(op):
                if path == unit.path and v not in made:
                    out[v] = None
        return list(out)

    def deciding(self, op: Op) -> Iterator[tuple[Path, int]]:
        """The values that decide whether an operation runs, innermost equation last."""
        for k, part in enumerate(op.path):
            if isinstance(part, str) and op.path[:k] in self.deciders:
                yield op.path[:k], self.deciders[op.path[:k]]

    def all_are(self, unit: _Unit, view: View, phase: str) -> str:
        for op in unit.ops:
            for k in range(len(op.inputs)):
                self.cut.pop((op.id, k), None)
                self.once.discard((op.id, k))
            for v in op.outputs:
                self.views[v] = view
        return phase

    def better_after(self, unit: _Unit) -> bool:
        """Whether an operation on sums is cheaper once they are complete."""
        views = [self.views[v] for op in unit.ops for v in op.inputs]
        if len(unit.ops) > 1 or any(isinstance(v, Split) for v in views) or PARTIAL not in views:
            return False
        (op,) = unit.ops
        sums = {v for v in op.inputs if self.views[v] is PARTIAL}
        types = self.graph.values
        before = sum(types[v].type.size for v in sums)
        return sum(types[v].type.size for v in op.outputs) >= before

    def note_coupling(self, unit: _Unit, outer: Sequence[int]) -> None:
        """Remember the first value for which a part has to wait."""
        parts = [v for v in outer if isinstance(self.views[v], Split)]
        sums = [v for v in outer if self.views[v] in (LATE, PARTIAL)]
        if parts:
            op = unit.ops[0].id if self.stuck is None else self.stuck
            self.couplings.append(Coupling(op, (sums or parts)[0]))

    # operations inside the loop

    def in_loop(self, unit: _Unit) -> bool:
        """Follow the operations of an equation; whether all of them can run in steps."""
        for op in unit.ops:
            for v in op.outputs:
                self.views[v] = WHOLE
        entered: dict[int, View] = {}
        for k in range(_ROUNDS):
            before, self.first_round = dict(entered), k == 0
            self.stuck = next((op.id for op in unit.ops if not self.follow(op, entered)), None)
            if self.stuck is not None:
                return False
            if entered == before and k:
                return True
        return False

    def is_zero(self, v: int) -> bool:
        """Whether a value is zero; a loop's carry that begins as zero may turn out to be a sum."""
        return v in self.zeros or (self.first_round and self.entries.get(v, -1) in self.zeros)

    def follow(self, op: Op, entered: dict[int, View]) -> bool:
        """One operation in the loop. entered: what has been found of the carries of inner loops."""
        if op.effects or op.name in _PLACED:
            return False
        if any(self.views[v] not in (WHOLE, INSIDE) for _, v in self.deciding(op)):
            return False
        views = [self.views[v] for v in op.inputs]
        if op.name == "branch_join" or (op.name == "loop_next" and views[0] is WHOLE):
            return self.join(op, views, entered)
        if op.name == _BARRIER:  # each result is its operand
            inside = [INSIDE if view is WHOLE else view for view in views]
            self.take(op, OverTime(tuple(inside), ()))
            return LATE not in views
        for k in range(len(op.inputs)):
            self.once.discard((op.id, k))
        zeros = [k for k, v in enumerate(op.inputs) if self.is_zero(v)]
        found = over_time(op.rule, views, self.steps, zeros)
        if found is None:
            found = self.added_once(op, views, zeros)
        if found is None or not self.plain(op, found, views):
            return False
        self.take(op, found)
        if op.name == "loop_enter":
            wanted = entered.get(op.outputs[0])
            return wanted is None or self.enter(op, wanted)
        if op.name == "loop_next":
            return self.next_round(op, entered)
        return True

    def added_once(self, op: Op, views: Sequence[View], zeros: Collection[int]) -> OverTime | None:
        """Summands and what is the same in every step, added up: it counts in the first step."""
        sums = {k for k, view in enumerate(views) if view is PARTIAL}
        if not sums or not all(view in (PARTIAL, WHOLE, INSIDE) for view in views):
            return None
        group = next((set(g) for g in op.rule.linear if sums <= set(g)), None)
        if group is None:
            return None
        self.once.update((op.id, k) for k in group - sums - set(zeros))
        return OverTime((PARTIAL,) * len(op.outputs), ())

    def plain(self, op: Op, found: OverTime, views: Sequence[View]) -> bool:
        """Whether parts of the operands make the parts of the results, by the same primitive."""
        split = {k for k, _ in found.cut} | {k for k, v in enumerate(views) if isinstance(v, Split)}
        if not _runs_on(op, split, found.results):
            return False
        sums = split and op.name.startswith("scatter") and PARTIAL in found.results
        if sums and op.inputs[0] not in self.zeros:
            self.once.add((op.id, 0))
        return True

    def take(self, op: Op, found: OverTime) -> None:
        for k in range(len(op.inputs)):
            self.cut.pop((op.id, k), None)
        for k, part in found.cut:
            self.cut[op.id, k] = part
        for v, view in zip(op.outputs, found.results, strict=True):
            self.views[v] = view

    def enter(self, op: Op, wanted: View) -> bool:
        """A loop's carry that becomes split, or summands, in the course of it."""
        have, v = self.views[op.outputs[0]], op.outputs[0]
        if have == wanted:
            return True
        if have not in (WHOLE, INSIDE):
            return False
        if isinstance(wanted, Split):
            self.cut[op.id, 0] = wanted
        elif wanted is PARTIAL and op.inputs[0] not in self.zeros:
            self.once.add((op.id, 0))
        self.views[v] = wanted
        return True

    def next_round(self, op: Op, entered: dict[int, View]) -> bool:
        """What the next round of a loop gets is seen as what this one got."""
        carry = self.carries[op.outputs[0]]
        have, made = self.views[carry], self.views[op.outputs[0]]
        if have == made:
            return True
        if have in (WHOLE, INSIDE):
            entered[carry] = made
            self.views[carry] = made
            return True
        if made in (WHOLE, INSIDE) and isinstance(have, Split):
            self.cut[op.id, 0] = have
            self.views[op.outputs[0]] = have
            return True
        return False

    def join(self, op: Op, views: Sequence[View], entered: dict[int, View]) -> bool:
        """One of several values, all of which are seen in one way then."""
        if op.name == "loop_next":
            self.views[op.outputs[0]] = views[0]
            return self.next_round(op, entered)
        special = [v for v in views if v not in (WHOLE, INSIDE)]
        wanted = special[0] if special else (INSIDE if INSIDE in views else WHOLE)
        for k, view in enumerate(views):
            if view == wanted or not special:
                continue
            if view in (WHOLE, INSIDE) and isinstance(wanted, Split):
                self.cut[op.id, k] = wanted
            elif not (wanted is PARTIAL and op.inputs[k] in self.zeros):
                return False
        if wanted is LATE:
            return False
        self.views[op.outputs[0]] = wanted
        return True

    # what is the same for all steps, but of which each needs a part only

    def sink(self, units: Sequence[_Unit]) -> None:
        """Make in the loop, part by part, what nobody needs as a whole: masks, zeros, masks' bits.

        Last first, so that what they are made of follows. What a barrier gives that nobody reads
        is no reader: barriers over a kernel's results have all of them, wanted or not.
        """
        readers = self.graph.consumers()
        whole = {*self.graph.outputs, *self.deciders.values()}
        for unit in reversed(units):
            for op in reversed(unit.ops):
                if self.can_sink(op, unit) and whole.isdisjoint(op.outputs):
                    self.sink_one(op, unit, readers, whole)

    def can_sink(self, op: Op, unit: _Unit) -> bool:
        if op.is_link and (op.name not in _SINKS or self.phases[unit.path] != "loop"):
            return False
        carried = op.name == "loop_enter" and op.outputs[0] in self.carried
        if carried or op.effects or len(op.outputs) != 1 or op.id in self.ahead:
            return False
        outside = op.name in _PLACED or op.name.startswith(_RANDOM)
        return not outside and self.views[op.outputs[0]] in (WHOLE, INSIDE)

    def sink_one(
        self,
        op: Op,
        unit: _Unit,
        readers: Sequence[Sequence[tuple[int, int]]],
        whole: Collection[int],
    ) -> None:
        v, unread = op.outputs[0], dict[int, int]()  # what barriers give, by operation
        for c, k in readers[v]:
            out = self.graph.ops[c].outputs[k] if self.graph.ops[c].name == _BARRIER else -1
            if out >= 0 and not readers[out] and out not in whole:
                unread[c] = out
        live = [reader for reader in readers[v] if reader[0] not in unread]
        wanted = {self.cut.get(reader) for reader in live}
        part = wanted.pop() if len(wanted) == 1 else None
        if part is None or (op.name == "iota" and op.params.get("dimension") == part.dim):
            return
        found = cut_to_make(op.rule, 0, part, self.steps)
        if found is None or not self.plain(op, found, [WHOLE] * len(op.inputs)):
            return
        self.take(op, found)
        for reader in live:
            del self.cut[reader]
        for out in unread.values():
            self.views[out] = part
        if len(unit.ops) == 1 and not op.is_link:
            self.phases[unit.path] = "loop"


def runs_on_parts(op: Op, taken: Sequence[Split | None], made: Sequence[View]) -> bool:
    """Whether these parts of the operands make these of the results, by the same primitive."""
    return _runs_on(op, {k for k, part in enumerate(taken) if part is not None}, made)


def _runs_on(op: Op, split: Collection[int], made: Sequence[View]) -> bool:
    """The same, where so many operands are parts."""
    if not split:
        return True
    if op.name == "dynamic_update_slice" and 0 in split:
        return 1 in split
    if op.name.startswith("scatter") and 0 in split and 2 not in split:
        return False  # rows, of which each part would have to tell its own
    return not (op.name == "gather" and PARTIAL in made)


def _units(graph: Graph) -> Iterator[_Unit]:
    current = _Unit(())
    for op in graph.ops:
        path = unit_path(op)
        if path != current.path:
            if current.ops:
                yield current
            current = _Unit(path)
        current.ops.append(op)
    if current.ops:
        yield current


def _zeros(graph: Graph) -> frozenset[int]:
    """Values all of whose elements are known to be zero."""
    out = {v.id for v in graph.values if v.kind == "literal" and _is_zero(v.name)}
    same = ("broadcast_in_dim", "reshape", "convert_element_type", "copy")
    for op in graph.ops:
        if op.name in same and op.inputs and op.inputs[0] in out:
            out.update(op.outputs)
    return frozenset(out)


def _is_zero(text: str) -> bool:
    try:
        return float(text) == 0.0
    except ValueError:
        return False
