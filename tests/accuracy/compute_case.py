"""One operation to compile, as one row of a table holds it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, slots=True)
class Case:
    """dtypes: of the operands, and of the result where it is another."""

    kind: str
    op: str
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether it is kept for the test: about one in four, by a hash that never changes."""
        text = f"{self.kind} {self.op} {self.sizes} {self.dtypes}"
        return zlib.crc32(text.encode()) % 4 == 0


def array(sizes: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    """An argument of a case."""
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))
