"""How long does planning take, from the function to the plan, and how does it grow?  `make bench`.

Each job runs in a process of its own, so that its peak memory is its own. The limits are those of
the project: 20 s and 2 GB for twelve layers unrolled, 4 s with scan, on two cores; and a cost that
grows about as the number of equations does. They are held to the processor's seconds, which stay
the same when something else runs beside; the table shows the clock's too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = "h100:8"
LAYERS = (6, 12, 24, 48)

# One process: import, then trace, build and plan, as a user's first call does.
CHILD = """
import json, resource, sys, time
sys.path[:0] = [{root!r}, {examples!r}]
import autoshard, jax, zoo
import passes.entries, passes.hands
pricing, price = 0.0, passes.entries.price
def timed(*args):
    global pricing
    begin = time.process_time()
    out = price(*args)
    pricing += time.process_time() - begin
    return out
passes.entries.price = timed
passes.hands._cores = lambda: 1  # all seconds are to be counted
job, layers = sys.argv[1], int(sys.argv[2])
fn, args = getattr(zoo, job)(layers=layers)
begin, work = time.perf_counter(), time.process_time()
plan = autoshard.plan(fn, *args, cluster={cluster!r})
clock, seconds = time.perf_counter() - begin, time.process_time() - work
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
print(json.dumps([len(plan.ops), seconds, pricing, clock, peak * 1024, plan.cost.step_time,
                  plan.data.status, " ".join(f"{{n}}={{s}}" for n, s in plan.mesh.items())]))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One measured plan. seconds: of the processor, clock: of the wall, from trace to plan.

    pricing: those of the seconds that all strategies on all meshes are priced in. peak: bytes of
    the process. step: the step time it predicts, in seconds.
    """

    equations: int
    seconds: float
    pricing: float
    clock: float
    peak: float
    step: float
    status: str
    mesh: str


@cache
def run(job: str, layers: int) -> Run:
    """Plan a job of examples/zoo.py in a fresh process, and print a line about it."""
    code = CHILD.format(root=str(ROOT), examples=str(ROOT / "examples"), cluster=CLUSTER)
    done = subprocess.run(
        [sys.executable, "-c", code, job, str(layers)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = Run(*json.loads(done.stdout.splitlines()[-1]))
    if run.cache_info().misses == 1:
        head = f"{'job':22}{'layers':>7}{'equations':>11}{'cpu s':>8}{'prices':>8}"
        head += f"{'clock s':>9}{'peak GB':>9}"
        print(f"\n{head}  step, mesh")
    times = f"{found.seconds:8.2f}{found.pricing:8.2f}{found.clock:9.2f}{found.peak / 1e9:9.2f}"
    print(f"{job:22}{layers:7}{found.equations:11,}{times}  ", end="")
    print(f"{found.step * 1e3:.2f} ms, {found.mesh}, {found.status}", flush=True)
    return found


def test_twelve_layers_unrolled() -> None:
    found = run("gpt2_small_unrolled", 12)
    assert found.seconds <= 20
    assert found.pricing <= 5
    assert found.peak <= 2e9


def test_twelve_layers_in_a_scan() -> None:
    assert run("gpt2_small_scan", 12).seconds <= 4


@pytest.mark.parametrize(("few", "many"), [*pairwise(LAYERS)])
def test_twice_the_layers_take_about_twice_the_time(few: int, many: int) -> None:
    a, b = run("gpt2_small_unrolled", few), run("gpt2_small_unrolled", many)
    assert b.seconds / b.equations <= 1.5 * a.seconds / a.equations
