"""Which schedules has the V, where the first device holds the first piece and the last?

A microbatch goes down all p devices and up again, and backward the same way. Where in a pattern its
tasks lie tells what a device holds: the lives of its two pieces, from F to B and a little longer,
by the period of 6 slots (F, B and W of two pieces). Slots of device d, from 0 on, of d < p:

           F of the first   F of the second   B of the second   B of the first   both lives
  V-Min    d                2p - 1 - d        2p + g + d        4p + g - 1 - d   4p + 2g
  V-Half   2d               3p - 2 - d        3p + g - 1 + 2d   6p + g - 2 - d   6p + 2g - 1
  ZB-V     4d               6p - 5 - 2d       6p - 4 + 4d       12p - 9 - 2d     12p - 8

g keeps tasks out of each other's slots: 2 in V-Min if 3 divides p, 3 in V-Half if 2 does, else 0.
Squeezed, they hold so many microbatches, of two pieces each; and of m >= 2p microbatches with
F = B = W the makespan is 6m slots and a bubble (that of 1F1B is 6p - 6)

           held        bubble
  V-Min    (p+4)//3    4p - 5, or 4p - 7 if 3 divides p
  V-Half   (p+2)//2    3p - 4, or 3p - 7 if 2 divides p    (from p = 3 on)
  ZB-V     p           0

V-Min and V-Half: Qi et al., arXiv 2405.15362, section 3. They are orders, whatever tasks cost; the
less F, B and W are alike, the longer is V-Min idle. ZB-V: Qi et al., arXiv 2401.10241, section 6;
here it is a pattern that fills the memory of 1F1B, and its W are put by what tasks cost.

>>> from passes.pipeline.stage_costs import even
>>> from passes.pipeline.timeline import simulate
>>> made = (v_min(4, 8), v_half(4, 8), zb_v(4, 8))
>>> lines = [simulate(schedule, even(4, 8, 2, 2, 2)) for schedule in made]
>>> [(line.schedule.name, line.makespan, max(line.peaks)) for line in lines]
[('V-Min', 59.0, 2.0), ('V-Half', 53.0, 3.0), ('ZB-V', 48.0, 4.0)]
"""

from __future__ import annotations

import math
from collections.abc import Callable

from passes.pipeline.fill import fill
from passes.pipeline.schedule import Schedule, ScheduleError, there_and_back
from passes.pipeline.squeeze import squeeze
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import simulate

# Of a device: the slots of its F on the first and the second piece, of B on the second and first.
_Slots = Callable[[int], tuple[int, int, int, int]]

# How W are put: how much of it may be late, and how long any device may be idle meanwhile. The best
# of these is taken: none is the best for all costs.
_FILLS = ((0.0, 0.0), (0.25, 0.0), (0.0, math.inf), (0.25, math.inf))


def v_min(devices: int, microbatches: int) -> Schedule:
    """The least memory: a third of that of 1F1B."""
    p, g = devices, 2 if devices % 3 == 0 else 0
    limit = 2 * ((p + 4) // 3)
    return _squeezed(
        "V-Min",
        lambda d: (d, 2 * p - 1 - d, 2 * p + g + d, 4 * p + g - 1 - d),
        (devices, microbatches, limit),
    )


def v_half(devices: int, microbatches: int) -> Schedule:
    """Half the memory of 1F1B, and half of its bubble."""
    p, g = devices, 3 if devices % 2 == 0 else 0
    limit = 2 * ((p + 2) // 2)
    return _squeezed(
        "V-Half",
        lambda d: (2 * d, 3 * p - 2 - d, 3 * p + g - 1 + 2 * d, 6 * p + g - 2 - d),
        (devices, microbatches, limit),
    )


def zb_v(devices: int, microbatches: int, costs: StageCosts | None = None) -> Schedule:
    """Zero bubble in the memory of 1F1B. costs: what to fit W to; else F, B and W take the same.

    Raises ScheduleError where the costs are of another number of pieces.
    """
    p, limit = devices, 2 * devices
    equal = _squeezed(
        "ZB-V",
        lambda d: (4 * d, 6 * p - 5 - 2 * d, 6 * p - 4 + 4 * d, 12 * p - 9 - 2 * d),
        (devices, microbatches, limit),
    )
    if costs is None:
        return equal
    if costs.pieces != equal.pieces:
        raise ScheduleError(
            f"ZB-V on {devices} devices has {equal.pieces} pieces, two each, and the costs are of "
            f"{costs.pieces}"
        )
    filled = [fill(equal, costs, limit, late, idle) for late, idle in _FILLS]
    return min((equal, *filled), key=lambda schedule: simulate(schedule, costs).makespan)


def _squeezed(name: str, slots: _Slots, sizes: tuple[int, int, int]) -> Schedule:
    devices, microbatches, limit = sizes
    way = there_and_back(devices)
    by_device = [slots(d) for d in range(devices)]
    pattern = [
        by_device[place.device][place.chunk if kind == "F" else 3 - place.chunk]
        for kind, places in (("F", way), ("B", way[::-1]))
        for place in places
    ]
    orders = squeeze(way, pattern, microbatches, limit)
    return Schedule(name, (way,), (0,) * microbatches, orders)
