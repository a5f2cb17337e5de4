"""How are seconds, bytes and FLOP written and read?  Always with a unit, three digits at most.

>>> format_seconds(3.1e-6), format_bytes(1.25 * GiB), format_flops(34.36e9)
('3.1 us', '1.25 GiB', '34.4 GFLOP')
>>> parse_bytes("15.75GiB")
16911433728
"""

from __future__ import annotations

import math
import re
from numbers import Real

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KiB, MiB, GiB, TiB = 2**10, 2**20, 2**30, 2**40

_SIZES = {
    "b": 1,
    "kb": KB,
    "mb": MB,
    "gb": GB,
    "tb": TB,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": TiB,
}
_SECONDS = ((1e-9, "ns"), (1e-6, "us"), (1e-3, "ms"), (1.0, "s"))
_BYTES = ((1.0, "B"), (KiB, "KiB"), (MiB, "MiB"), (GiB, "GiB"), (TiB, "TiB"))
_FLOPS = (
    (1.0, "FLOP"), (1e3, "KFLOP"), (1e6, "MFLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"),
)  # fmt: skip


def format_seconds(seconds: float) -> str:
    """Seconds as `3.1 us`, `12 ms` or `1.5 s`."""
    return _scaled(seconds, _SECONDS)


def format_bytes(nbytes: float) -> str:
    """Bytes as `1.25 GiB`, in powers of 1024."""
    return _scaled(nbytes, _BYTES)


def format_flops(flops: float) -> str:
    """A count of floating-point operations as `34.4 GFLOP`; write a rate by adding `/s`."""
    return _scaled(flops, _FLOPS)


def parse_bytes(text: str | float) -> int:
    """A number of bytes from `16GB`, `15.75GiB`, `512 MiB` or a plain number.

    GB is 10^9 and GiB is 2^30. Raises ValueError for anything else, a negative size included.
    """
    if isinstance(text, str):
        found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*", text)
        unit = _SIZES.get(found[2].lower() or "b") if found else None
        try:
            number = float(found[1]) * unit if found and unit else math.nan
        except ValueError:  # "1.2.3GB"
            number = math.nan
    else:
        is_number = isinstance(text, Real) and not isinstance(text, bool)
        number = float(text) if is_number else math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"cannot read {text!r} as a number of bytes; write 16GB (16 * 10^9), 15.75GiB "
            "(15.75 * 2^30), 512MiB or a plain number of bytes"
        )
    return round(number)


def _scaled(x: float, units: tuple[tuple[float, str], ...]) -> str:
    """x in the smallest unit that keeps it below a thousand, rounded to three digits."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g} {next(name for scale, name in units if scale == 1)}"
    fits = (u for u in units if float(f"{abs(x) / u[0]:.3g}") < 1000)
    scale, name = next(fits, units[-1])
    value = x / scale
    return f"{value:.0f} {name}" if abs(value) >= 100 else f"{value:.3g} {name}"
