"""How do the expert plans for many devices compare with the pipeline that was found?  `beside`.

Each is searched in its own way, as its authors would use it:

  Megatron PTD-P   tensor parallelism inside a stage, 1F1B or interleaved (Narayanan et al., arXiv
                   2104.04473)
  GPipe            forward of all microbatches, then backward (Huang et al., arXiv 1811.06965)
  1F1B, data       the same stages without sharding inside: pipeline and data parallelism alone
  FSDP             no stages: parameters split over all devices (Zhao et al., arXiv 2304.11277)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autoshard.bound_plan import Plan
from autoshard.columns import columns
from cost_models.units import format_bytes, format_seconds
from passes.search import Progress

_REFUSED = ValueError  # all that say why there is no plan are of this kind


@dataclass(frozen=True)
class Beside:
    """One expert's plan. note: why there is none, or how much slower it is."""

    name: str
    mesh: str
    step_time: float | None
    peak_memory: float | None
    note: str


EXPERTS: dict[str, dict[str, Any]] = {
    "Megatron PTD-P": {"solver": "tp", "schedule": None},
    "GPipe": {"schedule": "GPipe"},
    "1F1B, data": {"schedule": "1F1B", "alone": True},
    "FSDP": {"solver": "fsdp", "stages": None},
}


def beside(
    found: Plan,
    ask: Callable[..., Plan],
    stages: int | str,
    progress: Progress | None = None,
) -> tuple[Beside, ...]:
    """The experts' plans. ask: plans the same function with other options; found: the best.

    stages: what was asked for, a number or "auto".
    """
    tell = progress or (lambda _: None)
    out = [_row("autoshard", found, found.cost.step_time)]
    for name, options in EXPERTS.items():
        tell(name)
        try:
            out.append(_row(name, ask(**_asked(options, found, stages)), found.cost.step_time))
        except _REFUSED as error:
            out.append(Beside(name, "", None, None, str(error).partition(". ")[0]))
    return tuple(out)


def _asked(options: Mapping[str, Any], found: Plan, stages: int | str) -> dict[str, Any]:
    """Options of `plan`."""
    asked = {"stages": stages, **options}
    if asked.pop("alone", False):
        devices = found.data.devices if hasattr(found.data, "devices") else 1
        count = dict(found.mesh).get("stage", 1)
        asked |= {"mesh": {"stage": count, "data": devices // count}, "stages": count}
    return asked


def _row(name: str, plan: Plan, best: float) -> Beside:
    cost = plan.cost
    mesh = " ".join(f"{n}={s}" for n, s in plan.mesh.items())
    ratio = f"{cost.step_time / best:.2f}x the step time"
    table = getattr(plan.data, "table", None)
    note = f"{ratio}, {table.name}" if table is not None else ratio
    return Beside(name, mesh, cost.step_time, cost.peak_memory, note)


def as_text(rows: tuple[Beside, ...]) -> str:
    """A line for each."""
    lines = [("", "mesh", "step", "memory", "")]
    for r in rows:
        step = "" if r.step_time is None else format_seconds(r.step_time)
        memory = "" if r.peak_memory is None else format_bytes(r.peak_memory)
        lines.append((r.name, r.mesh, step, memory, r.note))
    return "\n".join(columns(lines, "llrrl", "", 100))
