"""What is an array whose layers lie on several stages, and not in an order that jax can say?

A schedule whose stages have several pieces of the model puts, of 32 stacked layers, say 0 to 7 and
16 to 23 on the first of two stages; and pieces may differ in length. No sharding of a `jax.Array`
says either. Put together on one stage, or passed on to where they would lie in order, such an array
would take memory, or time in every step, for nothing: the next step wants the pieces where they
are. So they stay there, as a `StackedArray`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class StackedArray:
    """Pieces of an array [layers, ...], in order, each a jax.Array on the stage that updates it.

    The compiled function of a pipeline takes it as it takes an array. `x[layer]` is a layer, where
    it lies; `np.asarray(x)` is the whole on the host, `jnp.asarray(x)` where the first piece lies.
    """

    __array_priority__ = 100

    def __init__(self, pieces: tuple[jax.Array, ...]) -> None:
        self.pieces = pieces
        self.begins = (0, *accumulate(len(p) for p in pieces))
        self.shape = (self.begins[-1], *pieces[0].shape[1:])
        self.dtype = pieces[0].dtype
        self.ndim = len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return sum(p.size for p in self.pieces)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return sum(p.nbytes for p in self.pieces)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, (int, np.integer)):
            return jnp.asarray(self)[key]
        layer = int(key) + (len(self) if key < 0 else 0)
        for begin, piece in zip(self.begins, self.pieces, strict=False):
            if begin <= layer < begin + len(piece):
                return piece[layer - begin]
        raise IndexError(f"layer {key} of an array of {len(self)}")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the pieces of a StackedArray are copied to be one array")
        whole = np.concatenate([np.asarray(p) for p in self.pieces])
        return whole if dtype is None else whole.astype(dtype)

    def __jax_array__(self) -> jax.Array:
        first = self.pieces[0].sharding
        return jnp.concatenate([jax.device_put(p, first) for p in self.pieces])

    def part(self, begin: int, end: int) -> Any:
        """Layers from begin on, before end: a piece as it lies, else put together."""
        for at, piece in zip(self.begins, self.pieces, strict=False):
            if (at, at + len(piece)) == (begin, end):
                return piece
        return jnp.asarray(self)[begin:end]

    def block_until_ready(self) -> StackedArray:
        """Wait until all pieces have been computed."""
        for p in self.pieces:
            p.block_until_ready()
        return self

    def is_deleted(self) -> bool:
        """Whether the memory of a piece has been given to another array."""
        return any(p.is_deleted() for p in self.pieces)

    def __repr__(self) -> str:
        lengths = ", ".join(str(len(p)) for p in self.pieces)
        sizes = ",".join(map(str, self.shape))
        return f"StackedArray({self.dtype}[{sizes}] of {lengths} layers)"
