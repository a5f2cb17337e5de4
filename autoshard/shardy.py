"""Which rule does Shardy have for one equation?  `shardy_rule(eqn)`.

The equation is lowered by itself to StableHLO, Shardy's pass writes a sharding rule on each
operation, and the rules are joined into one (`autoshard.shardy_join`). Nothing is compiled or run.
The pass comes with jaxlib; its rules are described in openxla/shardy, docs/propagation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from autoshard.jax_compat import bind, is_jaxpr
from autoshard.shardy_join import join_rules
from autoshard.shardy_text import NoRule
from passes.ir.rule import Rule

_PIPELINE = "builtin.module(func.func(sdy-populate-op-sharding-rules))"

# Their sub-program combines two elements; it is not a body to be planned.
_COMBINERS = ("reduce", "reduce_window", "scatter", "select_and_scatter")

# What an operation becomes depends on the platform: the CPU calls LAPACK where a TPU has StableHLO.
_PLATFORMS = ("cpu", "tpu")


def shardy_rule(eqn: Any) -> Rule | None:
    """Shardy's rule for a jaxpr equation, or None when it has none for all of it."""
    return ask_shardy(eqn)[0]


def ask_shardy(eqn: Any) -> tuple[Rule | None, str]:
    """Shardy's rule and "", or None and the reason why there is none; never raises."""
    reason = _refusal(eqn)
    if reason:
        return None, reason
    for platform in _PLATFORMS:
        try:
            return _rule_on(eqn, platform), ""
        except NoRule as error:
            reason = reason or str(error)
        except Exception as error:
            # Lowering calls code of jax and of third parties for any primitive there is.
            text = str(error).strip().splitlines()
            reason = reason or f"{type(error).__name__}: {text[0] if text else 'no message'}"
    return None, reason


def _refusal(eqn: Any) -> str:
    """Why the equation can not be lowered by itself, or ""."""
    if eqn.effects:
        return "it has side effects"
    for var in (*eqn.invars, *eqn.outvars):
        if not hasattr(var.aval, "shape") or not hasattr(var.aval, "dtype"):
            return f"it takes or gives {var.aval}, which is no array"
    if not eqn.primitive.name.startswith(_COMBINERS):
        for name, value in eqn.params.items():
            parts = value if isinstance(value, (tuple, list)) else (value,)
            if any(is_jaxpr(p) for p in parts):
                return f"it runs a sub-program ({name})"
    return ""


def _rule_on(eqn: Any, platform: str) -> Rule:
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    return function_rule(lambda *args: bind(eqn, args), avals, platform)


def function_rule(
    function: Callable[..., Any], avals: Sequence[jax.ShapeDtypeStruct], platform: str = "cpu"
) -> Rule:
    """The joined rule of all operations that a function lowers to; raises NoRule."""
    from jaxlib.mlir import passmanager

    traced = jax.jit(function, keep_unused=True).trace(*avals)
    module = traced.lower(lowering_platforms=(platform,)).compiler_ir()
    with module.context:
        passmanager.PassManager.parse(_PIPELINE).run(module.operation)
    return join_rules(module, [len(a.shape) for a in (*avals, *jax.tree.leaves(traced.out_info))])
