"""How often does a loop of a compiled program run?

XLA:CPU and XLA:GPU write `known_trip_count` beside a loop; XLA:TPU does not. There the condition
compares a counter with a bound, and both follow from the loop's first values and its body: these
few scalar operations are computed here.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autoshard.hlo import Computation, Instruction, Module

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
}
_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "NE": operator.ne,
}
_AS_IT_IS = frozenset({"copy", "bitcast", "convert", "reshape", "copy-done", "copy-start"})
_MOST = 1 << 22  # trips that are counted one by one


def trip_count(loop: Instruction, first: Scalars) -> int | None:
    """Trips of a while instruction; None where they can not be read.

    first: the scalars of the computation in which it stands.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    module, called = first.module, loop.called()
    condition = module.computations[called["condition"][0]]
    body = module.computations[called["body"][0]]
    test = _test_of(module, condition)
    if test is None:
        return None
    where, compare = test
    begin = _Elements(lambda k: first.element(loop.operands[0], k))
    values = Scalars(module, condition, {0: begin})
    ends = [where(values, o) for o in compare.operands]
    counters = [_counter(module, condition, where, o) for o in compare.operands]
    direction = _COMPARED.get(compare.attribute("direction") or "")
    if None in ends or direction is None:
        return None
    steps = [_step(module, body, k, begin) for k in counters]
    if None in steps:
        return None
    a, b = ends
    trips = 0
    while direction(a, b) and trips < _MOST:
        a, b, trips = a + steps[0], b + steps[1], trips + 1
    return trips if trips < _MOST else None


class _Elements:
    """Elements of a tuple, each computed when it is asked for."""

    def __init__(self, at: Callable[[int], Any]) -> None:
        self.at = at


@dataclass(frozen=True, slots=True)
class _Element:
    """An element of a tuple whose number is not known yet."""

    index: int


class Scalars:
    """Whole numbers that instructions of one computation stand for; None for what is not known."""

    def __init__(self, module: Module, home: Computation, given: Mapping[int, Any]) -> None:
        self.module, self.home, self.given = module, home, given

    def value(self, name: str) -> Any:
        """What an instruction makes: a number, or the elements of a tuple."""
        i = self.home.by_name.get(name)
        if i is None:
            return None
        if i.opcode == "constant":
            return int(i.literal) if re.fullmatch(r"-?\d+", i.literal) else None
        if i.opcode == "parameter":
            return self.given.get(int(i.literal))
        if i.opcode in _AS_IT_IS and i.operands:
            return self.value(i.operands[0])
        if i.opcode == "get-tuple-element":
            return self.element(i.operands[0], int(i.attribute("index") or 0))
        if i.opcode in _ARITHMETIC:
            a, b = (self.value(o) for o in i.operands)
            known = isinstance(a, int) and isinstance(b, int)
            return _ARITHMETIC[i.opcode](a, b) if known else None
        if i.opcode == "tuple":
            return _Elements(lambda k: self.value(i.operands[k]))
        if i.opcode in ("fusion", "call"):
            inner = self.inside(i)
            return inner.value(inner.home.root.name)
        return None

    def inside(self, caller: Instruction) -> Scalars:
        """The scalars of the computation that a fusion or a call runs."""
        called = self.module.computations[next(iter(caller.called().values()))[0]]
        return Scalars(
            self.module, called, {k: self.value(o) for k, o in enumerate(caller.operands)}
        )

    def element(self, name: str, index: int) -> Any:
        """One element of a tuple."""
        whole = self.value(name)
        return whole.at(index) if isinstance(whole, _Elements) else None


Where = Callable[[Scalars, str], Any]


def _test_of(module: Module, condition: Computation) -> tuple[Where, Instruction] | None:
    """The comparison that a condition gives back, and how its operands are computed."""
    root = condition.root
    while root.opcode in _AS_IT_IS:
        root = condition.by_name[root.operands[0]]
    if root.opcode == "compare":
        return (lambda values, name: values.value(name)), root
    if root.opcode == "fusion":
        inner = module.computations[root.called()["calls"][0]].root
        if inner.opcode == "compare":
            return (lambda values, name: values.inside(root).value(name)), inner
    return None


def _counter(module: Module, condition: Computation, where: Where, name: str) -> int | None:
    """Which element of the loop's tuple an operand of the comparison is; None for no such."""
    found = where(Scalars(module, condition, {0: _Elements(_Element)}), name)
    return found.index if isinstance(found, _Element) else None


def _step(module: Module, body: Computation, index: int | None, begin: _Elements) -> int | None:
    """By how much a trip changes an element of the loop's tuple."""
    if index is None:
        return 0
    before = begin.at(index)
    after = Scalars(module, body, {0: begin}).element(body.root.name, index)
    return None if before is None or after is None else after - before
