"""How many seconds does a product take on a GPU?  Tiles of the result, dealt out to its cores.

A core (streaming multiprocessor) makes one tile of the result at a time, so that tiles come in
waves: the last wave takes as long as the others, however few tiles are in it, and tiles at the edge
are computed whole ("tile and wave quantization": docs.nvidia.com/deeplearning/performance/
dl-performance-matrix-multiplication). Operands are fetched while a core multiplies; what it has
made it writes when it is done with a tile. Where there are few tiles, the contracted dim is split
too, and the float32 parts are added up. A library tries all of this and takes the quickest.

>>> from cost_models.cluster import cluster
>>> a100 = cluster("a100:1x8").chip
>>> def tflops(m, n, k):
...     moved, written = 2 * (m * k + k * n + m * n), 2 * m * n
...     seconds = tile_seconds(a100, 1, m, n, k, "bfloat16", moved, written)
...     return round(2 * m * n * k / seconds / 1e12)
>>> tflops(1024, 10240, 5120)  # where 271 were measured: 320 tiles in 3 waves of 108
271
>>> tflops(1792, 2048, 4096), tflops(2048, 2048, 4096)  # 112 tiles and 128: two waves each
(183, 209)
"""

from __future__ import annotations

from functools import lru_cache

from cost_models.cluster import Chip
from cost_models.roofline import peak_flops

# Sides of the tiles that libraries have for every matrix unit (the guide above), and the share of
# the largest ones' rate that smaller ones reach. The shares are assumptions: less of what a core
# fetches is used twice.
_TILES = ((256, 128, 1.0), (128, 128, 0.9), (128, 64, 0.8), (64, 64, 0.6))
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)  # parts of the contracted dim
_PART = 256  # elements of it that a part has at least


def tile_seconds(
    chip: Chip,
    batch: int,
    m: int,
    n: int,
    k: int,
    dtype: str,
    moved_bytes: float,
    written_bytes: float,
) -> float:
    """Seconds of one product by the sizes on one device, of a chip that says how many cores it has.

    dtype: of the operands. moved_bytes: all that it reads and writes; written_bytes: of its result.
    """
    stream = chip.hbm_bandwidth * chip.hbm_efficiency
    compute, parts = _quickest(chip, batch, m, n, k, dtype)
    added = parts * batch * m * n * 8.0 if parts > 1 else 0.0  # float32, written and read
    return max(compute + (written_bytes + added) / stream, (moved_bytes + added) / stream)


@lru_cache(maxsize=1 << 12)
def _quickest(chip: Chip, batch: int, m: int, n: int, k: int, dtype: str) -> tuple[float, int]:
    """Seconds of arithmetic with the best tile, and how many parts k is cut into."""
    rate = peak_flops(chip, dtype) * chip.matrix_efficiency / chip.cores
    stream = chip.hbm_bandwidth * chip.hbm_efficiency
    best = (float("inf"), 0.0, 1)
    for long, short, share in _TILES:
        for rows, columns in {(long, short), (short, long)}:
            tiles = batch * -(-m // rows) * -(-n // columns)
            for parts in _SPLITS:
                if parts > 1 and k < parts * _PART:
                    break
                waves = -(-tiles * parts // chip.cores)
                compute = waves * 2.0 * rows * columns * -(-k // parts) / (rate * share)
                added = parts * batch * m * n * 8.0 / stream if parts > 1 else 0.0
                best = min(best, (compute + added, compute, parts))
    return best[1], best[2]
