"""Which tables does XLA:TPU lay anew, and what do their copies take?

XLA:TPU lays a table of few columns with its rows along the lanes, without any waste. From one of
many rows it picks rows as it lies. A table of fewer it lays anew, each row in a tile's row, and
updates it there: 128 elements for each of the few. So it does with the state that is updated by
the table's gradient. On v5e it makes all copies when a step begins, on v6e that of the table when
rows are picked, and those of the rest for the update; on v5p either (`Fitted.relaid_first`). (Seen
on tables of 8 to 64 columns and 65536 to 2^21 rows; between 2^18 and 2^19 rows the turn was not
looked for. With 4 columns the gradient is laid back before the update, and no copy lies there for
long.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cost_models.fitted import LANES
from passes.ir.graph import Graph, Type
from passes.ir.sharding import BROADCAST
from passes.liveness import Liveness

_AS_IT_LIES = 2**19
_NARROWEST = 8

# How often memory is passed over for that: once to copy the table for a gather; for its gradient
# three times to copy it and the state that is updated with it, there and back, once to fill it with
# zeros and five times to update both. Counted in a step of Adagrad on v5e.
PASSES = {"gather": (1, 0), "scatter-add": (3, 6)}

_NEVER: Mapping[int, tuple[int, int]] = {}


def laid_anew(shape: Sequence[int]) -> bool:
    """Whether a table of this shape on one device is laid anew by those who pick rows of it."""
    return len(shape) == 2 and LANES <= shape[0] < _AS_IT_LIES and shape[1] < LANES


def copy_bytes(type: Type, axes: Sequence[int], sizes: Sequence[int]) -> float:
    """Bytes per device of a table's copy in whole tiles; 0 where it is not laid anew."""
    shape = list(type.shape)
    for d, n in zip(axes, sizes, strict=True):
        if d > BROADCAST:
            shape[d] //= n
    kept = laid_anew(shape) and shape[1] >= _NARROWEST
    return shape[0] * LANES * type.bits / 8 if kept else 0.0


def copied(
    graph: Graph, live: Liveness, platform: str, early: bool = False
) -> Mapping[int, tuple[int, int]]:
    """Per table that is picked from, or updated so, the steps during which a copy of it lies there.

    Whether it has one depends on its sharding: copy_bytes. early: the copies of what is given are
    made when a step begins, as `Fitted.relaid_first` has it.
    """
    if platform != "tpu":
        return _NEVER
    found: dict[int, tuple[int, int]] = {}

    def note(v: int, step: int) -> None:
        first = live.spans[v][0] if early or graph.values[v].kind == "result" else step
        begin = found[v][0] if v in found else max(0, first)
        found[v] = begin, max(step + 1, found.get(v, (0, 0))[1])

    updates: dict[int, Type] = {}  # the gradients, and what is made of them
    for op in graph.ops:
        first = op.inputs[0] if op.inputs else -1
        if op.name in PASSES and len(graph.values[first].shape) == 2:
            table = op.outputs[0] if op.name == "scatter-add" else first
            note(table, live.when[op.id])
            if op.name == "scatter-add":
                updates[table] = graph.values[table].type
        gradient = next((updates[v] for v in op.inputs if v in updates), None)
        if gradient is None or not op.rule.fuses:
            continue
        for v in op.inputs:
            if graph.values[v].type == gradient and (
                v in updates or graph.values[v].kind != "result"
            ):
                note(v, live.when[op.id])
        updates |= {v: gradient for v in op.outputs if graph.values[v].type == gradient}
    return {v: span for v, span in found.items() if live.stored[v]}
