"""What do all reshards between two lists of shardings cost?  A matrix for an edge of the Problem.

Thousands of values are resharded between the same few shardings, each with its own size. So every
sharding and every sequence of steps gets a number; the sequence between two shardings is looked up
once, and a matrix is picked from the seconds that each sequence takes for a value of that size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cost_models.cluster import Chip
from cost_models.topology import AxisLink
from passes.ir.sharding import PARTIAL
from passes.reshard import WHOLE, Axes, Step, Waited, steps, waited_seconds
from passes.reshard_copies import (
    Kind,
    Moved,
    by_kind,
    copies,
    copy_seconds,
    exchanges,
    turned_seconds,
)
from passes.solve.problem import INFINITY, Costs

PICO = 1e12  # picoseconds in a second

Numbers = npt.NDArray[np.intp]
_UNKNOWN = -1


class ReshardTable:
    """Reshard costs on one mesh, in picoseconds. copying: the chip that makes `reshard_copies`."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        links: Sequence[AxisLink],
        whole_sums: bool = False,
        copying: Chip | None = None,
    ) -> None:
        self._sizes, self._links, self._whole_sums = sizes, links, whole_sums
        self._copying, self._devices = copying, math.prod(sizes)
        self._shardings: dict[Axes, int] = {}
        self._sequences: dict[tuple[Step, ...] | None, int] = {}
        self._between = np.full((64, 64), _UNKNOWN, np.intp)  # numbers of shardings to a sequence's
        self._lists: dict[int, tuple[Numbers, object]] = {}
        self._once: dict[tuple[float, Waited], Costs] = {}
        self._steps: dict[Step | None, int] = {}
        self._by_step = np.zeros((0, 0), np.intp)  # [sequence, place]: number of the step
        self._exchanges = np.zeros(0, bool)  # per sequence whether there is an all-to-all in it
        self._copies: dict[Any, list[tuple[Kind, Numbers]]] = {}
        self._matrices: dict[tuple[Any, ...], Costs] = {}

    def matrix(
        self,
        source: tuple[Axes, ...],
        target: tuple[Axes, ...],
        nbytes: float,
        trips: float,
        whole: float,
        waited: Waited = WHOLE,
        value: Moved | None = None,
    ) -> Costs:
        """Picoseconds from every source to every target sharding, `trips` times a step.

        whole: bytes of a value that is partial; its summands are sent as they are. waited: what
        a step loses by a gather. value: what is resharded, for what is copied besides.
        """
        value = value if self._copying else None
        key = (id(source), id(target), nbytes, trips, whole, waited, value)
        if key not in self._matrices:
            sequences = self._found(self._numbers(source), self._numbers(target))
            once = self._seconds(source, target, sequences, nbytes, waited, value)
            if whole != nbytes:
                partial = np.array([PARTIAL in axes for axes in source])
                other = self._seconds(source, target, sequences, whole, waited, value)
                once[partial] = other[partial]
            self._matrices[key] = np.where(once < INFINITY, np.round(once * trips), INFINITY)
        return self._matrices[key]

    def _seconds(
        self,
        source: tuple[Axes, ...],
        target: tuple[Axes, ...],
        sequences: Numbers,
        nbytes: float,
        waited: Waited,
        value: Moved | None,
    ) -> Costs:
        """[source, target]: picoseconds of one trip."""
        once: Costs = self._picoseconds(nbytes, waited)[sequences]
        if self._copying is None or value is None:
            return once
        there = self._exchanges[sequences]
        if not there.any():
            return once
        size = math.prod(value.shape)
        for kind, number in self._copied(source, target, there, value):
            if kind.tiles:
                seconds = turned_seconds(self._copying, value, kind.tiles)
            else:
                seconds = copy_seconds(
                    self._copying, size / kind.parts, nbytes / kind.parts, kind.flat
                )
            once += number * (seconds * PICO)
        return once

    def _copied(
        self,
        source: tuple[Axes, ...],
        target: tuple[Axes, ...],
        there: npt.NDArray[np.bool_],
        value: Moved,
    ) -> list[tuple[Kind, Numbers]]:
        """[source, target]: how many copies there are of each kind, by the all-to-alls there.

        Without tiles, all sizes beyond the mesh's are alike.
        """
        if not value.table:
            value = Moved(tuple([min(n, 2 * self._devices) for n in value.shape]))
        key = source, target, value
        if key not in self._copies:
            self._copies[key] = by_kind(copies(source, target, value, self._sizes), there)
        return self._copies[key]

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
            i, j = rows[at], columns[to]
            self._between[i, j] = self._looked_up(i, j)
            found = self._between[np.ix_(rows, columns)]
        return found

    def _looked_up(self, i: Numbers, j: Numbers) -> Numbers:
        """The sequences from shardings i to shardings j; of pairs that are alike one is asked."""
        axes = np.array(list(self._shardings), np.intp)
        pairs = np.concatenate([axes[i], axes[j]], axis=1)
        _, first, which = np.unique(_alike(pairs), return_index=True, return_inverse=True)
        n = len(self._sizes)
        sequences = []
        for pair in pairs[first].tolist():
            moves = steps(tuple(pair[:n]), tuple(pair[n:]), self._sizes, self._whole_sums)
            sequences.append(self._sequences.setdefault(moves, len(self._sequences)))
        return np.array(sequences, np.intp)[which]

    def _picoseconds(self, nbytes: float, waited: Waited) -> Costs:
        """Per sequence what a step waits for a value of this many bytes."""
        known = self._once.get((nbytes, waited))
        if known is None or len(known) < len(self._sequences):
            self._learn()
            times = np.array([self._step_seconds(s, nbytes, waited) for s in self._steps])
            self._once[nbytes, waited] = known = times[self._by_step].sum(axis=1) * PICO
        return known

    def _learn(self) -> None:
        """Split new sequences into their steps: thousands of sequences share few different ones."""
        if len(self._by_step) == len(self._sequences):
            return
        rows = [
            [self._steps.setdefault(s, len(self._steps)) for s in (_NO_WAY if q is None else q)]
            for q in self._sequences
        ]
        longest = max(map(len, rows), default=0)
        self._exchanges = np.array([exchanges(q or ()) for q in self._sequences], bool)
        rest = self._steps.setdefault(_NOTHING, len(self._steps))
        self._by_step = np.array([[*r, *[rest] * (longest - len(r))] for r in rows], np.intp)

    def _step_seconds(self, step: Step | None, nbytes: float, waited: Waited) -> float:
        if step is None:
            return INFINITY
        return waited_seconds([step], nbytes, self._links, waited)


_NO_WAY = (None,)
_NOTHING = Step("slice", 0, 0.0, 0.0)


def _alike(pairs: Numbers) -> npt.NDArray[Any]:
    """A number per pair of shardings (a row), the same where only the names of dims differ.

    >>> _alike(np.array([[0, -1, 1, -1], [3, -1, 0, -1], [0, -1, 0, -1]])).tolist()
    [332, 332, 296]
    """
    width = pairs.shape[1]
    mention = (pairs[:, :, None] == pairs[:, None, :]).argmax(axis=2)  # where an entry is first met
    dim = pairs >= 0
    new = dim & (mention == np.arange(width))
    number = np.take_along_axis(np.cumsum(new, axis=1) - 1, mention, axis=1)
    digits = np.where(dim, number, pairs) + 2  # B and P are -1 and -2
    whole = np.intp if (width + 2) ** width < 2**63 else object
    return np.asarray(
        digits.astype(whole) @ np.array([(width + 2) ** k for k in range(width)], whole)
    )
