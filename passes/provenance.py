"""Why is this value split along this axis?  The chain of operations back to a hint.

>>> from passes.ir.mesh import Mesh
>>> from passes.ir.parse import parse_graph
>>> from passes.propagate import propagate
>>> graph = parse_graph('''
... graph f
...   arg  x  f32[8,16]
...   hint x  [data, ?]  train.py:3
...   %0 = exp x  f32[8,16]  i j -> i j  train.py:5
...   out  %0
... ''')
>>> print(propagate(graph, Mesh.parse("data=4")).explain(1, "data"))
the result of exp (train.py:5), f32[8,16]: data splits dim 0
  from x, f32[8,16], through exp (train.py:5)
  x, f32[8,16]: data splits dim 0, hinted by train.py:3 as [data, ?]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from passes.anchors import describe
from passes.ir.graph import Graph, Hint
from passes.ir.text import hint_text


@dataclass(frozen=True, slots=True)
class Arrival:
    """How an axis came to a group of tied values: at which value, along which dim, and whence.

    hint: the hint that put it there, or None; then `op` carried it over from `source`.
    """

    value: int
    dim: int
    hint: Hint | None = None
    op: int = -1
    source: int = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One link of the chain: the axis splits this dim of this value, because ...

    op: ... this operation carried it over from the value of the next step. hint: ... the user said
    so. Neither: ... it is tied to the value of the next step.
    """

    value: int
    dim: int
    op: int | None = None
    hint: Hint | None = None


def chain(
    arrivals: Sequence[Mapping[int, Arrival]], group: Sequence[int], value: int, axis: int
) -> Iterator[Step]:
    """The steps from a value back to a hint; none when the axis does not split the value."""
    while (came := arrivals[group[value]].get(axis)) is not None:
        if came.value != value:
            yield Step(value, came.dim)
            value = came.value
        if came.hint is not None:
            yield Step(value, came.dim, hint=came.hint)
            return
        yield Step(value, came.dim, op=came.op)
        value = came.source


def chain_text(graph: Graph, steps: Sequence[Step], axis: str) -> str:
    """The chain in words, one line per step; "" for no steps."""
    lines = []
    for n, step in enumerate(steps):
        what = f"{describe(graph, step.value)}: {axis} splits dim {step.dim}"
        if step.hint is not None:
            said = f"hinted by {step.hint.origin} as {hint_text(step.hint)}"
            lines.append(f"{'  ' if n else ''}{what}, {said}")
            continue
        if n == 0:
            lines.append(what)
        source = describe(graph, steps[n + 1].value)
        if step.op is None:
            lines.append(f"  as {source}, which it is tied to")
        else:
            op = graph.ops[step.op]
            where = f" ({op.source})" if op.source else ""
            lines.append(f"  from {source}, through {op.name}{where}")
    return "\n".join(lines)
