"""Who prices and searches some of the meshes?  A hand: an object here, or a process of its own."""

from __future__ import annotations

import copyreg
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from passes.entries import Entry, Setting, enter, price_on
from passes.fitting import fixed, solve_within
from passes.hints import HintError
from passes.ir.mesh import Mesh
from passes.ir.plan import Alternative, Cost
from passes.plan_cost import cost_of
from passes.priced import Priced
from passes.propagate import wire
from passes.reshard_table import PICO
from passes.shortage import shortage_text
from passes.solve.problem import Solution

# Operations times meshes from which on a process of their own is worth starting: a thousand of them
# take about a second (LLaMA scanned, 721 operations on 19 meshes), as long as it takes to start.
_MANY = 3000


@dataclass(frozen=True, slots=True)
class Promise:
    """What a mesh promises. seconds: of the best baseline that fits; baselines: what they cost.

    unfit: the error where a hint does not fit the mesh.
    """

    seconds: float = math.inf
    baselines: tuple[Alternative, ...] = ()
    unfit: HintError | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the search of a mesh found. seconds, cost: of its choice; why: where it has none."""

    solution: Solution
    seconds: float
    cost: Cost | None
    why: str = ""


class Given(NamedTuple):
    """A mesh for a hand, and the baselines that are natural on it."""

    mesh: Mesh
    natural: tuple[str, ...]


class Here:
    """A hand of this process."""

    def __init__(self, setting: Setting, given: Sequence[Given], solver: str) -> None:
        self.setting, self.given, self.solver = setting, given, solver
        self.entries: dict[int, Entry] = {}
        self.interrupted = False

    def promises(self) -> Iterator[Promise]:
        """What its meshes promise, one after the other."""
        wiring = wire(self.setting.graph)
        for k, (mesh, natural) in enumerate(self.given):
            try:
                entry = enter(self.setting, mesh, self.solver, wiring, natural)
            except HintError as error:
                yield Promise(unfit=error)
                continue
            self.entries[k] = entry
            yield Promise(entry.promise, entry.baselines)

    def begin(self, k: int, best: float) -> None:
        """Search one of its meshes for what takes less than `best` seconds."""
        self.next = k, best

    def answer(self) -> Answer:
        """What it found there."""
        if self.interrupted:
            raise KeyboardInterrupt
        k, best = self.next
        priced, starts = self.entries[k].priced, self.entries[k].starts
        if self.solver == "ilp":
            below = (best - priced.constant) * PICO
            solution = solve_within(priced, starts, self.setting.limit, below)
        else:
            solution = fixed(priced.problem, starts[0])
        if solution.choice or not priced.problem.nodes:
            cost = cost_of(priced, solution.choice)
            return Answer(solution, solution.cost / PICO + priced.constant, cost)
        return Answer(solution, math.inf, None, _why(priced, solution))

    def priced(self, k: int) -> Priced:
        """The problem of one of its meshes."""
        return self.entries[k].priced

    def interrupt(self) -> None:
        """Do not search any more."""
        self.interrupted = True

    def close(self) -> None:
        """Nothing to be done."""


def _why(priced: Priced, solution: Solution) -> str:
    if solution.stopped == "cutoff":
        return "nothing on it is as fast"
    if solution.shortage is None:
        return "no feasible choice found"
    return shortage_text(priced, solution.shortage)


class Elsewhere:
    """A hand that is a process of its own. Should that fail, a hand of this one takes over."""

    def __init__(self, setting: Setting, given: Sequence[Given], solver: str) -> None:
        self.setting, self.given, self.solver = setting, given, solver
        self.instead: Here | None = None
        self.interrupted = False
        what = _dumped((setting, tuple(given), solver))  # before there is a process
        paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from passes.hands import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for this process to hear, and to pass on
        )
        self.send(what)

    def promises(self) -> Iterator[Promise]:
        """What its meshes promise, one after the other."""
        for k in range(len(self.given)):
            promise = None if self.instead else self.hear()
            if promise is None:
                yield from list(self.taken_over().promises())[k:]
                return
            assert isinstance(promise, Promise)
            yield promise

    def begin(self, k: int, best: float) -> None:
        """Search one of its meshes for what takes less than `best` seconds."""
        self.next = k, best
        self.send(_dumped(self.next))

    def answer(self) -> Answer:
        """What it found there; Ctrl-C ends the search with the best so far."""
        try:
            found = self.hear()
        except KeyboardInterrupt:
            self.interrupt()
            found = self.hear()
        if found is None and self.interrupted:
            raise KeyboardInterrupt
        if found is None:
            here = self.taken_over()
            if not here.entries:
                list(here.promises())
            here.begin(*self.next)
            return here.answer()
        assert isinstance(found, Answer)
        return found

    def priced(self, k: int) -> Priced:
        """The problem of one of its meshes."""
        return price_on(self.setting, self.given[k].mesh)

    def interrupt(self) -> None:
        """End its search with the best so far."""
        self.interrupted = True
        os.kill(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def taken_over(self) -> Here:
        """The hand that does the work instead."""
        if self.instead is None:
            self.instead = Here(self.setting, self.given, self.solver)
        return self.instead

    def send(self, what: bytes) -> None:
        """Say something, if it still listens."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(what)
            self.process.stdin.flush()

    def hear(self) -> object:
        """What it says, None where it is silent for ever."""
        assert self.process.stdout is not None
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            return None


def serve() -> None:
    """Be a hand elsewhere: read what to do from stdin, and say on stdout what is found."""
    said = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints is no answer
    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):  # nobody asks any more
        setting, given, solver = pickle.load(sys.stdin.buffer)
        hand = Here(setting, given, solver)
        for promise in hand.promises():
            said.write(_dumped(promise))
            said.flush()
        while True:
            hand.begin(*pickle.load(sys.stdin.buffer))
            said.write(_dumped(hand.answer()))
            said.flush()


def _dumped(what: object) -> bytes:
    copyreg.pickle(MappingProxyType, _reduced)
    return pickle.dumps(what, protocol=pickle.HIGHEST_PROTOCOL)


def _reduced(mapping: MappingProxyType[Any, Any]) -> tuple[Callable[..., Any], tuple[Any]]:
    return _read_only, (dict(mapping),)


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


def hand(setting: Setting, given: Sequence[Given], solver: str, first: bool) -> Here | Elsewhere:
    """A hand for these meshes; but for the first, a process of its own where that saves time."""
    work = (len(set(setting.same)) or len(setting.graph.ops)) * len(given)
    if not first and solver == "ilp" and work >= _MANY and _cores() > 1:
        # No process, or something among the user's own that can not be sent to one: do it here.
        with suppress(OSError, pickle.PicklingError, TypeError, AttributeError, ValueError):
            return Elsewhere(setting, given, solver)
    return Here(setting, given, solver)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
