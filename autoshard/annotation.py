"""How does a user say inside a function what to split?  `annotate(x, "data", None)`.

One entry per dim: an axis name, a tuple of names, None for *do not split*, OPEN for *the planner
decides*. One `...` stands for any number of open dims, as in numpy indexing. The value itself does
not change: annotations vanish in plain `jax.jit`, and pass through grad, vmap, scan and remat.

>>> import jax.numpy as jnp
>>> annotate(jnp.arange(3), "data")
Array([0, 1, 2], dtype=int32)

A dim split over several axes is split by the earlier mesh axis first, in whatever order they are
written. Gradients get the annotation of the value they belong to, as a soft wish: a search may
choose otherwise for them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
from jax.interpreters import ad, batching, mlir

from autoshard.jax_compat import Primitive
from passes.hints import OPEN, Dims, HintError, spec_dims

__all__ = ["OPEN", "annotate", "annotate_p"]

annotate_p = Primitive("autoshard_annotate")


def annotate(x: Any, *spec: Any, priority: int = 0, soft: bool = False) -> Any:
    """Say how x is to be split over the mesh; gives back x.

    spec: one entry per dim, see the module's text; a single PartitionSpec will do as well.
    priority: 0 is propagated first, then 1, and so on. soft: propagation starts from it, but a
    search may choose otherwise. A pytree gets the same spec on every array in it.

    Raises HintError, with the calling line, when the spec does not fit.
    """
    origin = _caller()
    if type(priority) is not int or priority < 0:
        raise HintError(f"{origin}: priority is {priority!r}; give a whole number, 0 comes first")
    entries, short = spec, False
    if len(spec) == 1 and isinstance(spec[0], jax.sharding.PartitionSpec):
        entries, short = tuple(spec[0]), True
    leaves, tree = jax.tree.flatten_with_path(x)
    out = []
    for path, leaf in leaves:
        place = f" on {jax.tree_util.keystr(path)}" if path else ""
        shape = _shape(leaf, f"{origin}: annotate{place}")
        where = f"{origin}: annotate{place}, shape {shape}"
        dims = spec_dims(entries, len(shape), short=short, where=where)
        made = annotate_p.bind(leaf, spec=dims, priority=priority, hard=not soft, origin=origin)
        # Outside of a transformation jax may hand back its own wrapper of a numpy array.
        out.append(made if isinstance(made, jax.core.Tracer) else leaf)
    return jax.tree.unflatten(tree, out)


def _shape(leaf: Any, where: str) -> tuple[int, ...]:
    """The array's shape; HintError for what is no array."""
    if hasattr(leaf, "shape"):
        return tuple(leaf.shape)
    if isinstance(leaf, bool | int | float | complex):
        return ()
    raise HintError(f"{where}: {type(leaf).__name__} is no array")


def _caller() -> str:
    """`train.py:14`, the first line outside this package that led here."""
    here = str(Path(__file__).parent)
    frame = sys._getframe(1)
    while frame.f_back is not None and str(Path(frame.f_code.co_filename).parent) == here:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _transposed(cotangent: Any, x: Any, **params: Any) -> list[Any]:
    del x
    if type(cotangent) is ad.Zero:
        return [cotangent]
    return [annotate_p.bind(cotangent, **{**params, "hard": False})]


def _tangent(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    (x,), (t,) = primals, tangents
    out = annotate_p.bind(x, **params)
    return out, t if type(t) is ad.Zero else annotate_p.bind(t, **{**params, "hard": False})


def _batched(args: Any, axes: Any, *, spec: Dims, **params: Any) -> tuple[Any, Any]:
    (x,), (axis,) = args, axes
    return annotate_p.bind(x, spec=(*spec[:axis], None, *spec[axis:]), **params), axis


def _lowered(ctx: Any, x: Any, **params: Any) -> list[Any]:
    del ctx, params
    return [x]


annotate_p.def_impl(lambda x, **params: x)
annotate_p.def_abstract_eval(lambda aval, **params: aval)
ad.primitive_jvps[annotate_p] = _tangent
ad.primitive_transposes[annotate_p] = _transposed
batching.primitive_batchers[annotate_p] = _batched
mlir.register_lowering(annotate_p, _lowered)
