"""What do the cost models say of a case of `compute_cases`?  As a planner would ask them.

What moves is given by the arrays as they lie in memory: rows of tiles of 8 x 128, of the two
dims that pad least.
"""

from __future__ import annotations

import math
import re
from itertools import permutations

from compute_case import Case

from cost_models.cluster import Chip
from cost_models.product import conv_seconds, fetched_ahead, product_seconds
from cost_models.vector import kernel_seconds, vector_seconds, work_seconds

_BYTES = {"bfloat16": 2, "float32": 4, "int32": 4, "int8": 1}


def tiled(sizes: tuple[int, ...]) -> int:
    """Elements that an array takes in memory.

    >>> tiled((2, 8, 100)), tiled((1024, 64)), tiled((1000,))
    (2048, 65536, 1024)
    """
    if len(sizes) < 2:
        return -(-math.prod(sizes) // 128) * 128
    return min(
        math.prod(sizes) // (a * b) * (-(-a // 8) * 8) * (-(-b // 128) * 128)
        for a, b in permutations(sizes, 2)
    )


def nbytes(sizes: tuple[int, ...], dtype: str) -> int:
    """Bytes that an array takes in memory."""
    return tiled(sizes) * _BYTES[dtype]


def predicted(chip: Chip, case: Case) -> float:
    """Seconds of a case."""
    return _OF[case.kind](chip, case)


def _product(chip: Chip, case: Case) -> float:
    size = dict(zip("bmnk", case.sizes, strict=True))
    arrays = zip(re.split(r",|->", case.op), case.dtypes, strict=True)
    held = [nbytes(tuple(size[c] for c in s), d) for s, d in arrays]
    a, _, out = case.dtypes
    flops = 2.0 * math.prod(case.sizes)
    moved = sum(held) - fetched_ahead(chip, flops, a, sum(held), held[:2])
    return product_seconds(chip, *case.sizes, a, moved, out)


def _map(chip: Chip, case: Case) -> float:
    elements, (a, out) = tiled(case.sizes), case.dtypes
    found = re.fullmatch(r"(\w+)\*(\d+)", case.op)
    reads, writes = (1, 1) if found else map(int, case.op.split(">"))
    name = found[1] if found else "add"
    work = work_seconds(chip, name, elements) * (int(found[2]) if found else reads)
    moved = reads * nbytes(case.sizes, a) + writes * nbytes(case.sizes, out)
    return kernel_seconds(chip, elements, moved, _BYTES[out] == 4, work)


def _reduce(chip: Chip, case: Case) -> float:
    elements = tiled(case.sizes)
    return kernel_seconds(chip, elements, nbytes(case.sizes, case.dtypes[0]), False)


def _alone(chip: Chip, case: Case) -> float:
    first, out = case.dtypes
    read = nbytes(case.sizes, first) * (2 if case.op == "add" else 1)
    if case.op == "broadcast":
        made = (case.sizes[0], 8, case.sizes[1])
        moved = read + nbytes(made, out)
        return vector_seconds(chip, "broadcast_in_dim", tiled(made), moved, out, alone=True)
    if case.op in ("sum", "max"):
        return vector_seconds(chip, f"reduce_{case.op}", tiled(case.sizes), read, out, alone=True)
    moved = read + nbytes(case.sizes, out)
    return vector_seconds(chip, case.op, tiled(case.sizes), moved, out, alone=True)


# Per chain its kernels: arrays of the operand's dtype read, of the result's written. XLA:TPU keeps
# rows of a softmax that are short in its own memory, so that there is one kernel.
_SHORT = 4096
_KERNELS: dict[str, tuple[tuple[int, int], ...]] = {
    "softmax": ((1, 0), (1, 0), (1, 1)),
    "softmax_gradient": ((2, 0), (2, 1)),
    "layer_norm": ((1, 0), (0, 0), (1, 0), (0, 0), (1, 1)),
    "rms_norm": ((1, 0), (0, 0), (1, 1)),
    "gelu": ((1, 1),),
    "adamw": ((4, 3),),
}


def _chain(chip: Chip, case: Case) -> float:
    elements, dtype = tiled(case.sizes), case.dtypes[0]
    out = "bfloat16" if case.op == "softmax_gradient" else dtype
    kernels = _KERNELS[case.op]
    if case.op == "softmax" and case.sizes[-1] <= _SHORT:
        kernels = kernels[-1:]
    return sum(
        kernel_seconds(
            chip,
            elements if reads else 0,
            reads * nbytes(case.sizes, dtype) + writes * nbytes(case.sizes, out),
            writes > 0 and _BYTES[out] == 4,
        )
        for reads, writes in kernels
    )


def _conv(chip: Chip, case: Case) -> float:
    n, h, c, o, window, stride = case.sizes
    out, dtype = -(-h // stride), case.dtypes[0]
    arrays = [(n, h, h, c), (window, window, c, o), (n, out, out, o)]
    moved = sum(nbytes(s, dtype) for s in arrays)
    results = {"forward": n * out * out * o, "input": n * h * h * c, "weights": c * o * window**2}
    return conv_seconds(chip, n * out**2, c, o, window**2, dtype, moved, results[case.op])


def _move(chip: Chip, case: Case) -> float:
    name, *numbers = case.op.split()
    k, dtype = tuple(map(int, numbers)), case.dtypes[0]
    elements, whole = tiled(case.sizes), nbytes(case.sizes, dtype)
    if name == "transpose":  # rows that stay rows are only copied
        name = "copy" if k[-1] == len(k) - 1 else name
    elif name == "concatenate":
        elements, whole = elements * k[1], whole * k[1]
    elif name == "dynamic_slice" or case.op.startswith("slice 1 1024"):
        share = k[1] / case.sizes[k[0]]
        elements, whole = round(elements * share), round(whole * share)
    elif name == "one_hot":
        made = (*case.sizes, k[0])
        return vector_seconds(chip, "eq", tiled(made), nbytes(made, dtype), dtype)
    elif name == "random_bits":
        return vector_seconds(chip, name, elements, whole, "uint32")
    elif name == "dropout":
        return vector_seconds(chip, "random_bits", elements, 2.0 * whole, dtype)
    return vector_seconds(chip, name, elements, 2.0 * whole, dtype, alone=name in ("pad", "slice"))


_OF = {
    "product": _product,
    "map": _map,
    "alone": _alone,
    "reduce": _reduce,
    "chain": _chain,
    "conv": _conv,
    "move": _move,
}
