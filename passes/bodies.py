"""Which equations does each body of a program have?  The outermost level, loops, and branches.

For programs without calls and rematerialised parts (`autoshard.flat`): there every equation of a
body is one operation, or a loop or a branch with all that lies in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from passes.ir.graph import Graph, Op
from passes.normalize import drop_dead

Path = tuple[int | str, ...]

# Operations whose parts are not what their primitive makes of parts of the operands.
PLACED = frozenset({"ragged_dot_general", "custom_linear_solve", "shard_map"})
RANDOM = ("random_", "rng_")
_OF_LOOPS = frozenset({"scan_slice", "scan_stack", "loop_next"})


@dataclass(frozen=True, slots=True)
class Unit:
    """One equation of a body. op: where it is a single operation, else -1.

    reads: values from outside of it; makes: values that it gives the body.
    """

    path: Path
    op: int
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    effects: bool


@dataclass(frozen=True, slots=True)
class Body:
    """A body: the path before its equations' numbers, its live equations, and what it hands out."""

    path: Path
    units: tuple[Unit, ...]
    results: tuple[int, ...]


def bodies(graph: Graph, deciders: Mapping[Path, int]) -> tuple[Body, ...]:
    """The outermost level first, then the bodies of loops and branches in order."""
    alive = {op.path for op in drop_dead(graph).ops}
    found: dict[Path, None] = {}
    for op in graph.ops:
        if op.name in _OF_LOOPS:
            found[(*op.path[:-2], "body")] = None
        elif op.name == "branch_join":
            found.update({(*op.path[:-2], "branch", b): None for b in range(len(op.inputs))})
    return tuple(_body(graph, at, alive, deciders) for at in [(), *sorted(found, key=_order)])


def _order(path: Path) -> tuple[tuple[int, str], ...]:
    return tuple((p, "") if isinstance(p, int) else (-1, p) for p in path)


def _body(graph: Graph, at: Path, alive: set[Path], deciders: Mapping[Path, int]) -> Body:
    groups: dict[Path, list[Op]] = {}
    results: list[int] = [] if at else list(graph.outputs)
    branch = int(at[-1]) if at[-2:-1] == ("branch",) else -1
    around = at[:-2] if branch >= 0 else at[:-1]
    for op in graph.ops:
        if op.path not in alive:
            continue
        if op.path[: len(at)] == at and len(op.path) > len(at):
            groups.setdefault(op.path[: len(at) + 1], []).append(op)
        elif at and op.path[:-1] == (*around, "out"):
            results += op.inputs if branch < 0 else op.inputs[branch : branch + 1]
    units = tuple(_unit(path, ops, deciders) for path, ops in groups.items())
    return Body(at, units, tuple(results))


def _unit(path: Path, ops: list[Op], deciders: Mapping[Path, int]) -> Unit:
    made = {v: None for op in ops for v in op.outputs}
    reads = {v: None for op in ops for v in op.inputs if v not in made}
    reads.update({v: None for p, v in deciders.items() if p[: len(path)] == path and v not in made})
    single = len(ops) == 1 and ops[0].path == path
    effects = any(op.effects for op in ops)
    return Unit(path, ops[0].id if single else -1, tuple(reads), tuple(made), effects)
