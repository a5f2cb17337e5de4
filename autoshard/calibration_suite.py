"""Which programs are measured, and what do their times mean?  `measured(devices, ...) -> Figures`.

A suite has products, chains of elementwise functions, streams, small operations and collectives, of
several sizes each. What varies with the size is one number in a cluster file: the geometric mean of
the rates, and for the wires a fit.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from autoshard import probes
from autoshard.calibration_file import Figures, Key
from autoshard.measure import Probe, Tell, step_seconds
from autoshard.trace import trace
from cost_models.collectives import COLLECTIVES
from cost_models.fit import Timing, fit_switch

_KIB, _MIB = 1 << 10, 1 << 20


class CalibrationError(ValueError):
    """Devices that can not be measured, or a file that may not be written."""


def measured(
    devices: Sequence[Any], quick: bool, tell: Tell, memory_bytes: int, memory_source: str
) -> Figures:
    """What the devices can do; takes a minute or two, or some 20 seconds when quick.

    memory_bytes: of a device, and who says so. Raises CalibrationError as `figures` does.
    """
    rounds, enough = (3, 0.01) if quick else (7, 0.04)
    programs = suite(devices, quick)
    made = []
    for k, make in enumerate(programs.values()):
        tell(f"compiling program {k + 1} of {len(programs)}")
        made.append(make())
    seconds = step_seconds(made, rounds=rounds, enough=enough, tell=tell)
    times = dict(zip(programs, seconds, strict=True))
    return figures(times, rounds, memory_bytes, memory_source)


def figures(
    seconds: Mapping[Key, float], rounds: int, memory_bytes: int, memory_source: str
) -> Figures:
    """The figures that measured seconds of a step mean. seconds: per program of the suite.

    Raises CalibrationError where a program took no time: the machine was too busy to measure.
    """
    lost = [key for key, took in seconds.items() if took <= 0 and key[0] != "kernels"]
    if lost:
        raise CalibrationError(
            f"{' '.join(map(str, lost[0]))} took no time that can be told from the noise: "
            "calibrate again when nothing else is running"
        )
    rates: dict[str, list[float]] = defaultdict(list)
    timings = []
    for (what, *sizes), took in seconds.items():
        if what in COLLECTIVES:
            timings.append(Timing(what, sizes[0], sizes[1], took))
        elif what != "kernels":
            rates[what].append(_work(what, sizes) / took)
    few, many = (seconds["kernels", n] for n in _KERNELS)
    wires, off = fit_switch(timings, "measured")
    return Figures(
        products={dtype: _typical(rates[dtype]) for dtype in _DTYPES},
        vector=_typical([r for function in _CHAINS for r in rates[function]]),
        memory=_typical(rates["stream"]),
        kernel=max(0.0, (many - few) / (_KERNELS[1] - _KERNELS[0])),
        wires=wires,
        wires_off=off,
        collectives=len(timings),
        memory_bytes=memory_bytes,
        memory_source=memory_source,
        rounds=rounds,
        seconds=dict(seconds),
    )


_DTYPES = ("float32", "bfloat16")
_KERNELS = (1, 33)
_CHAINS = {"activation": probes.activation, "polynomial": probes.polynomial}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured. products: rows and size, as in `probes.product`; elements: of a chain.

    streams, messages: bytes on each device.
    """

    products: tuple[tuple[int, int], ...]
    streams: tuple[int, ...]
    elements: int
    messages: tuple[int, ...]

    def fewer(self) -> Sizes:
        """Those in the middle, for a quick look."""
        return replace(
            self,
            products=self.products[1:2],
            streams=self.streams[1:2],
            messages=self.messages[1::2],
        )


# On a CPU as large as the shares of a small model, which is what virtual devices are used for, but
# streams too long for its cache, since a step comes back to an array only after all others.
# Elsewhere so large that a device is busy.
_ON_CPU = Sizes(
    products=((64, 256), (256, 256), (128, 512), (512, 512), (128, 1024)),
    streams=(4 * _MIB, 16 * _MIB, 32 * _MIB),
    elements=64 * _KIB,
    messages=(4 * _KIB, 64 * _KIB, 512 * _KIB, 4 * _MIB),
)
_ELSEWHERE = Sizes(
    products=((4096, 4096), (8192, 4096), (8192, 8192)),
    streams=(64 * _MIB, 256 * _MIB),
    elements=16 * _MIB,
    messages=(16 * _KIB, _MIB, 16 * _MIB, 128 * _MIB),
)


def suite(devices: Sequence[Any], quick: bool) -> dict[Key, Callable[[], Probe]]:
    """Every program to measure, not compiled yet."""
    sizes, groups = _ON_CPU if devices[0].platform == "cpu" else _ELSEWHERE, _groups(len(devices))
    if quick:
        sizes, groups = sizes.fewer(), sorted({groups[0], groups[-1]})
    out: dict[Key, Callable[[], Probe]] = {}
    for dtype, (rows, size) in itertools.product(_DTYPES, sizes.products):
        out[dtype, rows, size] = partial(probes.product, devices, rows, size, dtype)
    for nbytes in sizes.streams:
        out["stream", nbytes] = partial(probes.stream, devices, nbytes)
    for name, function in _CHAINS.items():
        out[name, sizes.elements] = partial(probes.chain, devices, sizes.elements, function)
    for count in _KERNELS:
        out["kernels", count] = partial(probes.kernels, devices, count)
    for kind, group, nbytes in itertools.product(probes.KINDS, groups, sizes.messages):
        even = nbytes - nbytes % (4 * group)
        out[kind, even, group] = partial(probes.collective, devices, kind, group, even)
    return out


def _groups(count: int) -> list[int]:
    """Sizes of groups to measure: up to four divisors, the smallest, the largest, and between."""
    divisors = [n for n in range(2, count + 1) if count % n == 0]
    places = np.linspace(0, len(divisors) - 1, min(4, len(divisors)))
    return [divisors[round(p)] for p in places]


def _work(what: str, sizes: Sequence[int]) -> float:
    """FLOP, or for a stream bytes, of one step on each device."""
    if what == "stream":
        return 2.0 * sizes[0]
    if what in _CHAINS:  # counted as the prices of a plan count it
        shape = jax.ShapeDtypeStruct((sizes[0],), np.float32)
        return sum(op.rule.flops for op in trace(_CHAINS[what], shape).graph.ops)
    rows, size = sizes
    return 2.0 * rows * size**2


def _typical(rates: Sequence[float]) -> float:
    """The geometric mean: off by the same factor to both sides."""
    return statistics.geometric_mean(rates)
