"""What do `compare`, `run` and `clusters` print?  Their tables, as plain text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autoshard.columns import columns
from autoshard.report import cluster_name, how_found
from autoshard.report_costs import fits
from cost_models import cluster_file
from cost_models.cluster import Cluster, Level, cluster, names
from cost_models.units import format_bytes, format_flops, format_seconds
from passes.hints import path_of
from passes.ir.plan import Alternative, Plan

if TYPE_CHECKING:  # it imports jax, which `autoshard clusters` need not
    from autoshard.same_numbers import Comparison

_MOST_DIFFERENCES = 8


# compare


def comparison(plan: Plan, solvers: tuple[str, ...]) -> str:
    """The plan beside the best that each other solver finds on any mesh, in one table."""
    ours = Alternative(plan.solver, plan.mesh, plan.cost)
    lines: list[tuple[str, ...]] = [
        ("solver", "mesh", "step", "", "compute", "comm", "memory", "fits")
    ]
    for solver in solvers:
        found = ours if solver == plan.solver else _best(plan, solver)
        lines.append(_compared(solver, found, plan))
    limit = format_bytes(plan.memory_limit)
    return "\n".join(
        [
            f"{plan.name} on {cluster_name(plan)}, {limit} on each device",
            *columns(lines, "llrrrrrl", "  "),
            f"each on its best mesh; {how_found(plan)}",
        ]
    )


def _best(plan: Plan, solver: str) -> Alternative | None:
    """What fits before what does not, the faster first."""
    found = [a for a in plan.alternatives if a.solver == solver]
    return min(
        found,
        key=lambda a: (not fits(a, plan), a.cost is None, a.cost.step_time if a.cost else 0.0),
        default=None,
    )


def _compared(solver: str, a: Alternative | None, plan: Plan) -> tuple[str, ...]:
    if a is None or a.cost is None:
        return solver, "", "", "", "", "", "", (a.note if a else "") or "not feasible"
    cost = a.cost
    return (
        solver,
        " ".join(f"{n}={s}" for n, s in a.mesh),
        format_seconds(cost.step_time),
        f"{cost.step_time / plan.cost.step_time:.2f}x" if plan.cost.step_time else "",
        format_seconds(cost.compute_time),
        format_seconds(cost.comm_time),
        format_bytes(cost.peak_memory),
        "yes" if fits(a, plan) else "no",
    )


# run


def run_table(found: Comparison, steps: int, devices: int) -> str:
    """The largest differences, and whether all are within their tolerance."""
    worst = found.differences[:_MOST_DIFFERENCES]
    lines = [("result", "type", "difference", "allowed", "")]
    for d in worst:
        said = "TOO LARGE" if not d.ok else "" if d.finite else "holds NaN or infinity"
        lines.append((path_of(d.path), d.type, f"{d.largest:.1e}", f"{d.tolerance:.0e}", said))
    left = len(found.differences) - len(worst)
    many = f"{steps} step{'s' if steps > 1 else ''}"
    wrong = sum(not d.ok for d in found.differences)
    verdict = (
        f"same numbers: all {len(found.differences)} results of {many} agree"
        if not wrong
        else f"NUMBERS DIFFER: {wrong} of {len(found.differences)} results, in {many}"
    )
    return "\n".join(
        [
            "sharded beside unsharded, relative to each result's largest element",
            *columns(lines, "llrrl", "  "),
            *([f"  and {left} more, with smaller differences"] if left else []),
            f"a step takes {format_seconds(found.sharded_seconds)} on {devices} devices, "
            f"{format_seconds(found.plain_seconds)} on one",
            verdict,
        ]
    )


# clusters


def clusters_table() -> str:
    """The catalogue: one line for each kind."""
    lines: list[tuple[str, ...]] = [
        ("name", "memory", "bandwidth", "bfloat16", "wires, GB/s of a device or a link")
    ]
    lines += [_listed(_any_size(name)) for name in names()]
    how = (
        "Of one device, as jax counts them. Say how many and how they are wired: cpu:8, h100:2x8 "
        "(nodes x\nGPUs), tpu-v5e:4x4 (the torus, in chips: two devices each on v2, v3 and v7)."
    )
    return "\n".join(
        [
            *columns(lines, "lrrrl"), "", how,
            "autoshard clusters NAME shows its numbers, each with its source.",
        ]
    )  # fmt: skip


def _listed(c: Cluster) -> tuple[str, ...]:
    peak = c.chip.peak_flops.get("bfloat16") or max(c.chip.peak_flops.values())
    return (
        c.name,
        format_bytes(c.chip.hbm_total_bytes),
        _rate(c.chip.hbm_bandwidth),
        f"{format_flops(peak)}/s",
        " + ".join(map(_wires, reversed(c.network))),
    )


def _wires(level: Level) -> str:
    """One level of the network: `8 x NVLink 4 at 450`, `3D ICI at 90`."""
    many = f"{level.max_size} x " if level.max_size else ""
    many = f"{level.dims}D " if level.kind == "torus" else many
    return f"{many}{level.name} at {level.bandwidth / 1e9:.4g}"


def _rate(bandwidth: float) -> str:
    """As data sheets write it, in powers of ten."""
    return f"{bandwidth / 1e9:.4g} GB/s"


def _any_size(name: str) -> Cluster:
    """The smallest cluster of that kind."""
    file = cluster_file.catalogue_file(name)
    assert file is not None, f"{name} is in the catalogue"
    levels = cluster_file.read(file)["network"]
    dims = next(level["dims"] for level in reversed(levels) if level["dims"])
    slices = "1x" if len(levels) > 1 and levels[-1]["kind"] != "direct" else ""
    return cluster(f"{name}:{slices if dims > 1 else ''}{'x'.join('1' * dims)}")


def calibrated_text(file: Path, found: Cluster) -> str:
    """What was measured, and how to plan with it."""
    chip, wires = found.chip, found.network[-1]
    rows = [(f"{d} products", f"{format_flops(rate)}/s") for d, rate in chip.peak_flops.items()]
    rows += [
        ("elementwise", f"{format_flops(chip.vector_flops)}/s"),
        ("memory bandwidth", _rate(chip.hbm_bandwidth)),
        ("memory", format_bytes(chip.hbm_bytes)),
        ("wires", f"{_rate(wires.bandwidth)}, {format_seconds(wires.latency)} a step, "
         f"{format_seconds(wires.startup)} a collective"),
    ]  # fmt: skip
    head = f"{file}: {found.devices} devices of kind {chip.name}, each while all are busy"
    how = f"autoshard plan TARGET --cluster {file}:{found.devices}"
    return "\n".join([head, "", *columns(rows, "ll", "  "), "", how])


def cluster_text(spec: str) -> str:
    """One cluster: what its file says, every number beside its source. Raises ClusterError."""
    name, head = spec, []
    if ":" in spec and not spec.endswith(".toml"):
        name, c = spec.rpartition(":")[0], cluster(spec)
        head = [*_measured(c), ""]
    file = Path(name) if name.endswith(".toml") else cluster_file.catalogue_file(name)
    if file is None:
        cluster(name)  # raises: it knows which names are near
        raise AssertionError(f"{name} is a cluster without a file")
    cluster_file.read(file)
    return "\n".join([*head, file.read_text(encoding="utf-8").rstrip()])


def _measured(c: Cluster) -> list[str]:
    """How many devices, what they have together, and what each level joins."""
    room = format_bytes(c.memory_limit)
    peaks = c.chip.peak_flops
    dtype = max({"bfloat16", "float32"} & peaks.keys(), key=lambda name: (peaks[name], name))
    total = format_flops(peaks[dtype] * c.devices)
    return [
        f"{c}: {c.devices} x {c.chip.name}, {room} for a program on each",
        f"together {format_bytes(c.memory_limit * c.devices)}, {total}/s of {dtype}",
        *map(_joined, reversed(c.network), reversed(c.extents)),
    ]


def _joined(level: Level, sizes: tuple[int, ...]) -> str:
    """What one level joins, and which dims of a torus are rings."""
    many = "x".join(map(str, sizes))
    if level.kind != "torus":
        link = " on each link" if level.kind == "direct" else ""
        return f"  {many} on {level.name}, {_rate(level.bandwidth)}{link}"
    rings = ("ring" if r else "open" for r in level.rings(sizes))
    return f"  {many} on {level.name}, {_rate(level.bandwidth)} on each link, {' x '.join(rings)}"
