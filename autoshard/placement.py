"""How do a caller's arguments come to lie on the devices as the plan wants them?

As in jit, Python numbers take the planned type where they may, and numpy's 64 bit types become what
jax makes of them; nothing else is cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoshard.trace import Traced
from passes.hints import path_of
from passes.ir.graph import Value


def placed(traced: Traced, flat: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Flat arguments on the devices, as the plan wants them.

    One that lies so already is given back itself; TypeError for one of another type or shape.
    """
    values = [traced.graph.values[v] for v in traced.graph.inputs]
    return [
        _place(x, sharding, aval, value)
        for x, sharding, aval, value in zip(flat, shardings, traced.in_avals, values, strict=True)
    ]


def _place(x: Any, sharding: Any, aval: Any, value: Value) -> Any:
    x = _array(x, aval)
    if x.shape != aval.shape or x.dtype != aval.dtype:
        raise TypeError(
            f"argument {path_of(value.name)} is {x.dtype}[{','.join(map(str, x.shape))}], but the "
            f"plan is for {aval.dtype}[{','.join(map(str, aval.shape))}]: plan again for this one"
        )
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    return jax.device_put(x, sharding)


def _array(x: Any, aval: Any) -> Any:
    """What jit would make of an argument; a Python number takes the planned type if it may."""
    if isinstance(x, jax.Array):
        return x
    number = isinstance(x, bool | int | float | complex)
    if number and jnp.result_type(x, aval.dtype) == aval.dtype:
        return np.asarray(x, aval.dtype)
    x = np.asarray(x)
    no_numbers = x.dtype.kind in "OSUmM"
    return x if no_numbers else x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
