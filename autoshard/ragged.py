"""How is a dim cut into blocks that do not divide it?  Rows of nothing are added at its end.

A dim of `high * length * low` elements is cut along its length: step t of n has (h, j * n + t, l)
for all h, j and l. Where n does not divide the length, the last rows of some steps are past its
end. They are computed like others, from zeros, are left out of sums, and cut off at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.step import Shape, parts_of, whole_of
from passes.time_axis import Split, View


@dataclass(frozen=True, slots=True)
class Cutting:
    """A length, and into how many blocks it is cut."""

    length: int
    blocks: int

    @property
    def rows(self) -> int:
        """Of a block, along the length."""
        return -(-self.length // self.blocks)

    @property
    def is_ragged(self) -> bool:
        """Whether some rows are past the end."""
        return self.rows * self.blocks > self.length

    def local(self, shape: Sequence[int], view: View) -> Shape:
        """The shape of what a block has of a value."""
        if not isinstance(view, Split):
            return tuple(shape)
        n = shape[view.dim] // self.length * self.rows
        return (*shape[: view.dim], n, *shape[view.dim + 1 :])

    def apart(self, x: Any, part: Split) -> Any:
        """All blocks of x, one after the other along a new first dim."""
        return parts_of(self.filled(x, part), part, self.blocks)

    def filled(self, x: Any, part: Split) -> Any:
        """x with rows of zeros at the end of its length."""
        if not self.is_ragged:
            return x
        shape, d = jnp.shape(x), part.dim
        rows = jnp.reshape(x, (*shape[:d], *self._rows(shape, part), *shape[d + 1 :]))
        more = self.rows * self.blocks - self.length
        config = [(0, more if k == d + 1 else 0, 0) for k in range(rows.ndim)]
        return jnp.reshape(lax.pad(rows, rows.dtype.type(0), config), self._whole(shape, part))

    def joined(self, stacked: Any, part: Split, shape: Shape) -> Any:
        """The value of this shape, of its blocks."""
        whole = whole_of(stacked, part, self._whole(shape, part))
        if not self.is_ragged:
            return whole
        d = part.dim
        high, _, low = self._rows(shape, part)
        rows = jnp.reshape(whole, (*shape[:d], high, self.rows * self.blocks, low, *shape[d + 1 :]))
        return jnp.reshape(lax.slice_in_dim(rows, 0, self.length, axis=d + 1), shape)

    def places(self, size: int, part: Split, time: Any) -> Any:
        """Where a block's elements of a dim of this size are in it."""
        own = lax.iota(jnp.int32, size // self.length * self.rows)
        low, rows = np.int32(part.low), np.int32(self.rows)
        row, rest = (own, np.int32(0)) if part.low == 1 else (own // low, own % low)
        high, j = (row, np.int32(0)) if self.rows == 1 else (row // rows, row % rows)
        at = j * np.int32(self.blocks) + jnp.asarray(time, jnp.int32)
        return (high * np.int32(self.length) + at) * low + rest

    def within(self, x: Any, part: Split, time: Any) -> Any:
        """A block's part of a value, with zeros for rows past the end."""
        if not self.is_ragged:
            return x
        own = lax.iota(jnp.int32, jnp.shape(x)[part.dim])
        j = own // np.int32(part.low) % np.int32(self.rows)
        there = j * np.int32(self.blocks) + jnp.asarray(time, jnp.int32) < self.length
        there = lax.broadcast_in_dim(there, jnp.shape(x), (part.dim,))
        return lax.select(there, x, jnp.zeros_like(x))

    def _rows(self, shape: Sequence[int], part: Split) -> Shape:
        return shape[part.dim] // (self.length * part.low), self.length, part.low

    def _whole(self, shape: Sequence[int], part: Split) -> Shape:
        n = shape[part.dim] // self.length * self.rows * self.blocks
        return (*shape[: part.dim], n, *shape[part.dim + 1 :])
