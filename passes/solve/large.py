"""How is a large core made smaller, or solved as well as time allows?

Prices and messages (`ascent`) give a bound and first choices that fit; trees make these better
(`trees`); what can not be part of anything better is dropped, and the rest is reduced again. This
goes on until the core is small enough for exact search, or the meter stops it.
"""

from __future__ import annotations

import numpy as np

from passes.solve.ascent import Ascent
from passes.solve.meter import Meter
from passes.solve.presolve import reduce_again
from passes.solve.reduction import Core
from passes.solve.tables import Pool
from passes.solve.trees import Trees

_STEPS = 400  # of an ascent
_TRIES = 12  # of a quarter of that each, for a first choice that fits
_ROUNDS = 60  # of trees between ascents
_FEW = 0.67  # of all choices, from which it pays to reduce again
_THETAS = (1.0, 0.5, 0.25, 0.12)


def shrink(core: Core, pool: Pool, meter: Meter, edges: int) -> Core:
    """The core less what is in no better choice: at most so many edges, or none that fits is found.

    Raises Stop when the meter stops it, Infeasible when nothing better is left.
    """
    ascent = Ascent(core, meter)
    if not meter.choice and not _first(ascent, meter):
        return core
    for theta in _THETAS:
        ascent.climb(_STEPS, theta, meter.cost)
    while core.edges > edges:
        _improve(ascent, meter)
        smaller = reduce_again(core, ascent.kept(meter.cost), pool)
        again = Ascent(smaller, meter)
        again.start_from(ascent)
        core, ascent = smaller, again
        for theta in _THETAS[1:]:
            ascent.climb(_STEPS // 2, theta, meter.cost)
    return core


def _improve(ascent: Ascent, meter: Meter) -> None:
    """Improve the best choice until a third of all choices can not be in a better one."""
    core = ascent.core
    start = core.place(meter.choice)
    if (start < 0).any():  # one that the caller gave, and presolve has dropped
        start = ascent.decoded()
        if ascent.rows.over(start).max(initial=-1.0) > 0:
            return
    trees = Trees(core, ascent.messages.graph, ascent.plain, start, meter)
    while sum(map(len, ascent.kept(meter.cost))) > _FEW * sum(core.sizes):
        trees.improve(_ROUNDS, ascent.memory())
        ascent.climb(_STEPS // 4, _THETAS[-1], meter.cost)


def _first(ascent: Ascent, meter: Meter) -> bool:
    """Climb towards a target that rises, until a choice fits; whether one did."""
    target = np.inf
    for _ in range(_TRIES):
        if ascent.bound == -np.inf:
            ascent.climb(20, 0.0, 0.0)
        if not target < np.inf or ascent.bound > 0.8 * target:
            target = ascent.bound + 0.5 * abs(ascent.bound) + 1.0
        ascent.climb(_STEPS // 4, _THETAS[0], target)
        if meter.choice:
            return True
    return False
