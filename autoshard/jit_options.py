"""Which arguments are static, and is every other one an array?  As in `jax.jit`.

The options are jit's own: `static_argnums` and `static_argnames`, each of which implies the other
when it stands alone, and `donate_argnums`.

>>> static_places(lambda x, mode: x, {"static_argnums": 1}, 2)
({1}, {'mode'})
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from passes.hints import path_of

Options = Mapping[str, Any]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def static_places(
    fn: Callable[..., Any], options: Options, count: int
) -> tuple[set[int], set[str]]:
    """Numbers and names of the static arguments, in a call with so many positional ones."""
    numbers, names = options.get("static_argnums"), options.get("static_argnames")
    chosen = {n + count if n < 0 else n for n in several(numbers, int)}
    called = set(several(names, str))
    parameters = _parameters(fn)
    if names is None:
        all_of_them = several(numbers, int)
        called = {parameters[n] for n in all_of_them if -len(parameters) <= n < len(parameters)}
    elif numbers is None:
        chosen = {parameters.index(name) for name in called if name in parameters}
    return chosen, called


def dynamic_leaves(
    fn: Callable[..., Any], options: Options, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """The arguments that are not static, flat, in the order in which jax traces them."""
    numbers, names = static_places(fn, options, len(args))
    dynamic = [a for i, a in enumerate(args) if i not in numbers]
    named = {k: a for k, a in kwargs.items() if k not in names}
    return list(jax.tree.leaves((dynamic, named)))


def several(option: Any, one: type) -> tuple[Any, ...]:
    """An option that jit takes as nothing, as one number or name, or as several."""
    if option is None:
        return ()
    return (option,) if isinstance(option, one) else tuple(option)


def check_arguments(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options
) -> None:
    """A TypeError that names the argument, for what jit would refuse without naming it."""
    _check_donation(options.get("donate_argnums", ()))
    numbers, names = static_places(fn, options, len(args))
    parameters = _parameters(fn)
    for i, arg in enumerate(args):
        name = parameters[i] if i < len(parameters) else f"args[{i}]"
        if i in numbers:
            _check_hashable(name, arg)
        else:
            _check_leaves(name, arg)
    for name, arg in kwargs.items():
        if name in names:
            _check_hashable(name, arg)
        else:
            _check_leaves(name, arg)


def _parameters(fn: Callable[..., Any]) -> list[str]:
    """Names of the parameters that may be given by position; none for a C function."""
    try:
        found = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in found if p.kind in _POSITIONAL]


def _check_donation(option: Any) -> None:
    wanted = option if isinstance(option, tuple | list | set | frozenset | range) else (option,)
    for number in wanted:
        if not isinstance(number, int | np.integer):
            raise TypeError(
                f"donate_argnums is {option!r}; give the number of an argument, or several"
            )


def _check_hashable(name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        raise ValueError(
            f"static argument {name} is {type(value).__name__} {value!r:.60}, which can not be "
            "hashed, so that nobody could tell whether it was planned before: give a tuple or a "
            "frozen dataclass, or do not make it static"
        ) from None


def _check_leaves(name: str, tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, (bool, int, float, complex)):
            continue
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or (
            getattr(leaf, "dtype", None) == np.dtype(object)
        ):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise TypeError(
                f"argument {path_of(where)} is {type(leaf).__name__} {leaf!r:.60}, "
                "which is no array: pass an array or a jax.ShapeDtypeStruct, or make it "
                "static with parallelize(fn, static_argnames=...)"
            )
