"""Is a plan as fast as what an expert writes by hand?  Both compiled for the target, and judged.

    make experts ARGS="--programs gpt_1p3b,vit --ours"

One line of JSON for each version of each program, the plan's among them; what was judged before is
left out, but for our own plans with `--ours`. Then docs/expert_plans.md. A step is the compiled
schedule replayed: XLA:TPU's own cycles, and the collectives by our prices. All are compiled with
the options of a plan.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import expert_versions
from collect import Kept
from expert_report import JUDGED, OURS, REPORT, Row, read_rows, report, step_of
from expert_versions import EXPERTS, Version

import autoshard
from autoshard.ask_compiler import ask_compiler
from autoshard.compiled import Profile
from autoshard.targets import target_devices
from autoshard.verification import verify
from cost_models.cluster import Cluster
from cost_models.cluster import cluster as read_cluster
from passes.compiler import compiler_options


def judge(name: str, version: Version | None, cluster: Cluster, keep: Path | None) -> Row:
    """A version of a program, or our own where it is None; its compiled text kept in a folder."""
    told = OURS if version is None else f"{version.name}-{'x'.join(map(str, version.mesh))}"
    file = None if keep is None else keep / f"{name}--{told.replace(' ', '_')}"
    if version is None:
        return judge_ours(name, cluster, file)
    return judge_expert(name, version, cluster, file)


def judge_expert(name: str, version: Version, cluster: Cluster, file: Path | None = None) -> Row:
    """What an expert's version of a program does, by the target's own compiler."""
    program = Kept(expert_versions.lowered(EXPERTS[name], version, target_devices(cluster)), file)
    options = compiler_options(cluster)
    found = ask_compiler(program, cluster, version.mesh, options, version.name)
    seen = judged(found.compiled, found.needed, cluster.memory_limit)
    return {"version": version.name, "mesh": mesh_text(version), **seen}


def mesh_text(version: Version) -> str:
    """As that of a plan is told."""
    return f"data={version.mesh[0]} model={version.mesh[1]}"


def judge_ours(name: str, cluster: Cluster, file: Path | None = None) -> Row:
    """What the chosen plan does, and what it was predicted to."""
    fn, args = EXPERTS[name].make()
    plan = autoshard.plan(fn, *args, cluster=cluster, donate_argnums=0)
    devices, options = target_devices(cluster), plan.compiler_options
    found = verify(plan.data, lambda d: Kept(plan.lower(d), file), devices, options)
    if file is not None:
        Path(f"{file}.txt").write_text(f"{plan}\n\n{found}\n")
    return {
        "version": OURS,
        "mesh": " ".join(f"{axis}={size}" for axis, size in plan.mesh.items()),
        **judged(found.compiled, found.needed, found.memory_limit),
        "predicted": {"compute": plan.cost.compute_time, "comm": plan.cost.comm_time}
        | {"step": plan.cost.step_time, "peak": plan.cost.peak_memory},
    }


def judged(found: Profile | None, needed: float, limit: float) -> Row:
    """Seconds and bytes of a compiled program; it has no step where it does not fit."""
    if found is None or found.memory is None:
        return {"step": None, "peak": needed}
    fits = found.memory.peak <= limit
    return {
        "step": found.step if fits else None,
        "compute": found.compute,
        "comm": found.comm,
        "sent": found.sent,
        "peak": found.memory.peak,
        "unknown_trips": found.unknown_trips,
    }


def missing(programs: Sequence[str], spec: str, rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    """Programs with versions that have no row yet; None is our own."""
    done = {(r["program"], r["cluster"], r["version"], r["mesh"]) for r in rows}
    ours = {(r["program"], r["cluster"]) for r in rows if r["version"] == OURS}
    for name in programs:
        if (name, spec) not in ours:
            yield name, None
        for version in EXPERTS[name].versions:
            if (name, spec, version.name, mesh_text(version)) not in done:
                yield name, version


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, default=JUDGED)
    parser.add_argument("--ours", action="store_true", help="judge our own plans anew")
    parser.add_argument("--cluster", default="tpu-v5e:4x4")
    parser.add_argument("--programs", default=",".join(EXPERTS))
    parser.add_argument("--versions", default="", help="names of versions; all when left out")
    parser.add_argument("--keep", type=Path, default=None, help="a folder for compiled programs")
    args = parser.parse_args()
    cluster = read_cluster(args.cluster)
    programs, wanted = args.programs.split(","), set(filter(None, args.versions.split(",")))
    known = read_rows(args.rows)
    if args.ours:
        known = [r for r in known if r["version"] != OURS or r["program"] not in programs]
    for name, version in list(missing(programs, args.cluster, known)):
        if wanted and (OURS if version is None else version.name) not in wanted:
            continue
        begin = time.perf_counter()
        row = judge(name, version, cluster, args.keep)
        took = round(time.perf_counter() - begin, 1)
        known.append({"program": name, "cluster": args.cluster, **row, "seconds": took})
        args.rows.write_text("".join(json.dumps(r) + "\n" for r in known))
        print(
            f"{name} {row['version']} {row['mesh']}: {step_of(row):.4f} s, took {took:.0f} s",
            flush=True,
        )
    if args.rows == JUDGED:
        REPORT.write_text(report(known))


if __name__ == "__main__":
    main()
