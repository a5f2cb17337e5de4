"""The one place that knows where jax 0.10, 0.11 and 0.12 differ, and that may touch private names."""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core as jex_core

Literal = jex_core.Literal
Var = jex_core.Var
Primitive = jex_core.Primitive


def is_drop(var: Any) -> bool:
    """Whether an equation's result is thrown away (printed as `_`)."""
    return type(var).__name__ == "DropVar"


def is_jaxpr(x: Any) -> bool:
    """Whether x is an open or a closed jaxpr (one type since jax 0.11)."""
    return hasattr(x, "eqns") and hasattr(x, "outvars")  or type(x).__name__ == "ClosedJaxpr"


def open_jaxpr(x: Any) -> tuple[Any, tuple[Any, ...]]:
    """(jaxpr with eqns, invars, outvars, constvars; constants) of an open or closed jaxpr."""
    if type(x).__name__ == "ClosedJaxpr":
        return x.jaxpr, tuple(x.consts)
    consts = getattr(x, "consts", ())
    return x, tuple(consts if isinstance(consts, (tuple, list)) else ())


def jax_version() -> tuple[int, ...]:
    """(0, 10, 2) and the like."""
    return tuple(int(p) for p in jax.__version__.split(".")[:3] if p.isdigit())
