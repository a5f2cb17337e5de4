"""Which latency and bandwidth explain measured collectives?  `fit_switch(timings) -> Level`.

The level of network whose predictions, by the very formulas of `cost_models.collectives`, are off
by the smallest factors: least squares of log(predicted / measured), so that a collective of a
microsecond counts as much as one of a second. Factors far from the others count by their size, not
by its square (Huber, Ann. Math. Stat. 35, 1964): where one kind of collective does not follow the
formulas at all, it does not spoil the others.

>>> from cost_models.collectives import COLLECTIVES
>>> true = Level("wires", "switch", bandwidth=2e9, latency=3e-6, startup=5e-5)
>>> runs = [(kind, b, n) for kind in COLLECTIVES for b in (1e4, 1e6) for n in (2, 8)]
>>> timings = [Timing(*run, predicted(true, *run)) for run in runs]
>>> found, off = fit_switch(timings, "wires")
>>> f"{found.bandwidth / 1e9:.2f} GB/s, {found.latency * 1e6:.2f} us, {found.startup * 1e6:.1f} us"
'2.00 GB/s, 3.00 us, 50.0 us'
>>> f"off by {100 * (off - 1):.0f} %"
'off by 0 %'
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cost_models.cluster import Chip, Cluster, Level
from cost_models.collectives import Collective, seconds
from cost_models.topology import lay

# Nothing takes less than this: a parameter that the timings do not show ends here, and not at zero,
# which has no logarithm.
_LEAST_SECONDS = 1e-9
_MOST_BANDWIDTH = 1e15

_USUAL = 0.3  # so far off, as a logarithm, are times of a busy machine
_NUDGE = 1e-4
_WORTHWHILE = 1e-6  # a step that makes the error smaller by less is none
_MOST_DAMPING = 1e3  # and so is one as short as this makes it

# Only the wires count in the time of a collective.
_NO_CHIP = Chip("any", {"float32": 1.0}, 1.0, 1, 1, 1.0)


@dataclass(frozen=True, slots=True)
class Timing:
    """One measured collective. nbytes: of the larger of operand and result on one device.

    group: how many devices take part.
    """

    kind: Collective
    nbytes: float
    group: int
    seconds: float


def predicted(level: Level, kind: Collective, nbytes: float, group: int) -> float:
    """Seconds of a collective in a group of so many devices on one switch."""
    [link] = lay(Cluster("any", "cpu", _NO_CHIP, (level,), (group,)), (group,))
    return seconds(kind, nbytes, link)


def fit_switch(timings: Sequence[Timing], name: str) -> tuple[Level, float]:
    """The switch that explains the timings best, and the factor by which it is off on average.

    The factor is exp of the root mean square of log(predicted / measured): 1.0 is a perfect fit.
    Raises ValueError where no timing is above zero.
    """
    timings = [t for t in timings if t.seconds > 0]
    if not timings:
        raise ValueError("no collective took any time: there is nothing to fit")
    point = _start(timings)
    errors = _bounded(point, timings)
    damping, slope = 1.0, _slope(point, errors, timings)
    while damping < _MOST_DAMPING:
        # Levenberg and Marquardt (SIAM J. Appl. Math. 11, 1963), in logarithms of the parameters.
        pull = slope.T @ slope + damping * np.eye(len(point))
        there = _within(point - np.linalg.solve(pull, slope.T @ errors))
        found = _bounded(there, timings)
        if found @ found < (1 - _WORTHWHILE) * (errors @ errors):
            point, errors, damping = there, found, damping / 3
            slope = _slope(point, errors, timings)
        else:
            damping *= 3
    off = math.sqrt(float(np.mean(_errors(point, timings) ** 2)))
    return _level(point, name), math.exp(off)


def _start(timings: Sequence[Timing]) -> np.ndarray:
    """log of startup, latency and bandwidth: the shortest time, and the largest rate."""
    shortest = min(t.seconds for t in timings)
    rate = max(t.nbytes / t.seconds for t in timings)
    return _within(np.log([shortest, shortest / 10, rate]))


def _within(point: np.ndarray) -> np.ndarray:
    least, most = math.log(_LEAST_SECONDS), math.log(_MOST_BANDWIDTH)
    return np.array([max(point[0], least), max(point[1], least), min(max(point[2], 0.0), most)])


def _level(point: np.ndarray, name: str) -> Level:
    startup, latency, bandwidth = (float(x) for x in np.exp(point))
    return Level(name, "switch", bandwidth=bandwidth, latency=latency, startup=startup)


def _errors(point: np.ndarray, timings: Sequence[Timing]) -> np.ndarray:
    """log(predicted / measured) of each timing."""
    level = _level(point, "any")
    ratios = [predicted(level, t.kind, t.nbytes, t.group) / t.seconds for t in timings]
    out: np.ndarray = np.log(np.array(ratios))
    return out


def _bounded(point: np.ndarray, timings: Sequence[Timing]) -> np.ndarray:
    """The errors, those far above _USUAL as the roots of their sizes (a smooth Huber loss)."""
    errors = _errors(point, timings)
    size = np.sqrt(1 + (errors / _USUAL) ** 2) - 1
    out: np.ndarray = np.sign(errors) * _USUAL * np.sqrt(2 * size)
    return out


def _slope(point: np.ndarray, errors: np.ndarray, timings: Sequence[Timing]) -> np.ndarray:
    """How each error changes with each parameter."""
    nudged = [_bounded(point + _NUDGE * unit, timings) for unit in np.eye(len(point))]
    return np.stack([(e - errors) / _NUDGE for e in nudged], axis=1)
