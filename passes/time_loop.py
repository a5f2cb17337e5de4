"""A program with a part that runs in steps: `TimeLoop`.

Inputs are split over the steps of a loop (`passes.time_axis`). Each equation of the program's
outermost level is one of

  before   the same for all steps: computed once, ahead of the loop
  loop     of what is split: computed in parts, one in each step
  after    of what only the whole loop tells: of sums over all steps (the optimizer's update,
           clipping by the global norm), or of parts put together again

Loop bodies and branches go where their equation goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from passes.ir.graph import Graph, Op
from passes.time_axis import Split, View

Path = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Coupling:
    """An operation that needs, beside a part, the whole of a value that the steps make together."""

    op: int
    value: int


@dataclass(frozen=True)
class TimeLoop:
    """A program with a part that runs in steps.

    views: what a step sees of each value. phases: by the path of each equation of the outermost
    level "before", "loop" or "after". cut: operands, whole so far, of which an operation takes a
    part, by (operation, operand). once: operands that count in the first step only (what a scatter
    adds to, what a loop adds to sums of its own). couplings: what keeps more from running in steps.
    ahead: operations computed ahead because others need their whole result.
    """

    graph: Graph
    steps: int
    seeds: Mapping[int, Split]
    views: tuple[View, ...]
    phases: Mapping[Path, str]
    cut: Mapping[tuple[int, int], Split]
    once: frozenset[tuple[int, int]]
    couplings: tuple[Coupling, ...]
    ahead: tuple[int, ...]

    @cached_property
    def by_path(self) -> Mapping[Path, Op]:
        """Every operation by its path."""
        return {op.path: op for op in self.graph.ops}

    @cached_property
    def share(self) -> float:
        """The part of the program's FLOPs that runs in steps."""
        inside = total = 0.0
        for op in self.graph.ops:
            flops = op.rule.flops * self.graph.trips(op.region)
            total += flops
            if self.phases[unit_path(op)] == "loop":
                inside += flops
        return inside / total if total else 0.0


def unit_path(op: Op) -> Path:
    """The path of the outermost equation that an operation belongs to, calls inlined."""
    for k, part in enumerate(op.path):
        if isinstance(part, str):
            return op.path[:k]
    return op.path
