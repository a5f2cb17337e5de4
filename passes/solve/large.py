"""How is a large core made smaller, or solved as well as time allows?

Prices and messages (`ascent`) give a bound and choices that fit; trees make these better (`trees`),
from the best one so far and from new ones, for the trees that start elsewhere end elsewhere; what
can not be part of anything better is dropped, and the rest is reduced again. This goes on until
the core is small enough for exact search, or the meter stops it.
"""

from __future__ import annotations

import itertools

import numpy as np

from passes.solve.ascent import Ascent
from passes.solve.memory import Indices
from passes.solve.meter import Meter
from passes.solve.presolve import reduce_again
from passes.solve.reduction import Core
from passes.solve.tables import Pool
from passes.solve.trees import Trees

# What follows was chosen on instances A, K, M and S of the IOPDDL contest (tests/data/iopddl).
_STEPS = 400  # of an ascent
_TRIES = 12  # of a quarter of that each, for a first choice that fits
_ROUNDS = 60  # of trees from one choice
_FRESH = 2  # how often from a choice that the ascent has just met
_FEW = 0.67  # of all choices, from which it pays to reduce again
_THETAS = (1.0, 0.5, 0.5, 0.25, 0.12)


def shrink(core: Core, pool: Pool, meter: Meter, edges: int) -> Core:
    """The core less what is in no better choice: at most so many edges, or none that fits is found.

    Raises Stop when the meter stops it, Infeasible when nothing better is left.
    """
    ascent = Ascent(core, meter)
    if not meter.choice and not _first(ascent, meter):
        return core
    turns = itertools.chain(_THETAS, itertools.cycle(_THETAS[-3:]))
    while core.edges > edges:
        ascent.climb(_STEPS, next(turns), meter.cost)
        for start in _starts(ascent, meter):
            Trees(core, ascent.messages.graph, ascent.plain, start, meter).improve(
                _ROUNDS, ascent.memory()
            )
        kept = ascent.kept(meter.cost)
        if sum(map(len, kept)) <= _FEW * sum(core.sizes):
            smaller = reduce_again(core, kept, pool)
            again = Ascent(smaller, meter)
            again.start_from(ascent)
            core, ascent = smaller, again
    return core


def _starts(ascent: Ascent, meter: Meter) -> list[Indices]:
    """The best choice, where it is one of the core's, and what the ascent has met that fits."""
    best = ascent.core.place(meter.choice)  # -1: one that the caller gave, and presolve has dropped
    found = [best] if (best >= 0).all() else []
    return found + [c for c in [ascent.fitting] * _FRESH if c is not None]


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
