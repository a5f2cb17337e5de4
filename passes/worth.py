"""What would more memory save?  The prices of memory that the bound came from, in words.

At these prices per byte and moment the relaxed problem costs what the limit makes it cost; so by
them its bound falls for each byte more (Everett, Operations Research 11(3), 1963). The plan falls
by about as much: by more or less where it has to change as a whole.
"""

from __future__ import annotations

import math

from cost_models.units import format_bytes, format_seconds
from passes.ir.text import line_text
from passes.priced import Priced
from passes.reshard_table import PICO
from passes.solve.problem import Solution

_MOST = 2.0**30  # bytes that the sentence speaks of, and
_SHARE = 1 / 8  # of the limit at most
_LEAST = 1e-3  # of the step, is worth a word


def worth_of_memory(priced: Priced, solution: Solution) -> list[str]:
    """Where memory binds and what more of it would save; nothing where that is next to nothing."""
    limit = priced.problem.limit
    if not solution.prices or limit is None:
        return []
    unit = min(_MOST, 2.0 ** math.floor(math.log2(max(1.0, _SHARE * limit))))
    saved = {time: price * unit / PICO for time, price in solution.prices}
    total = sum(saved.values())
    if total < _LEAST * (solution.cost / PICO + priced.constant):
        return []
    time = max(saved, key=lambda t: (saved[t], -t))
    more = len(saved) - 1
    also = f" and at {more} other moment{'s' if more > 1 else ''}" if more else ""
    return [
        f"memory binds {moment(priced, time)}{also}: {format_bytes(unit)} more would save about "
        f"{format_seconds(total)} a step"
    ]


def moment(priced: Priced, time: int) -> str:
    """A step of the program in words: where the user's code does what runs then."""
    order = priced.live.order
    if time >= len(order):
        return "at the end"
    op = priced.graph.ops[order[time]]
    return f"at {line_text(op.source)}, {op.name}"
