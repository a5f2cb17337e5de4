"""Which cost arrays are the same?  A pool that makes each distinct array once.

A traced model repeats its layers, so thousands of edges share a few dozen matrices. The pool keeps
one object for each content; two arrays out of one pool are equal when they are the same object.
What is computed from arrays (a restriction, a sum, a transpose, which choices another dominates)
is then remembered by identity, and a repeated layer costs a dictionary look-up.

>>> pool = Pool()
>>> a = pool.intern(np.array([[1.0, 2.0], [3.0, 4.0]]))
>>> pool.intern(a + 0.0) is a, pool.turned(pool.turned(a)) is a
(True, True)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from passes.solve.problem import INFINITY, Costs

Picks = npt.NDArray[np.intp]
T = TypeVar("T")


class Pool:
    """Distinct arrays, and what has been computed from them. Nobody may write to its arrays."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[tuple[int, ...], bytes], Costs] = {}
        self._results: dict[Hashable, object] = {}
        self._given: dict[int, tuple[Costs, Costs]] = {}

    def read(self, costs: Costs) -> Costs:
        """The pool's copy of a problem's array, with numpy's infinity for INFINITY and above."""
        known = self._given.get(id(costs))
        if known is None:
            made = self.intern(np.where(costs >= INFINITY, np.inf, costs).astype(np.float64))
            known = self._given[id(costs)] = (
                costs,
                made,
            )  # holds costs, so that its id stays taken
        return known[1]

    def intern(self, array: Costs) -> Costs:
        """The pool's array with this content."""
        array = np.ascontiguousarray(array)
        digest = hashlib.blake2b(array.data, digest_size=16).digest()
        return self._arrays.setdefault((array.shape, digest), array)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` gives, computed once for each key (ids of pooled arrays may be in it)."""
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]  # type: ignore[return-value]

    def turned(self, a: Costs) -> Costs:
        """The transpose of a matrix."""
        return self.once(("turned", id(a)), lambda: self.intern(a.T))

    def rows(self, a: Costs, picks: Picks) -> Costs:
        """The picked rows of a matrix, or entries of a vector; a pick may repeat."""
        return self.once(("rows", id(a), picks.tobytes()), lambda: self.intern(a[picks]))

    def add(self, a: Costs, b: Costs) -> Costs:
        """The sum of two arrays of one shape."""
        return self.once(("add", id(a), id(b)), lambda: self.intern(a + b))
