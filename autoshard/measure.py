"""How many seconds does one step of a program take, when others are measured beside it?

Every program is a loop whose number of turns is an argument. What a call costs besides its turns is
measured with no turns at all, and taken off. The programs run one after the other, round after
round, so that a machine that slows down for a while slows them all; then the median counts.

>>> from itertools import count
>>> ticks = count()
>>> def clock() -> float:  # every look at it is 1 ms later
...     return next(ticks) / 1e3
>>> step_seconds([Probe("idle", lambda turns: None)], rounds=3, enough=1e-4, clock=clock)
[0.0]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Tell = Callable[[str], None]

# No turn is so short that more of them would be needed to fill a run.
_MOST_TURNS = 1 << 20


@dataclass(frozen=True, slots=True)
class Probe:
    """A program to measure.

    run(turns): does so many turns, and returns when they are done. steps: in each turn.
    """

    name: str
    run: Callable[[int], None]
    steps: int = 1


def step_seconds(
    probes: Sequence[Probe],
    *,
    rounds: int,
    enough: float,
    clock: Callable[[], float] = time.perf_counter,
    tell: Tell = lambda _: None,
) -> list[float]:
    """Median seconds of a step of each probe; never below 0.

    rounds: how often each is measured. enough: seconds that the turns of one run should take.
    """
    turns = []
    for probe in probes:
        tell(f"warming up {probe.name}")
        turns.append(_enough_turns(probe, enough, clock))
    found: list[list[float]] = [[] for _ in probes]
    for k in range(rounds):
        for probe, count, seconds in zip(probes, turns, found, strict=True):
            tell(f"round {k + 1} of {rounds}, {probe.name}")
            empty = _seconds(probe, 0, clock)
            took = _seconds(probe, count, clock) - empty
            seconds.append(took / (count * probe.steps))
    return [max(0.0, statistics.median(seconds)) for seconds in found]


def _enough_turns(probe: Probe, enough: float, clock: Callable[[], float]) -> int:
    """So many turns that a run takes about `enough` seconds longer than one without any."""
    probe.run(1)  # the first run of a program is not like the others
    empty, turns = _seconds(probe, 0, clock), 1
    while turns < _MOST_TURNS:
        took = _seconds(probe, turns, clock) - empty
        if took >= enough / 2:
            return max(1, round(turns * min(2.0, enough / took)))
        turns *= 2 if took > enough / 16 else 8
    return turns


def _seconds(probe: Probe, turns: int, clock: Callable[[], float]) -> float:
    begin = clock()
    probe.run(turns)
    return clock() - begin
