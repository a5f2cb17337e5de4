"""How many seconds does a kernel take that is no product?  Of a chip with fitted constants.

    seconds = start + max(arithmetic, bytes / stream + elements * (element + narrow))

A kernel is a chain of operations that the compiler fuses into one loop over an array: it reads what
the chain reads, writes what is kept of it, and starts once. `kernel_seconds` prices a whole one;
`vector_seconds` prices one operation of one. How XLA:TPU counts is told in `cost_models.fitted`.

>>> from cost_models.cluster import cluster
>>> v5e = cluster("tpu-v5e:1x1").chip
>>> f"{vector_seconds(v5e, 'tanh', 4096 * 4096, 2 * 4 * 4096 * 4096, 'float32') * 1e6:.0f} us"
'207 us'
>>> f"{vector_seconds(v5e, 'tanh', 4096 * 4096, 0, 'float32') * 1e6:.1f} us"  # inside a chain
'0.3 us'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from cost_models.cluster import Chip
from cost_models.fitted import LANES

# Operations of the vector unit per element, by the name of jax's primitive; one where not listed.
# They are how much XLA:TPU's cycles grow with one more of it in a chain on v5e, in quarters of a
# cycle for 1024 elements (four units of 8 x 128 lanes: jax-ml.github.io/scaling-book/tpus).
_OPERATIONS: Mapping[str, float] = {
    "exp2": 2, "log": 2, "log1p": 2, "pow": 2, "integer_pow": 2, "div": 2, "floor": 2, "ceil": 2,
    "round": 2, "rem": 4, "logistic": 5, "erf": 8, "erfc": 16, "erf_inv": 19, "sin": 153,
    "cos": 153, "tan": 160, "atan2": 20, "threefry2x32": 120, "random_bits": 120,
}  # fmt: skip

# What takes longer than its traffic, and the constant it is priced by: seconds more per element of
# the larger of operand and result.
_MOVES: Mapping[str, str] = {
    "cumsum": "cumulative", "cumprod": "cumulative", "cummax": "cumulative",
    "cummin": "cumulative", "cumlogsumexp": "cumulative", "concatenate": "concatenate",
}  # fmt: skip

# Bytes up to which a lone operation is no dearer than a fused one: XLA:TPU works on it at once.
_AT_ONCE = 6 * 2**20

# How much longer memory takes for tiles of fewer than 8 rows, by their rows: cycles that XLA:TPU
# counts on v5e for 2 x + y and x z of 2^24 float32, in tiles of 8, 4, 2 and 1 rows of 128 (0.0455,
# 0.0625, 0.0803 and 0.1197 per element; jax 0.10.2, libtpu 0.0.42.1).
_SHORT: Mapping[int, float] = {8: 1.0, 4: 1.37, 2: 1.77, 1: 2.63}

_WIDE = frozenset({"float32", "int32", "uint32", "float64", "int64", "uint64", "complex64"})
_REDUCTIONS = frozenset({"argmax", "argmin"})


def kernel_seconds(
    chip: Chip,
    elements: float,
    moved_bytes: float,
    wide: bool,
    work: float = 0.0,
    alone: bool = False,
    rows: int = 8,
) -> float:
    """Seconds of one kernel that loops over an array of so many elements.

    moved_bytes: all that it reads from and writes to memory. wide: whether it writes a whole array
    of 32-bit elements. work: seconds of arithmetic, the sum of `work_seconds` over its chain.
    alone: whether it is a single operation, and no chain. rows: of a tile, see `tile_rows`.
    """
    f = chip.fitted
    if f is None:
        return max(work, moved_bytes / (chip.hbm_bandwidth * chip.hbm_efficiency))
    each = f.element if wide else f.element + f.narrow
    if alone and moved_bytes > _AT_ONCE:
        each += f.alone
    memory = moved_bytes / f.stream * _SHORT[rows]
    return f.start + max(work, memory + elements * each * 8 / rows)


def tile_rows(shape: Sequence[int]) -> int:
    """Rows of 128 in a tile of an array with these sizes on one device: 8, or fewer if need be.

    XLA:TPU lays two dims on tiles: the last two where the last fills rows of 128, or else whichever
    waste least. Where neither dim but the one along the rows has 8, tiles are shorter, and the
    vector unit is less than full.

    >>> tile_rows((4096, 64)), tile_rows((4096, 4)), tile_rows((512, 2, 128)), tile_rows((64,))
    (8, 4, 2, 8)
    """
    sizes = [n for n in shape if n > 1]
    if len(sizes) < 2:
        return 8
    second = sizes[-2] if sizes[-1] % LANES == 0 else sorted(sizes)[-2]
    return min(8, 1 << (second - 1).bit_length())


def work_seconds(chip: Chip, primitive: str, elements: float) -> float:
    """Seconds of arithmetic of one elementwise operation or reduction, were memory no matter."""
    return elements * _OPERATIONS.get(primitive, 1.0) / chip.vector_flops


def vector_seconds(
    chip: Chip,
    primitive: str,
    elements: float,
    moved_bytes: float,
    dtype: str,
    alone: bool = False,
) -> float:
    """Seconds of one operation that is no product, by the name of jax's primitive.

    elements: of the largest of operands and results, on one device. moved_bytes: what it reads from
    and writes to memory; 0 inside a fused chain, where its work hides behind the traffic of the
    chain's kernel but for a tenth, or for what exceeds reading one float32 array. dtype: of the
    result, where it writes one. alone: whether nothing is fused with it.
    """
    work = work_seconds(chip, primitive, elements)
    f = chip.fitted
    if f is None:
        return max(work, moved_bytes / (chip.hbm_bandwidth * chip.hbm_efficiency))
    if moved_bytes <= 0:
        return max(work / 10, work - 4 * elements / f.stream)
    moves = f.moves.get(_MOVES.get(primitive, ""), 0.0)
    wide = is_wide(primitive, dtype)
    return kernel_seconds(chip, elements, moved_bytes, wide, work, alone) + elements * moves


@lru_cache(maxsize=1 << 10)
def is_wide(primitive: str, dtype: str) -> bool:
    """Whether an operation stores a whole array of 32 bits: no reduction does."""
    return dtype in _WIDE and primitive not in _REDUCTIONS and not primitive.startswith("reduce_")
