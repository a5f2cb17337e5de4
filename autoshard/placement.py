"""How do a caller's arguments come to lie on the devices as the plan wants them?

As in jit, Python numbers take the planned type where they may, and numpy's 64 bit types become what
jax makes of them; nothing else is cast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoshard.trace import Traced
from passes.hints import path_of
from passes.ir.graph import Value


def placed(
    traced: Traced, args: tuple[Any, ...], kwargs: Mapping[str, Any], shardings: Sequence[Any]
) -> Any:
    """(args, kwargs) on the devices, as the plan wants them. shardings: per flat argument.

    One that lies so already is given back itself; TypeError for one of another type or shape, and
    where there are others than planned.
    """
    flat, tree = jax.tree.flatten((args, kwargs))
    if tree != traced.in_tree:
        raise TypeError(_other_form(traced, args, kwargs))
    values = [traced.graph.values[v] for v in traced.graph.inputs]
    found = [
        _place(x, sharding, aval, value)
        for x, sharding, aval, value in zip(flat, shardings, traced.in_avals, values, strict=True)
    ]
    return jax.tree.unflatten(tree, found)


def _other_form(traced: Traced, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """How the arguments differ in structure from the planned ones."""
    planned = _paths(*jax.tree.unflatten(traced.in_tree, traced.in_avals))
    given = _paths(args, kwargs)
    parts = [
        f"{word} {', '.join(found[:3])}{', ..' if len(found) > 3 else ''}"
        for word, found in (
            ("without", [p for p in planned if p not in given]),
            ("with", [p for p in given if p not in planned]),
        )
        if found
    ]
    said = " and ".join(parts) or f"{jax.tree.structure((args, kwargs))}, not {traced.in_tree}"
    return (
        f"{traced.graph.name} is called with arguments of another form than planned: {said}. Give "
        "each by place or by name as to plan, without static ones, or plan again for these"
    )


def _paths(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """`args[0]/w` for an array given by place, `x/w` for one given by name."""
    named = {**{f"args[{k}]": x for k, x in enumerate(args)}, **kwargs}
    return [
        path_of(f"{name}{jax.tree_util.keystr(path)}")
        for name, tree in named.items()
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _place(x: Any, sharding: Any, aval: Any, value: Value) -> Any:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"argument {path_of(value.name)} is traced by jax, and a compiled plan runs on arrays: "
            "in jit, grad, vmap or scan call the function itself, or autoshard.parallelize(fn)"
        )
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
