"""Which rule does a primitive have?  `@rule("neg", "exp")` over a function `Signature -> Rule`.

A family registers each of its primitives by name, so that this package knows nothing of jax. A
name registered twice is an error; a name never registered gives None, and the caller decides
(`autoshard.trace` asks Shardy, then says *whole*).
"""

from __future__ import annotations

from collections.abc import Callable

from passes.ir.graph import Signature
from passes.ir.rule import Rule

RuleFunction = Callable[[Signature], Rule]
_RULES: dict[str, RuleFunction] = {}


def rule(*names: str) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function as the rule of these primitives; raises KeyError on a second one."""

    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            if name in _RULES:
                raise KeyError(f"primitive {name!r} has two rules: {_RULES[name]} and {function}")
            _RULES[name] = function
        return function

    return register


def hand_rule(signature: Signature) -> Rule | None:
    """The hand-written rule for this operation, or None when its primitive has none."""
    function = _RULES.get(signature.name)
    return function(signature) if function else None


def registered() -> tuple[str, ...]:
    """Names of all primitives with a hand-written rule, sorted."""
    return tuple(sorted(_RULES))


def whole_rule(signature: Signature) -> Rule:
    """The rule that splits nothing: right for every operation, good for none."""
    return Rule.whole([t.shape for t in signature.operands], [t.shape for t in signature.results])
