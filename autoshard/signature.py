"""What does a rule see of one equation?  Types and plain parameters, with nothing of jax left.

`signature(eqn)` turns avals into `passes.ir.Type`, enums into their names, dimension numbers into
mappings of tuples, dtypes into names; sub-programs and callables are left out.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
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
    if is_jaxpr(x) or isinstance(x, jax.Array):
        return _DROP
    for known, convert in _PLAIN:
        if known(x):
            return convert(x)
    # Text that would hold an address differs from process to process.
    written: tuple[Any, Any] = (type(x).__str__, type(x).__repr__)
    nameless = written == (object.__str__, object.__repr__)
    return _DROP if callable(x) or nameless else str(x)


def _mapping(x: Mapping[Any, Any]) -> Any:
    pairs = ((str(k), plain(v)) for k, v in x.items())
    return MappingProxyType({k: v for k, v in pairs if v is not _DROP})


def _tuple(x: Any) -> Any:
    return tuple(v for v in map(plain, x) if v is not _DROP)


def _is_dtype(x: Any) -> bool:
    return isinstance(x, np.dtype) or (isinstance(x, type) and issubclass(x, np.generic))


def _is_record(x: Any) -> bool:
    return dataclasses.is_dataclass(x) and not isinstance(x, type)


# What a parameter may be, in the order of asking, and how it becomes plain data.
_PLAIN: tuple[tuple[Callable[[Any], bool], Callable[[Any], Any]], ...] = (
    (lambda x: isinstance(x, enum.Enum), lambda x: x.name),
    (lambda x: isinstance(x, np.generic), lambda x: x.item()),
    (_is_dtype, lambda x: np.dtype(x).name),
    (lambda x: isinstance(x, Mapping), _mapping),
    (lambda x: hasattr(x, "_fields"), lambda x: _mapping({f: getattr(x, f) for f in x._fields})),
    (_is_record, lambda x: _mapping({f.name: getattr(x, f.name) for f in dataclasses.fields(x)})),
    (lambda x: isinstance(x, (tuple, list)), _tuple),
    (lambda x: isinstance(x, (set, frozenset)), lambda x: tuple(sorted(map(plain, x), key=repr))),
    (lambda x: isinstance(x, np.ndarray), lambda x: plain(x.tolist()) if x.size <= 64 else _DROP),
)


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
