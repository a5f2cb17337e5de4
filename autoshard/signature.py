"""What does a rule see of one equation?  Types and plain parameters, with nothing of jax left.

`signature(eqn)` turns avals into `passes.ir.Type`, enums into their names, dimension numbers into
mappings of tuples, dtypes into names; sub-programs and callables are left out.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from autoshard.jax_compat import is_jaxpr
from passes.ir.graph import Signature, Type

_DROP = object()


def type_of(aval: Any) -> Type:
    """Shape, dtype name and storage bits of an abstract value (a token has shape () and 0 bits)."""
    shape = tuple(int(n) for n in getattr(aval, "shape", ()))
    dtype = getattr(aval, "dtype", None)
    if dtype is None:
        return Type(shape, type(aval).__name__, 0)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raw = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
        return Type(shape, str(dtype), raw.size * raw.dtype.itemsize * 8)
    name = np.dtype(dtype).name
    try:
        bits = jax.dtypes.itemsize_bits(dtype)
    except (AttributeError, TypeError):
        bits = (
            4
            if name in ("int4", "uint4")
            else 2
            if name in ("int2", "uint2")
            else 8 * np.dtype(dtype).itemsize
        )
    return Type(shape, name, int(bits))


def plain(x: Any) -> Any:
    """A parameter as plain data, or the marker for `leave out`."""
    if x is None or isinstance(x, (bool, int, float, complex, str)):
        return x
    if isinstance(x, enum.Enum):
        return x.name
    if is_jaxpr(x) or isinstance(x, jax.Array):
        return _DROP
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.dtype) or (isinstance(x, type) and issubclass(x, np.generic)):
        return np.dtype(x).name
    if isinstance(x, Mapping):
        return MappingProxyType(
            {str(k): v for k, v in ((k, plain(v)) for k, v in x.items()) if v is not _DROP}
        )
    if hasattr(x, "_fields"):
        return plain({f: getattr(x, f) for f in x._fields})
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return plain({f.name: getattr(x, f.name) for f in dataclasses.fields(x)})
    if isinstance(x, (tuple, list)):
        return tuple(v for v in map(plain, x) if v is not _DROP)
    if isinstance(x, (set, frozenset)):
        return tuple(sorted((plain(v) for v in x), key=repr))
    if isinstance(x, np.ndarray):
        return plain(x.tolist()) if x.size <= 64 else _DROP
    if callable(x):
        return _DROP
    if type(x).__str__ is object.__str__ and type(x).__repr__ is object.__repr__:
        return _DROP  # its text would hold an address
    return str(x)


def plain_params(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """An equation's parameters as plain data, sub-programs and callables left out."""
    return plain(params)  # type: ignore[no-any-return]


def signature(eqn: Any) -> Signature:
    """What a rule may look at, of a jaxpr equation."""
    return Signature(
        eqn.primitive.name,
        tuple(type_of(v.aval) for v in eqn.invars),
        tuple(type_of(v.aval) for v in eqn.outvars),
        plain_params(eqn.params),
    )
