"""What do all reshards between two lists of shardings cost?  A matrix for an edge of the Problem.

Thousands of values are resharded between the same few shardings, each with its own size. So every
sharding and every sequence of steps gets a number; the sequence between two shardings is looked up
once, and a matrix is picked from the seconds that each sequence takes for a value of that size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cost_models.topology import AxisLink
from passes.reshard import Axes, Step, reshard_seconds, steps
from passes.solve.problem import INFINITY, Costs

PICO = 1e12  # picoseconds in a second

Numbers = npt.NDArray[np.intp]
_UNKNOWN = -1


class ReshardTable:
    """Reshard costs on one mesh, in picoseconds."""

    def __init__(self, sizes: tuple[int, ...], links: Sequence[AxisLink]) -> None:
        self._sizes, self._links = sizes, links
        self._shardings: dict[Axes, int] = {}
        self._sequences: dict[tuple[Step, ...] | None, int] = {}
        self._between = np.full((64, 64), _UNKNOWN, np.intp)  # numbers of shardings to a sequence's
        self._lists: dict[int, tuple[Numbers, object]] = {}
        self._once: dict[float, Costs] = {}
        self._matrices: dict[tuple[int, int, float, float], Costs] = {}

    def matrix(
        self, source: tuple[Axes, ...], target: tuple[Axes, ...], nbytes: float, trips: float
    ) -> Costs:
        """Picoseconds from every source to every target sharding, `trips` times a step."""
        key = (id(source), id(target), nbytes, trips)
        if key not in self._matrices:
            sequences = self._found(self._numbers(source), self._numbers(target))
            once = self._picoseconds(nbytes)[sequences]
            self._matrices[key] = np.where(once < INFINITY, np.round(once * trips), INFINITY)
        return self._matrices[key]

    def _numbers(self, axes: tuple[Axes, ...]) -> Numbers:
        if id(axes) not in self._lists:
            given = self._shardings
            numbers = np.array([given.setdefault(a, len(given)) for a in axes], np.intp)
            self._lists[id(axes)] = numbers, axes  # the list stays alive, so that its id stays its
            while len(self._between) < len(given):
                self._between = np.pad(
                    self._between, (0, len(self._between)), constant_values=_UNKNOWN
                )
        return self._lists[id(axes)][0]

    def _found(self, rows: Numbers, columns: Numbers) -> Numbers:
        """[row, column]: the sequence of steps; those not known yet are looked up."""
        found = self._between[np.ix_(rows, columns)]
        at, to = np.nonzero(found == _UNKNOWN)
        if len(at):
            axes, given = list(self._shardings), self._sequences
            pairs = dict.fromkeys(zip(rows[at].tolist(), columns[to].tolist(), strict=True))
            for i, j in pairs:
                moves = steps(axes[i], axes[j], self._sizes)
                self._between[i, j] = given.setdefault(moves, len(given))
            found = self._between[np.ix_(rows, columns)]
        return found

    def _picoseconds(self, nbytes: float) -> Costs:
        """Per sequence its time for a value of this many bytes."""
        known = self._once.get(nbytes)
        if known is None or len(known) < len(self._sequences):
            self._once[nbytes] = known = np.array(
                [
                    INFINITY if s is None else reshard_seconds(s, nbytes, self._links) * PICO
                    for s in self._sequences
                ]
            )
        return known
