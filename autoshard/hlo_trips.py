"""How often does a loop of a compiled program run?

XLA:CPU and XLA:GPU write `known_trip_count` beside a loop; XLA:TPU does not. There the condition
compares a counter with a bound, and both follow from the loop's first values and its body: these
few scalar operations are computed here.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
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


def trip_count(module: Module, loop: Instruction, home: Computation) -> int | None:
    """Trips of a while instruction of a computation; None where they can not be read."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    called = loop.called()
    condition = module.computations[called["condition"][0]]
    body = module.computations[called["body"][0]]
    first = _Scalars(module, home, {})
    test = _test_of(module, condition)
    if test is None:
        return None
    where, compare = test
    begin = _Elements(lambda k: first.element(loop.operands[0], k))
    values = _Scalars(module, condition, {0: begin})
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

    def __init__(self, at: Callable[[int], int | None]) -> None:
        self.at = at


class _Scalars:
    """Whole numbers that instructions of one computation stand for; None for what is not known."""

    def __init__(self, module: Module, home: Computation, given: Mapping[int, Any]) -> None:
        self.module, self.home, self.given = module, home, given

    def value(self, name: str) -> Any:
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
            return None if a is None or b is None else _ARITHMETIC[i.opcode](a, b)
        if i.opcode == "fusion":
            inner = self.inside(i)
            return inner.value(inner.home.root.name)
        return None

    def inside(self, fusion: Instruction) -> _Scalars:
        called = self.module.computations[fusion.called()["calls"][0]]
        return _Scalars(
            self.module, called, {k: self.value(o) for k, o in enumerate(fusion.operands)}
        )

    def element(self, name: str, index: int) -> Any:
        """One element of a tuple."""
        i = self.home.by_name.get(name)
        if i is None:
            return None
        if i.opcode == "tuple":
            return self.value(i.operands[index])
        if i.opcode == "parameter":
            whole = self.given.get(int(i.literal))
            return whole.at(index) if isinstance(whole, _Elements) else None
        if i.opcode in _AS_IT_IS:
            return self.element(i.operands[0], index)
        if i.opcode == "fusion":
            inner = self.inside(i)
            return inner.element(inner.home.root.name, index)
        return None


Where = Callable[[_Scalars, str], Any]


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
    """Which element of the loop's tuple an operand of the comparison is; None for a constant."""
    asked: list[int] = []

    def at(k: int) -> int:
        asked.append(k)
        return 0

    where(_Scalars(module, condition, {0: _Elements(at)}), name)
    return asked[0] if len(asked) == 1 else None


def _step(module: Module, body: Computation, index: int | None, begin: _Elements) -> int | None:
    """By how much a trip changes an element of the loop's tuple."""
    if index is None:
        return 0
    before = begin.at(index)
    after = _Scalars(module, body, {0: begin}).element(body.root.name, index)
    return None if before is None or after is None else after - before
