"""Where does each stage's own lie for the whole loop, where all devices run one program?

Weights, and the sums of their gradients, lie on the device whose stages use them. Those of one form
are rows of one array [device, row, ...] that is split by device. Every device has the rows of that
device which needs most; alike stages fill all of them.

To come there, and back, an array goes through a split over all devices: from there each device has
an even share of what every other one needs, and XLA makes one all-to-all of it. So arguments and
results may be split evenly over the devices, and none ever lies on one device as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes.pipeline.schedule import Place

Form = Any  # what can be a row of one array; any key


@dataclass(frozen=True)
class Rows:
    """Rows by form. count: of each form, on every device. first: by form, of each device and chunk
    the first row. of: by piece and value its form, and which of the rows of its chunk it has.
    """

    way: tuple[Place, ...]
    count: Mapping[Form, int]
    first: Mapping[Form, np.ndarray]
    of: Mapping[tuple[int, Any], tuple[Form, int]]

    def row(self, piece: int, p: Any) -> tuple[Form, int, int]:
        """Form, device and row of a piece's value."""
        form, k = self.of[piece, p]
        device, chunk = self.way[piece]
        return form, device, int(self.first[form][device, chunk]) + k


def rows_of(
    way: tuple[Place, ...], own: Sequence[Sequence[Any]], form: Callable[[Any], Form]
) -> Rows:
    """The rows of all pieces' values. own: of each piece its values."""
    size = [1 + max(each) for each in zip(*way, strict=True)]
    many: dict[Form, np.ndarray] = {}
    of: dict[tuple[int, Any], tuple[Form, int]] = {}
    for piece, (place, values) in enumerate(zip(way, own, strict=True)):
        for p in values:
            here = many.setdefault(form(p), np.zeros(size, np.int32))
            of[piece, p] = form(p), int(here[place])
            here[place] += 1
    first = {f: np.cumsum(n, axis=1, dtype=np.int32) - n for f, n in many.items()}
    return Rows(way, {f: int(n.sum(axis=1).max()) for f, n in many.items()}, first, of)


def to_rows(rows: Rows, mesh: jax.sharding.Mesh, axis: str, value: Callable[[Any], Any]) -> Any:
    """The arrays of all forms in order, from values. Rows of nothing hold any other value."""
    cells: dict[Form, dict[tuple[int, int], Any]] = {form: {} for form in rows.count}
    for piece, p in rows.of:
        form, device, row = rows.row(piece, p)
        cells[form][device, row] = value(p)
    out = []
    for form, many in rows.count.items():
        own = cells[form]
        fill = next(iter(own.values()))
        devices = range(mesh.shape[axis])
        array = jnp.stack(
            [jnp.stack([own.get((d, r), fill) for r in range(many)]) for d in devices]
        )
        out.append(_split(_spread(array, mesh, axis), mesh, jax.P(axis)))
    return out


def from_rows(
    rows: Rows, mesh: jax.sharding.Mesh, axis: str, arrays: Sequence[Any]
) -> dict[Any, Any]:
    """The values, from the arrays of all forms in order."""
    apart = {
        form: _spread(array, mesh, axis) for form, array in zip(rows.count, arrays, strict=True)
    }
    out = {}
    for piece, p in rows.of:
        form, device, row = rows.row(piece, p)
        out[p] = apart[form][device, row]
    return out


def spread(shape: Sequence[int], mesh: jax.sharding.Mesh, axis: str, before: int = 0) -> jax.P:
    """An even split along an axis, of the longest dim that it divides; whole where there is none.

    before: so many dims stay whole.
    """
    fits = [d for d in range(before, len(shape)) if shape[d] and shape[d] % mesh.shape[axis] == 0]
    if not fits:
        return jax.P()
    longest = max(fits, key=lambda d: (shape[d], -d))
    return jax.P(*(axis if d == longest else None for d in range(longest + 1)))


def _spread(array: Any, mesh: jax.sharding.Mesh, axis: str) -> Any:
    """[device, row, ...], each value split evenly over all devices."""
    return _split(array, mesh, spread(array.shape, mesh, axis, before=2))


def _split(array: Any, mesh: jax.sharding.Mesh, spec: jax.P) -> Any:
    return jax.lax.with_sharding_constraint(array, jax.NamedSharding(mesh, spec))
