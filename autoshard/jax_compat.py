"""Where do jax 0.10, 0.11 and 0.12 differ?  The only file that may touch private names."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.extend.core as jex_core
from jax.extend import source_info_util

Literal = jex_core.Literal
Var = jex_core.Var
Primitive = jex_core.Primitive


def is_jaxpr(x: Any) -> bool:
    """Whether x is an open or a closed jaxpr (one type since jax 0.11)."""
    return (hasattr(x, "eqns") and hasattr(x, "outvars")) or type(x).__name__ == "ClosedJaxpr"


def open_jaxpr(x: Any) -> tuple[Any, tuple[Any, ...]]:
    """(jaxpr with eqns, invars, outvars, constvars; values of its constvars)."""
    if type(x).__name__ == "ClosedJaxpr":
        return x.jaxpr, tuple(x.consts)
    consts = getattr(x, "consts", ())
    return x, tuple(consts) if isinstance(consts, (tuple, list)) else ()


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """(number of loop constants, number of carries) of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def frames(source_info: Any) -> tuple[tuple[str, int, str], ...]:
    """(file, line, function) from the innermost frame outwards; empty where jax kept none."""
    traceback = getattr(source_info, "traceback", None)
    if traceback is None:
        return ()
    return tuple((f.file_name, int(f.line_num), f.function_name) for f in traceback.frames)


def summarize(source_info: Any) -> str:
    """Jax's own one-line account of where an equation comes from."""
    return source_info_util.summarize(source_info)


def is_backward(source_info: Any) -> bool:
    """Whether jax made an equation by transposing a linear one: whether it is of a gradient."""
    return any(getattr(p, "name", "") == "transpose" for p in source_info.name_stack.stack)


def traced_at(eqn: Any, lines: Any = None) -> contextlib.AbstractContextManager[Any]:
    """Operations made inside have the equation's lines of the user's code, and its named scopes.

    lines: another equation, to have the lines of instead.
    """
    scopes = source_info_util.current_name_stack() + eqn.source_info.name_stack
    traceback = (eqn if lines is None else lines).source_info.traceback
    context: contextlib.AbstractContextManager[Any] = source_info_util.user_context(
        traceback, name_stack=scopes
    )
    return context


def at_lines_of(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """Operations made inside have the equation's lines of the user's code."""
    context: contextlib.AbstractContextManager[Any] = source_info_util.user_context(
        eqn.source_info.traceback, name_stack=source_info_util.current_name_stack()
    )
    return context


def jax_version() -> tuple[int, ...]:
    """(0, 10, 2) and the like."""
    return tuple(int(p) for p in jax.__version__.split(".")[:3] if p.isdigit())


def bind(eqn: Any, operands: Any, params: Any = None) -> list[Any]:
    """Apply an equation's primitive to new operands, with its own parameters or with others."""
    found = eqn.primitive.get_bind_params(eqn.params if params is None else params)
    if isinstance(found, tuple):  # (sub-functions, parameters) before jax 0.10.2
        functions, params = found
        out = eqn.primitive.bind(*functions, *operands, **params)
    else:
        out = eqn.primitive.bind(*operands, **found)
    return list(out) if eqn.primitive.multiple_results else [out]


def lowerable_primitives() -> tuple[str, ...]:
    """Names of the primitives that the loaded parts of jax can lower, for any platform, sorted."""
    from jax._src.interpreters import mlir

    tables = (mlir._lowerings, *mlir._platform_specific_lowerings.values())
    return tuple(sorted({primitive.name for table in tables for primitive in table}))
