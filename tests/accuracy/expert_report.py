"""Are plans as fast as what experts write by hand?  docs/expert_plans.md, from what was judged.

python tests/accuracy/expert_report.py        # writes it; nothing is compiled
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cost_models.units import format_bytes, format_seconds

REPORT = Path(__file__).parents[2] / "docs" / "expert_plans.md"
JUDGED = Path(__file__).parents[1] / "data" / "experts_tpu_v5e_4x4.jsonl"
OURS = "autoshard"

Row = dict[str, Any]


def read_rows(file: Path = JUDGED) -> list[Row]:
    """What was judged before."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def step_of(row: Row) -> float:
    """Seconds; infinite where it does not fit."""
    return math.inf if row["step"] is None else float(row["step"])


def best_expert(rows: Iterable[Row]) -> Row:
    """The fastest version that is not ours."""
    return min((r for r in rows if r["version"] != OURS), key=step_of)


def ratio(rows: Sequence[Row]) -> float:
    """Our step over that of the best expert: at most 1 is what we are after.

    >>> ratio([{"version": OURS, "step": 2.0}, {"version": "dp", "step": 4.0}])
    0.5
    """
    ours = [step_of(r) for r in rows if r["version"] == OURS]
    return ours[0] / step_of(best_expert(rows)) if ours else math.nan


def report(rows: Sequence[Row]) -> str:
    """The whole page."""
    programs = list(dict.fromkeys((r["program"], r["cluster"]) for r in rows))
    parts = [_HEAD, "| program | plan | best expert | ours / best |", "| --- | --- | --- | --- |"]
    tables = []
    for name, spec in sorted(programs):
        here = [r for r in rows if (r["program"], r["cluster"]) == (name, spec)]
        best = best_expert(here)
        ours = next(r for r in here if r["version"] == OURS)
        told = f"{best['version']}, {best['mesh']}: {format_seconds(step_of(best))}"
        parts.append(f"| {name} | {format_seconds(step_of(ours))} | {told} | {ratio(here):.3f} |")
        tables.append(f"\n## {name} on {spec}\n\n{_table(here)}")
    return "\n".join([*parts, *tables]) + "\n"


_HEAD = """# Plans beside those of experts

What `autoshard.plan` chooses, beside versions that are written by hand in plain JAX: data parallel,
FSDP, Megatron's tensor parallel, both, and both with sequence-sharded activations; experts on their
axis for the mixture of experts, tables by rows and columns for DLRM. They are in
[expert_versions.py](../tests/accuracy/expert_versions.py), on every mesh of 16 devices that suits
them. All are compiled for the target by XLA:TPU itself, without hardware, with the windowed einsum
off (jax 0.10.2, libtpu 0.0.42.1). A step is the compiled schedule replayed: the compiler's own
cycles, and its collectives by `cost_models.collectives`, beside compute where the schedule runs
them so. `make experts` renews this page: a minute or two for each version that is new.
"""


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| version | mesh | step | compute | communication | sent | memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(rows, key=lambda r: (step_of(r), r["version"], r["mesh"])):
        seconds = [r.get(key) for key in ("step", "compute", "comm")]
        told = ["" if s is None else format_seconds(s) for s in seconds]
        told[0] = told[0] or "does not fit"
        sent = format_bytes(r["sent"]) if "sent" in r else ""
        name = f"**{r['version']}**" if r["version"] == OURS else r["version"]
        lines.append(f"| {' | '.join([name, r['mesh'], *told, sent, format_bytes(r['peak'])])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    REPORT.write_text(report(read_rows()))
