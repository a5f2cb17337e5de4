"""Which parameters does one device's share of an equation have?

Most primitives take their shapes from their operands. A few carry a shape, a slice or a number of
groups as a parameter; when the equation is run on pieces of its operands, these must shrink too.

>>> from types import SimpleNamespace as S
>>> whole = {"shape": (4, 6), "broadcast_dimensions": (1,), "sharding": None}
>>> pieces = local_params("broadcast_in_dim", whole, [(6,)], [(3,)], [(2, 3)])
>>> pieces["shape"]
(2, 3)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Shape = tuple[int, ...]
Shapes = Sequence[Shape]
Params = Mapping[str, Any]


def local_params(name: str, params: Params, before: Shapes, local: Shapes, made: Shapes) -> Params:
    """Parameters for a piece of an equation of primitive `name`.

    before: shapes of the whole operands. local: shapes of their pieces. made: shapes of the pieces
    of the results.
    """
    shrink = _SHRINK.get(name)
    return params if shrink is None else {**params, **shrink(params, before, local, made)}


def _slice(params: Params, before: Shapes, local: Shapes, made: Shapes) -> Params:
    """Dims that are not cut end where the piece ends."""
    ends = zip(params["limit_indices"], before[0], local[0], strict=True)
    return {"limit_indices": tuple(piece if n != piece else end for end, n, piece in ends)}


def _gather(params: Params, before: Shapes, local: Shapes, made: Shapes) -> Params:
    """Dims that are taken as a whole are taken as a whole piece."""
    sizes = zip(params["slice_sizes"], before[0], local[0], strict=True)
    return {"slice_sizes": tuple(min(size, piece) for size, _, piece in sizes)}


def _convolution(params: Params, before: Shapes, local: Shapes, made: Shapes) -> Params:
    """As many groups as there are pieces of features or batch for."""
    numbers = params["dimension_numbers"]
    image, kernel, result = local[0], local[1], made[0]
    groups = {
        "feature_group_count": (image[numbers.lhs_spec[1]], kernel[numbers.rhs_spec[1]]),
        "batch_group_count": (image[numbers.lhs_spec[0]], result[numbers.out_spec[0]]),
    }
    return {name: a // b for name, (a, b) in groups.items() if params[name] > 1}


def _tile(params: Params, before: Shapes, local: Shapes, made: Shapes) -> Params:
    return {"reps": tuple(b // a for a, b in zip(local[0], made[0], strict=True))}


def _after_keys(params: Params, before: Shapes, local: Shapes, made: Shapes) -> Params:
    """The part of the result's shape that each key makes."""
    return {"shape": made[0][len(local[0]) :]}


def _result(name: str) -> Callable[[Params, Shapes, Shapes, Shapes], Params]:
    """A parameter that is the result's shape."""
    return lambda params, before, local, made: {name: made[0]}


_SHRINK: dict[str, Callable[[Params, Shapes, Shapes, Shapes], Params]] = {
    "broadcast_in_dim": _result("shape"),
    "conv_general_dilated": _convolution,
    "dynamic_slice": _result("slice_sizes"),
    "empty": _result("shape"),
    "gather": _gather,
    "iota": _result("shape"),
    "random_bits": _after_keys,
    "random_split": _after_keys,
    "reshape": _result("new_sizes"),
    "slice": _slice,
    "tile": _tile,
}
