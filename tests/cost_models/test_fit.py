"""Times that a known network would give lead back to it; noisy ones lead near it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.cluster import Level
from cost_models.collectives import COLLECTIVES
from cost_models.fit import Timing, fit_switch, predicted

RUNS = [(kind, b, n) for kind in COLLECTIVES for b in (2**12, 2**16, 2**22) for n in (2, 4, 8)]


def level(bandwidth: float, latency: float, startup: float) -> Level:
    return Level("wires", "switch", bandwidth=bandwidth, latency=latency, startup=startup)


def timings(true: Level, noise: Callable[[], float] = lambda: 1.0) -> list[Timing]:
    return [Timing(*run, predicted(true, *run) * noise()) for run in RUNS]


# Where a parameter hardly matters it can not be found, but no prediction may suffer from that.
@settings(max_examples=8, deadline=None)
@given(
    bandwidth=st.floats(8, 12).map(lambda e: 10**e),
    latency=st.floats(-7, -4).map(lambda e: 10**e),
    startup=st.floats(-7, -3).map(lambda e: 10**e),
)
def test_exact_times_are_explained(bandwidth: float, latency: float, startup: float) -> None:
    found, off = fit_switch(timings(level(bandwidth, latency, startup)), "wires")
    assert off < 1.01
    for t in timings(level(bandwidth, latency, startup)):
        assert predicted(found, t.kind, t.nbytes, t.group) == pytest.approx(t.seconds, rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_noise_does_not_mislead(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = level(1e9, 2e-6, 1e-4)
    found, off = fit_switch(timings(true, lambda: math.exp(rng.normal(0, 0.5))), "wires")
    assert found.bandwidth == pytest.approx(1e9, rel=0.5)
    assert found.startup == pytest.approx(1e-4, rel=0.5)
    assert 1.3 < off < 2.0  # exp(0.5) is 1.65


def test_the_fit_is_the_best_there_is() -> None:
    rng = np.random.default_rng(0)
    noisy = timings(level(1e9, 2e-6, 1e-4), lambda: math.exp(rng.normal(0, 0.5)))

    def errors(at: Level) -> np.ndarray:
        return np.log([predicted(at, t.kind, t.nbytes, t.group) / t.seconds for t in noisy])

    def loss(at: Level) -> float:
        return float(np.sum(np.sqrt(1 + (errors(at) / 0.3) ** 2) - 1))

    found, off = fit_switch(noisy, "wires")
    assert off == pytest.approx(math.exp(math.sqrt(float(np.mean(errors(found) ** 2)))))
    for a, b, c in itertools.product((0.97, 1.0, 1.03), repeat=3):
        near = level(a * found.bandwidth, b * found.latency, c * found.startup)
        assert loss(near) >= loss(found) - 1e-3


def test_a_kind_that_does_not_follow_the_formulas_does_not_spoil_the_others() -> None:
    true = level(1e9, 2e-6, 1e-4)
    slow = [
        dataclasses.replace(t, seconds=t.seconds * (5 if t.kind == "all_to_all" else 1))
        for t in timings(true)
    ]
    found, _ = fit_switch(slow, "wires")
    assert found.bandwidth == pytest.approx(1e9, rel=0.1)
    assert found.startup == pytest.approx(1e-4, rel=0.1)


def test_a_slow_start_alone_is_told_from_bandwidth() -> None:
    found, _ = fit_switch(timings(level(1e15, 1e-9, 3e-4)), "wires")
    assert found.startup == pytest.approx(3e-4, rel=0.01)
    assert found.bandwidth > 1e12


def test_times_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no collective took any time"):
        fit_switch([Timing("all_gather", 4096, 2, 0.0)], "wires")


def test_what_took_no_time_is_left_out() -> None:
    true = level(1e9, 2e-6, 1e-4)
    found, _ = fit_switch([*timings(true), Timing("permute", 4096, 2, 0.0)], "wires")
    assert found.bandwidth == pytest.approx(1e9, rel=0.01)
