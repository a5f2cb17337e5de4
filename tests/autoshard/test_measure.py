"""Seconds of a step, told from what a call costs, on a clock that the tests hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from autoshard.measure import Probe, step_seconds


@dataclass
class Machine:
    """A clock, and programs that move it on. slow: call number -> by how much slower it is."""

    now: float = 0.0
    calls: list[tuple[str, int]] = field(default_factory=list)
    slow: dict[int, float] = field(default_factory=dict)

    def clock(self) -> float:
        return self.now

    def probe(self, name: str, call: float, turn: float, steps: int = 1) -> Probe:
        def run(turns: int) -> None:
            factor = self.slow.get(len(self.calls), 1.0)
            self.calls.append((name, turns))
            self.now += factor * (call + turns * turn)

        return Probe(name, run, steps)


@pytest.mark.parametrize("turn", [1e-7, 3e-5, 0.02, 5.0])
@pytest.mark.parametrize("call", [0.0, 0.004])
def test_the_call_is_not_counted(turn: float, call: float) -> None:
    machine = Machine()
    probe = machine.probe("a", call, turn)
    [found] = step_seconds([probe], rounds=3, enough=0.05, clock=machine.clock)
    assert found == pytest.approx(turn, rel=1e-3)


def test_a_turn_of_two_steps() -> None:
    machine = Machine()
    probe = machine.probe("a", 0.001, 0.01, steps=2)
    assert step_seconds([probe], rounds=1, enough=0.05, clock=machine.clock) == [
        pytest.approx(0.005)
    ]


def test_a_run_takes_as_long_as_asked() -> None:
    machine = Machine()
    step_seconds([machine.probe("a", 0.01, 1e-5)], rounds=1, enough=0.05, clock=machine.clock)
    assert machine.calls[-1][1] * 1e-5 == pytest.approx(0.05, rel=0.5)
    assert sum(turns for _, turns in machine.calls) * 1e-5 < 0.3


def test_the_programs_take_turns() -> None:
    machine = Machine()
    probes = [machine.probe(n, 0.0, 0.1) for n in "abc"]
    step_seconds(probes, rounds=2, enough=0.05, clock=machine.clock)
    assert [n for n, _ in machine.calls[-12:]] == list("aabbcc") * 2


def test_a_disturbed_round_does_not_count() -> None:
    machine = Machine()
    probes = [machine.probe(n, 0.0, 0.1) for n in "ab"]
    step_seconds(probes, rounds=1, enough=0.05, clock=machine.clock)
    warm = len(machine.calls) - 4  # calls before the first round
    again = Machine(slow={warm + k: 10.0 for k in range(4)})
    probes = [again.probe(n, 0.0, 0.1) for n in "ab"]
    found = step_seconds(probes, rounds=3, enough=0.05, clock=again.clock)
    assert found == [pytest.approx(0.1)] * 2


def test_what_is_lost_in_the_noise_is_zero_and_not_less() -> None:
    machine = Machine(slow={k: 2.0 for k in range(0, 1000, 2)})
    probe = machine.probe("a", 1.0, 0.0)
    [found] = step_seconds([probe], rounds=3, enough=0.05, clock=machine.clock)
    assert found >= 0.0


def test_each_step_is_told() -> None:
    machine, told = Machine(), list[str]()
    step_seconds(
        [machine.probe("a", 0.0, 0.1)], rounds=2, enough=0.05, clock=machine.clock, tell=told.append
    )
    assert told == ["warming up a", "round 1 of 2, a", "round 2 of 2, a"]
