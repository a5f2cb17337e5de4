"""Do two jaxprs compute the same?  `same_program(a, b)`, equation by equation.

Stages of alike layers are traced each by itself. Where their jaxprs are the same but for the names
of variables, one compiled program does for all. Parameters that can not be compared are taken to
differ, and so an answer of yes can be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from autoshard.jax_compat import Literal, is_jaxpr, open_jaxpr


def same_program(a: Any, b: Any) -> bool:
    """Whether two jaxprs, closed or open, are the same but for names and source lines."""
    (first, own), (second, other) = open_jaxpr(a), open_jaxpr(b)
    if len(own) != len(other) or len(first.eqns) != len(second.eqns):
        return False
    if not all(_same_value(x, y) for x, y in zip(own, other, strict=True)):
        return False
    names: dict[Any, Any] = {}
    ahead = [*first.constvars, *first.invars], [*second.constvars, *second.invars]
    if not _bound(*ahead, names):
        return False
    for e, f in zip(first.eqns, second.eqns, strict=True):
        if e.primitive is not f.primitive or not _read(e.invars, f.invars, names):
            return False
        if not _same_value(dict(e.params), dict(f.params)):
            return False
        if not _bound(e.outvars, f.outvars, names):
            return False
    return _read(first.outvars, second.outvars, names)


def _bound(a: Sequence[Any], b: Sequence[Any], names: dict[Any, Any]) -> bool:
    """Whether these variables are of the same types; from here on each pair is one."""
    if len(a) != len(b) or any(v.aval != w.aval for v, w in zip(a, b, strict=True)):
        return False
    names.update(zip(a, b, strict=True))
    return True


def _read(a: Sequence[Any], b: Sequence[Any], names: Mapping[Any, Any]) -> bool:
    """Whether these are the same variables and literals."""
    if len(a) != len(b):
        return False
    for v, w in zip(a, b, strict=True):
        if isinstance(v, Literal) or isinstance(w, Literal):
            if type(v) is not type(w) or v.aval != w.aval or not _same_value(v.val, w.val):
                return False
        elif names[v] is not w:
            return False
    return True


def _same_value(x: Any, y: Any) -> bool:
    """Whether two parameters, or constants, are the same."""
    if is_jaxpr(x) or is_jaxpr(y):
        return is_jaxpr(x) and is_jaxpr(y) and same_program(x, y)
    if type(x) is not type(y):
        return False
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_same_value(x[k], y[k]) for k in x)
    if isinstance(x, (tuple, list)):
        return len(x) == len(y) and all(map(_same_value, x, y))
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return _same_array(x, y)
    if isinstance(x, float):
        return bool(x.hex() == y.hex())  # -0.0 is not 0.0, and no number is itself
    return x is y or bool(x == y)


def _same_array(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if (
        x.shape != y.shape
        or x.dtype != y.dtype
        or jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    ):
        return False
    a, b = np.asarray(x), np.asarray(y)
    return bool(a.tobytes() == b.tobytes())
