"""Are plans in the order that their prices say?  Steps on 8 virtual CPU devices beside predictions.

    make rank                                                # measures the machine first
    make rank ARGS="--cluster my.toml:8 --programs mlp_batch --seconds 300"

Every program gets a dozen plans: the search's, the experts', those on forced meshes, and poor ones.
The plans of all programs are compiled and run in turn, round after round, so that a machine that is
busy with something else for a while slows them all; a short step runs several times in a round. A
train step gives its state away, as trainers do: results in fresh memory cost a CPU several times as
much. Printed are predicted and measured times, and Spearman's rank correlation of the two for each
program and over all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np
import zoo

import autoshard
from autoshard.same_numbers import fill

ROWS, PAIRS, SQUARE = {"data": 8}, {"data": 4, "model": 2}, {"data": 2, "model": 4}

# What every program is asked for. A poor plan is made by hints that leave devices with the same
# work to do, or that split what is then needed whole; nothing else is hinted or searched.
Asked = tuple[str, dict[str, Any]]
COMMON: tuple[Asked, ...] = (
    ("ilp 8", {"mesh": ROWS}),
    ("ilp 4x2", {"mesh": PAIRS}),
    ("ilp 2x4", {"mesh": SQUARE}),
    ("dp 8", {"mesh": ROWS, "solver": "dp"}),
    ("fsdp 8", {"mesh": ROWS, "solver": "fsdp"}),
    ("tp 8", {"mesh": ROWS, "solver": "tp"}),
    ("fsdp+tp 4x2", {"mesh": PAIRS, "solver": "fsdp+tp"}),
    ("fsdp+tp 2x4", {"mesh": SQUARE, "solver": "fsdp+tp"}),
    ("tp 2x4", {"mesh": SQUARE, "solver": "tp"}),
)


def poor(data: str, feature: str | None) -> tuple[Asked, ...]:
    """Data: a glob for the batch. feature: a spec that splits its last dim, where it has one."""
    spread = {"solver": "propagate"}
    out: list[Asked] = [
        ("all the same", {"mesh": ROWS, "hints": {data: ""}, **spread}),
        ("twice the work", {"mesh": PAIRS, "hints": {data: "data"}, **spread}),
        ("four times the work", {"mesh": SQUARE, "hints": {data: "data"}, **spread}),
    ]
    if feature:
        out.append(("features 8", {"mesh": ROWS, "hints": {data: feature}, **spread}))
    return tuple(out)


@dataclass(frozen=True)
class Program:
    """job: as in examples/zoo.py. poor: plans besides COMMON. trains: a train step or not."""

    job: Callable[[], zoo.Job]
    poor: tuple[Asked, ...]
    trains: bool = True


PROGRAMS = {
    # A large batch of narrow layers: products rule, and the batch is to be split.
    "mlp_batch": Program(partial(zoo.mlp, 256, 4, 1024), poor("batch", "None,data")),
    # A small batch of wide layers: gradients rule, and the weights are to be split.
    "mlp_wide": Program(partial(zoo.mlp, 1024, 3, 128), poor("batch", "None,data")),
    "gpt": Program(
        partial(zoo.gpt, width=256, layers=2, heads=8, sequence=32, batch=8, vocab=512),
        poor("batch", None),
    ),
    "moe": Program(
        partial(zoo.moe_layer, experts=8, groups=8, tokens=64, width=256, hidden=512),
        poor("x", "None,None,data"),
        trains=False,
    ),
}


_TURN_S = 0.3


@dataclass
class Entry:
    """A plan, its compiled step on arguments in place, and seconds of the steps so far."""

    name: str
    plan: autoshard.Plan
    step: Callable[[], None]
    seconds: list[float] = field(default_factory=list)

    @property
    def predicted(self) -> float:
        return self.plan.cost.step_time

    @property
    def measured(self) -> float:
        return statistics.median(self.seconds)


def entries(program: Program, cluster: autoshard.Cluster) -> Iterator[Entry]:
    """Every plan once; another that costs the same on the same mesh is the same one."""
    fn, args = program.job()
    values, known = fill(args), set()
    donated = {"donate_argnums": 0} if program.trains else {}
    for name, options in (*COMMON, *program.poor):
        plan = autoshard.plan(fn, *args, cluster=cluster, **donated, **options)
        if (plan.data.mesh, plan.cost) in known:
            continue
        known.add((plan.data.mesh, plan.cost))
        tell(f"{name}: {1e3 * plan.cost.step_time:.1f} ms predicted")
        yield Entry(name, plan, stepper(plan, values, program.trains))


def stepper(plan: autoshard.Plan, values: tuple[Any, ...], trains: bool) -> Callable[[], None]:
    """A step of the plan, each on the state that the one before has left."""
    compiled, args = plan.compile(), list(plan.place(*jax.tree.map(np.array, values)))

    def step() -> None:
        out = jax.block_until_ready(compiled(*args))
        if trains:
            args[0] = out[0]

    return step


def tell(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def run(found: list[Entry], seconds: float) -> None:
    """Rounds until the time is up, and three at least; in each a plan runs for _TURN_S at least."""
    for e in found:
        e.step()  # the first is not like the others
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begin < seconds:
        for e in found:
            turn = time.perf_counter()
            while time.perf_counter() - turn < _TURN_S:
                before = time.perf_counter()
                e.step()
                e.seconds.append(time.perf_counter() - before)
        rounds += 1


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of ranks; equal values share the mean of theirs."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: list[float]) -> np.ndarray:
    x = np.asarray(values)
    return (x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2


def correlation(found: list[Entry]) -> str:
    rank = spearman([e.predicted for e in found], [e.measured for e in found])
    return f"{len(found)} plans, rank correlation {rank:.2f}"


def table(found: list[Entry]) -> Iterator[str]:
    yield f"{'plan':22}{'predicted':>12}{'comm':>6}{'measured':>12}{'ratio':>7}"
    for e in sorted(found, key=lambda e: e.predicted):
        yield (
            f"{e.name:22}{1e3 * e.predicted:9.1f} ms{e.plan.cost.comm_time / e.predicted:6.0%}"
            f"{1e3 * e.measured:9.1f} ms{e.measured / e.predicted:7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cluster", help="such as my.toml:8; measured now when left out")
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--seconds", type=float, default=240.0, help="to run all plans")
    args = parser.parse_args()
    if args.cluster is None:
        tell("calibrating: one to three minutes")
        cluster = autoshard.calibrate(jax.devices()[:8])
    else:
        cluster = autoshard.cluster(args.cluster)
    print(f"{cluster.chip}\n{cluster.network[-1]}")
    programs = {}
    for name in args.programs.split(","):
        tell(name)
        programs[name] = list(entries(PROGRAMS[name], cluster))
    every = [e for found in programs.values() for e in found]
    tell(f"running {len(every)} plans for {args.seconds:.0f} s")
    run(every, args.seconds)
    for name, found in programs.items():
        print(f"\n{name}: {correlation(found)}")
        print("\n".join(table(found)), flush=True)
    print(f"\nall: {correlation(every)}")


if __name__ == "__main__":
    main()
