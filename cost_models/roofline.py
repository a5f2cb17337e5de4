"""How many seconds does one operation compute?  The slower of arithmetic and memory traffic.

    seconds = max(flops / (efficiency * peak), bytes / (efficiency * memory bandwidth))

(Williams, Waterman, Patterson, "Roofline", CACM 2009.) The efficiencies are one number per chip,
with their source in its cluster file: what a large product, or a long stream, reaches of the peak.
Small and narrow operations reach less: chips with fitted constants are priced by
`cost_models.product` and `cost_models.vector`, the others by this.

>>> from cost_models.cluster import cluster
>>> v5e = cluster("tpu-v5e:1x1").chip
>>> f"{compute_seconds(v5e, 2 * 4096**3, 3 * 2 * 4096**2, 'bfloat16', True) * 1e6:.0f} us"
'771 us'
"""

from __future__ import annotations

from functools import lru_cache

from cost_models.cluster import Chip

# What a dtype is computed as where the chip lists no peak of its own, the closest first.
# * float32 is listed by every chip: on TPU a default-precision product is one bfloat16 pass (more
#   at HIGH and HIGHEST), on recent NVIDIA GPUs TF32 (docs.jax.dev, "Matmul precision").
# * float8 and int4 without units of their own are widened before they are multiplied.
# * float64 without units of its own is emulated; float32 is then a lower bound of the time.
# * Integers wider than 8 bits have no matrix unit; float32 has the same width.
_COMPUTED_AS: dict[str, tuple[str, ...]] = {
    "float16": ("float16", "bfloat16", "float32"),
    "bfloat16": ("bfloat16", "float16", "float32"),
    "float64": ("float64", "float32"),
    "complex128": ("float64", "float32"),
    "int8": ("int8", "bfloat16", "float32"),
    "int4": ("int4", "int8", "bfloat16", "float32"),
    "float8": ("float8", "bfloat16", "float16", "float32"),
    "float4": ("float4", "float8", "bfloat16", "float16", "float32"),
}


def compute_seconds(
    chip: Chip, flops: float, moved_bytes: float, dtype: str, matrix: bool
) -> float:
    """Seconds of one operation; matrix: whether it is a product or a convolution."""
    if not matrix:
        rate = chip.vector_flops
    else:
        rate = (chip.peak_flops.get(dtype) or peak_flops(chip, dtype)) * chip.matrix_efficiency
    return max(flops / rate, moved_bytes / (chip.hbm_bandwidth * chip.hbm_efficiency))


def peak_flops(chip: Chip, dtype: str) -> float:
    """FLOP/s of the matrix unit for a dtype, or for the closest one that the chip lists."""
    for known in computed_as(dtype):
        if known in chip.peak_flops:
            return chip.peak_flops[known]
    return min(chip.peak_flops.values())


@lru_cache(maxsize=256)
def computed_as(dtype: str) -> tuple[str, ...]:
    """The dtypes a product of this one may be computed in, the closest first.

    >>> computed_as("float8_e4m3fn")
    ('float8_e4m3fn', 'float8', 'bfloat16', 'float16', 'float32')
    """
    name = dtype.removeprefix("u") if dtype.startswith("uint") else dtype
    family = name.split("_")[0]  # float8_e4m3fn
    return (name, *_COMPUTED_AS.get(name, _COMPUTED_AS.get(family, ("float32",))))
