"""Compile plans with the real compilers, and keep beside each other what was predicted and found.

    make accuracy ARGS="--clusters tpu-v5e:4x4 --programs gpt_1p3b,vit"

One line of JSON for each program, cluster and solver. A plan whose program is still the one that
was compiled is predicted again and not compiled again, so that a better model is soon judged.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import accuracy_programs
import further_programs
import library_programs

import autoshard
from autoshard.targets import target_devices
from autoshard.verification import verify
from passes.search import NoFeasiblePlan

SOLVERS = ("ilp", "fsdp", "tp", "fsdp+tp", "dp")
ROWS = Path(__file__).parents[1] / "data" / "accuracy.jsonl"

# Programs that no constant was fitted to, and all.
UNFITTED = {**library_programs.PROGRAMS, **further_programs.PROGRAMS}
PROGRAMS = {**accuracy_programs.PROGRAMS, **UNFITTED}

# Those that are no train steps, and give nothing away.
KEEPS = frozenset(
    {
        *("decode", "gpt_forward", "llama_forward", "long_attention", "long_blockwise", "video"),
        *("flax_gpt_forward", "long_queries"),
    }
)

Row = dict[str, Any]
Key = tuple[str, str, str]


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


def planned(name: str, spec: str, solver: str) -> tuple[autoshard.Plan, float]:
    """The plan of one of PROGRAMS by a solver, and the seconds that it took."""
    fn, args = PROGRAMS[name]()
    begin = time.perf_counter()
    plan = autoshard.plan(fn, *args, cluster=spec, solver=solver, donate_argnums=donated(name))
    return plan, time.perf_counter() - begin


def donated(name: str) -> tuple[int, ...]:
    """A train step gives its state away, as trainers do."""
    return () if name in KEEPS else (0,)


def collect(key: Key, known: Row | None, keep: Path | None) -> Row:
    """What a program's plan is predicted to cost on a cluster, and what it does when compiled.

    known: its row of an earlier run, whose measurement is taken where the program is the same.
    """
    name, spec, solver = key
    row: Row = {"program": name, "cluster": spec, "solver": solver}
    try:
        plan, seconds = planned(name, spec, solver)
    except NoFeasiblePlan as error:
        return row | {"refused": str(error)}
    devices = target_devices(autoshard.cluster(spec))
    lowered = plan.lower(devices)
    row |= {
        "mesh": dict(plan.mesh),
        "limit": plan.data.memory_limit,
        "predicted": dataclasses.asdict(plan.cost),
        "bounds": list(plan.cost.bounds),
        "plan_seconds": round(seconds, 2),
        "program_hash": _hash(lowered, plan.compiler_options),
    }
    if known is not None and known.get("program_hash") == row["program_hash"]:
        return row | {k: known[k] for k in ("compiled", "needed", "versions", "compile_seconds")}
    file = None if keep is None else keep / f"{name}--{spec.replace(':', '_')}--{solver}"
    begin = time.perf_counter()
    found = verify(plan.data, lambda _: Kept(lowered, file), devices, plan.compiler_options)
    if file is not None:
        Path(f"{file}.plan.json").write_text(plan.to_json())
    seen = found.compiled
    row["compiled"] = seen and {
        "compute": seen.compute,
        "comm": seen.comm,
        "sent": seen.sent,
        "step": seen.step,
        "memory": seen.memory and dataclasses.asdict(seen.memory),
        "unknown_trips": seen.unknown_trips,
    }
    row["needed"] = found.needed
    row["versions"] = _versions(devices[0].platform)
    row["compile_seconds"] = round(time.perf_counter() - begin, 1)
    return row


def _hash(lowered: Any, options: Any) -> str:
    text = lowered.as_text() + json.dumps(dict(options), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions(platform: str) -> dict[str, str]:
    out = {}
    for package in ("jax", "libtpu" if platform == "tpu" else "jax-cuda12-pjrt"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def read_rows(file: Path = ROWS) -> dict[Key, Row]:
    """Rows by program, cluster and solver; none where there is no such file."""
    if not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {(r["program"], r["cluster"], r["solver"]): r for r in rows}


def write_rows(rows: dict[Key, Row], file: Path) -> None:
    """Replace the file, in one step."""
    fresh = file.with_suffix(".new")
    lines = [json.dumps(_rounded(rows[key])) + "\n" for key in sorted(rows)]
    fresh.write_text("".join(lines))
    os.replace(fresh, file)


def _rounded(x: Any) -> Any:
    """Numbers with as many digits as anyone reads."""
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    return [_rounded(v) for v in x] if isinstance(x, list) else x


def main(argv: list[str] | None = None, tell: Callable[[str], None] = print) -> None:
    """Collect what the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--clusters", default="tpu-v5e:4x4")
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--solvers", default=",".join(SOLVERS))
    parser.add_argument("--keep", type=Path, default=None, help="a folder for compiled programs")
    parser.add_argument("--known", action="store_true", help="the rows that there are, no others")
    args = parser.parse_args(argv)
    rows = read_rows(args.rows)
    keys = [
        (name, spec, solver)
        for spec in args.clusters.split(",")
        for name in args.programs.split(",")
        for solver in args.solvers.split(",")
    ]
    wanted = sorted(rows) if args.known else keys
    for n, key in enumerate(wanted, 1):
        begin = time.perf_counter()
        rows[key] = collect(key, rows.get(key), args.keep)
        write_rows(rows, args.rows)
        took = time.perf_counter() - begin
        tell(f"[{n}/{len(wanted)}] {' '.join(key)}: {took:.0f} s")


if __name__ == "__main__":
    main()
