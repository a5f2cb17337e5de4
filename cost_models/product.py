"""How many seconds does a product take?  Of a chip with fitted constants.

    seconds = start + max(2 b m' n' k' / (efficiency * peak), bytes / stream + elements * element)

m', n', k' are the sizes of one device, rounded up to what the matrix unit takes at once. The result
costs `narrow` more per element where it is no float32. Chips without fitted constants are priced by
`cost_models.roofline`. How XLA:TPU counts is told in `cost_models.fitted`.

>>> from cost_models.cluster import cluster
>>> v5e = cluster("tpu-v5e:1x1").chip
>>> def us(m, n, k):
...     return round(product_seconds(v5e, 1, m, n, k, "bfloat16", 2 * (m*k + k*n + m*n)) * 1e6)
>>> us(4096, 4096, 4096), us(4096, 4096, 64), us(8, 4096, 4096)
(739, 171, 71)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from cost_models.cluster import Chip
from cost_models.fitted import LANES, Fitted
from cost_models.roofline import compute_seconds, peak_flops
from cost_models.tiles import tile_seconds
from cost_models.vector import kernel_seconds

# Bytes of an element of a result; four where not listed.
_WIDTH = {"bfloat16": 2, "float16": 2, "float64": 8}


def product_seconds(
    chip: Chip,
    batch: int,
    m: int,
    n: int,
    k: int,
    dtype: str,
    moved_bytes: float,
    result_dtype: str = "",
    rows: int = 8,
    reduces: bool = False,
    computed: bool = False,
    far: float = 1.0,
) -> float:
    """Seconds of one `dot_general` by the sizes on one device; k is contracted.

    dtype: of the operands. moved_bytes: what it reads from and writes to memory: less than all of
    operands and result where a neighbour is fused with it, or XLA keeps one in faster memory.
    result_dtype: that of the operands where it is not given. rows: of a tile of the larger operand,
    `vector.tile_rows`; they count where a side is one. reduces: whether its kernel reduces
    what it makes, too. computed: whether it computes both operands as it reads them. far: the share
    of its result that it writes to HBM; the rest stays in VMEM.
    """
    f = chip.fitted
    if f is None and chip.cores:
        written = min(moved_bytes, 1.0 * batch * m * n * _WIDTH.get(result_dtype or dtype, 4))
        return tile_seconds(chip, batch, m, n, k, dtype, moved_bytes, written)
    if f is None:
        return compute_seconds(chip, 2.0 * batch * m * n * k, moved_bytes, dtype, True)
    out = result_dtype or dtype
    if 1 in (m, n, k):
        wide = out in ("float32", "int32") and k == 1
        return kernel_seconds(chip, batch * m * n * k, moved_bytes, wide, rows=rows)
    arithmetic = padded_flops(batch, m, n, k, f.unit) / matrix_rate(chip, dtype)
    if computed:
        arithmetic *= 1 + f.product_computed
    if reduces and f.product_sum_stream:
        return f.product_start + max(arithmetic, moved_bytes / f.product_sum_stream)
    return f.product_start + max(arithmetic, _memory(f, batch, m, n, k, moved_bytes, out, far))


def _memory(
    f: Fitted, batch: int, m: int, n: int, k: int, moved: float, out: str, far: float
) -> float:
    written = batch * m * n
    touched = batch * k * (m + n) + written
    memory = moved / f.stream + touched * f.product_element
    if out not in ("float32", "int32"):
        memory += written * f.product_narrow * (far + (1 - far) * f.product_narrow_near)
    return memory


def fetched_ahead(
    chip: Chip, flops: float, dtype: str, moved_bytes: float, operands: Sequence[float]
) -> float:
    """Bytes of the operand that XLA fetches before a product begins, and that it does not read.

    moved_bytes: of all operands and the result; operands: of each operand. Fetching hides behind
    what computes longer than it reads, here or before; 0 for a product that waits for memory.
    """
    f = chip.fitted
    if f is None or flops * chip.hbm_bandwidth <= moved_bytes * peak_flops(chip, "bfloat16"):
        return 0.0
    return max((size for size in operands if size < f.vmem), default=0.0)


def padded_flops(batch: int, m: int, n: int, k: int, unit: int) -> float:
    """FLOPs with k and the longer of m and n rounded up to the matrix unit, the shorter to 8.

    >>> padded_flops(1, 8, 128, 100, 128) == 2 * 8 * 128 * 128
    True
    """
    short, long = (m, n) if m < n else (n, m)
    return 2.0 * batch * (-(-short // 8) * 8) * (-(-long // unit) * unit) * (-(-k // unit) * unit)


def conv_seconds(
    chip: Chip,
    positions: int,
    channels: int,
    features: int,
    taps: int,
    dtype: str,
    moved_bytes: float,
    results: int,
    result_dtype: str = "",
) -> float:
    """Seconds of a convolution or of one of its gradients: a product for each tap of the window.

    positions: of the forward result, with its batch, on one device. channels, features: of the
    forward operand and result. taps: places of the window. moved_bytes: as of a product. results:
    elements that are written. The same three sizes multiply in the gradients.
    """
    f = chip.fitted
    if f is None:
        flops = 2.0 * positions * features * channels * taps
        return compute_seconds(chip, flops, moved_bytes, dtype, True)
    memory = moved_bytes / f.stream
    if (result_dtype or dtype) not in ("float32", "int32"):
        memory += results * f.product_narrow
    # Features fill rows of lanes, channels a side of the matrix unit; those of less than a quarter
    # of one share it among taps.
    wide = _up(channels, f.unit if 4 * channels >= f.unit else f.unit // 4)
    flops = 2.0 * positions * _up(features, LANES) * taps * wide
    return f.product_start + max(flops / (matrix_rate(chip, dtype) * f.conv_efficiency), memory)


def _up(size: int, to: int) -> int:
    return -(-size // to) * to


@lru_cache(maxsize=64)
def matrix_rate(chip: Chip, dtype: str) -> float:
    """FLOP/s that large products of a dtype reach."""
    assert chip.fitted is not None, "only a chip with fitted constants has a rate"
    share = chip.fitted.efficiency
    if dtype in share:
        return share[dtype] * peak_flops(chip, "bfloat16")
    return share["bfloat16"] * peak_flops(chip, dtype)
