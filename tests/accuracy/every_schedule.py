"""Every schedule on every model against plain jit, on 8 virtual CPU devices: an hour for all.

    make schedules                                          # 350 runs
    make schedules ARGS="--models unet gpt --stages 2"      # some of them

A step runs in twice as many microbatches as there are stages, over 2 and 4 stages with Megatron's
split inside each of them and then over groups for data, and over 8 stages with nothing inside. Each
run is planned by `autoshard.plan(stages=, schedule=)`, compiled and called; printed is the largest
difference of any two numbers in the loss, the parameters and the optimizer's state, as a part of
the largest number of its array. It ends with 1 if any run differs by more than float tolerance or
is refused.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import zoo
from pipeline_models import Job, encoder_decoder, filled, mixture_of_experts, unet, worst

import autoshard
from passes.pipeline.published import PUBLISHED

TOLERANCE = 1e-5  # float32 sums in another order; a microbatch left out is 1e-2 and more
SIZES = {"width": 8, "heads": 2, "sequence": 8, "batch": 16, "vocab": 32}
MODELS: dict[str, Callable[[], Job]] = {
    "gpt": partial(zoo.gpt, **SIZES, layers=4),
    "scanned_gpt": partial(zoo.gpt, **SIZES, layers=16, scan=True),
    "encoder_decoder": encoder_decoder,
    "unet": unet,
    "mixture_of_experts": mixture_of_experts,
}
INSIDE = {
    2: ({"stage": 2, "data": 1, "model": 4}, {"stage": 2, "data": 4}),
    4: ({"stage": 4, "data": 1, "model": 2}, {"stage": 4, "data": 2}),
    8: ({"stage": 8},),
}
ROW = "{:20} {:>2} stages  {:16} {:18} {:>9} {:>5.0f} s"


def runs(model: str, stages: int) -> Iterator[bool]:
    """Is each run of a model over so many stages right?  A line for each as soon as known."""
    fn, shapes = MODELS[model]()
    args = filled(shapes)
    want = jax.tree.leaves(jax.jit(fn)(*args))
    for mesh in INSIDE[stages]:
        inside = ", ".join(f"{k} {n}" for k, n in mesh.items() if k != "stage" and n > 1)
        for schedule in PUBLISHED:
            begin = time.monotonic()
            try:
                found = _difference(fn, args, want, mesh, schedule.name)
                said, right = f"{found:.1e}", found < TOLERANCE
            except ValueError as refused:
                said, right = f"refused: {refused}", False
            took = time.monotonic() - begin
            print(ROW.format(model, stages, inside or "nothing", schedule.name, said, took))
            sys.stdout.flush()
            yield right


def _difference(
    fn: Callable[..., object],
    args: tuple[object, ...],
    want: list[jax.Array],
    mesh: dict[str, int],
    schedule: str,
) -> float:
    stages = mesh["stage"]
    plan = autoshard.plan(
        fn,
        *args,
        cluster="h100:8",
        stages=stages,
        mesh=mesh,
        microbatches=2 * stages,
        schedule=schedule,
        solver="tp",
    )
    got = plan.compile()(*args)
    return worst(jax.tree.leaves(got), want)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--stages", nargs="+", type=int, choices=INSIDE, default=list(INSIDE))
    asked = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)  # each program runs once
    right = [x for m in asked.models for n in asked.stages for x in runs(m, n)]
    print(f"{sum(right)} of {len(right)} runs give the numbers of plain jit")
    return 0 if all(right) else 1


if __name__ == "__main__":
    raise SystemExit(main())
