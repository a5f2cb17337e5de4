"""Compile plans with the real compilers, and keep beside each other what was predicted and found.

    make accuracy ARGS="OUT.jsonl --clusters tpu-v5e:4x4 --programs gpt_1p3b,vit"

Writes one line of JSON for each program, cluster and solver; what OUT has already is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import time
from pathlib import Path
from typing import Any

from accuracy_programs import PROGRAMS

import autoshard
from autoshard.targets import target_devices
from autoshard.verification import verify

SOLVERS = ("ilp", "fsdp", "tp", "dp", "fsdp+tp")


class Kept:
    """A lowered program that leaves its compiled text in a file."""

    def __init__(self, lowered: Any, file: Path | None) -> None:
        self.lowered, self.file = lowered, file

    def compile(self, compiler_options: Any = None) -> Any:
        """As that of jax.stages.Lowered."""
        compiled = self.lowered.compile(compiler_options=compiler_options)
        if self.file is not None:
            with gzip.open(f"{self.file}.hlo.gz", "wt") as out:
                out.write(compiled.runtime_executable().hlo_modules()[0].to_string())
        return compiled


def collect(name: str, spec: str, solver: str, keep: Path | None) -> dict[str, Any]:
    """What a program's plan by this solver is predicted to cost on a cluster, and what it does."""
    fn, args = PROGRAMS[name]()
    begin = time.perf_counter()
    plan = autoshard.plan(fn, *args, cluster=spec, solver=solver, donate_argnums=donated(name))
    planned = time.perf_counter()
    file = None if keep is None else keep / f"{name}--{spec.replace(':', '_')}--{solver}"
    devices = target_devices(autoshard.cluster(spec))
    found = verify(plan.data, lambda d: Kept(plan.lower(d), file), devices, plan.compiler_options)
    if file is not None:
        Path(f"{file}.plan.json").write_text(plan.to_json())
    compiled = found.compiled
    return {
        "program": name,
        "cluster": spec,
        "solver": solver,
        "mesh": dict(plan.mesh),
        "plan_seconds": planned - begin,
        "compile_seconds": time.perf_counter() - planned,
        "predicted": dataclasses.asdict(plan.cost),
        "compute": compiled.compute if compiled else None,
        "comm": compiled.comm if compiled else None,
        "sent": compiled.sent if compiled else None,
        "step": compiled.step if compiled else None,
        "memory": dataclasses.asdict(compiled.memory) if compiled and compiled.memory else None,
        "needed": found.needed,
        "limit": found.memory_limit,
        "unknown_trips": compiled.unknown_trips if compiled else 0,
    }


# Those that are no train steps, and give nothing away.
KEEPS = frozenset(
    {"decode", "gpt_forward", "llama_forward", "long_attention", "long_blockwise", "video"}
)


def donated(name: str) -> tuple[int, ...]:
    """A train step gives its state away, as trainers do."""
    return () if name in KEEPS else (0,)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--clusters", default="tpu-v5e:4x4")
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--solvers", default="ilp,fsdp,tp")
    parser.add_argument("--keep", type=Path, default=None, help="a folder for compiled programs")
    args = parser.parse_args()
    done = set()
    if args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        done = {(r["program"], r["cluster"], r["solver"]) for r in rows}
    for spec in args.clusters.split(","):
        for name in args.programs.split(","):
            for solver in args.solvers.split(","):
                if (name, spec, solver) in done:
                    continue
                begin = time.perf_counter()
                try:
                    row = collect(name, spec, solver, args.keep)
                except autoshard.NoFeasiblePlan as e:
                    row = {"program": name, "cluster": spec, "solver": solver, "refused": str(e)}
                with args.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                took = time.perf_counter() - begin
                print(f"{name} {spec} {solver}: {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
