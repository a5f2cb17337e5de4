"""How accurate are the predictions?  docs/accuracy.md, from what `make accuracy` has collected.

    python tests/accuracy/accuracy_report.py        # writes it; nothing is compiled

The lines to be met are those the project has set itself; where one is missed, the report says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from collect import ROWS, UNFITTED, Row, read_rows

from cost_models.units import format_bytes, format_seconds

REPORT = Path(__file__).parents[2] / "docs" / "accuracy.md"

# A verdict counts where the compiled program needs between these shares of the limit.
VERDICTS = (0.05, 3.0)


@dataclass(frozen=True, slots=True)
class Line:
    """A figure of the plan and of the compiler: the median and the worst error at most, if any."""

    name: str
    median: float
    worst: float
    predicted: Callable[[Row], float | None]
    compiled: Callable[[Row], float | None]
    least: float = 0.0
    """Plans where both figures are below this say nothing of the model, and are left out."""


def _compiled(row: Row, what: str) -> float | None:
    found = row.get("compiled")
    return found[what] if found else None


def _peak(row: Row) -> float | None:
    """Bytes of the compiled program; those that it wanted where it does not fit."""
    found = row.get("compiled")
    if found:
        return float(found["memory"]["peak"]) if found["memory"] else None
    return row.get("needed") or None


LINES = (
    Line("peak memory", 0.10, 0.25, lambda r: r["predicted"]["peak_memory"], _peak),
    Line(
        "compute seconds",
        0.12,
        0.35,
        lambda r: r["predicted"]["compute_time"],
        lambda r: _compiled(r, "compute"),
    ),
    Line(
        "bytes sent",
        0.10,
        math.inf,
        lambda r: r["predicted"]["comm_bytes"],
        lambda r: _compiled(r, "sent"),
        least=1e6,
    ),
    Line(
        "step seconds",
        math.inf,
        math.inf,
        lambda r: r["predicted"]["step_time"],
        lambda r: _compiled(r, "step"),
    ),
)


def error(line: Line, row: Row) -> float | None:
    """|predicted / compiled - 1|; None without a figure of the compiler, or below the least."""
    if "predicted" not in row:
        return None
    predicted, compiled = line.predicted(row), line.compiled(row)
    if predicted is None or not compiled or max(predicted, compiled) < line.least:
        return None
    return abs(predicted / compiled - 1)


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks.

    >>> rank_correlation([1, 2, 3], [10, 20, 15])
    0.5
    """
    a, b = _ranks(xs), _ranks(ys)
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(round(np.corrcoef(a, b)[0, 1], 9))


def _ranks(xs: Sequence[float]) -> Any:
    values = np.asarray(xs, dtype=float)
    return np.array([(values < x).sum() + ((values == x).sum() - 1) / 2 for x in values])


def ranks(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[float, int]]:
    """By cluster and program, how well plans are put in order, and how many there are: 3 or more.

    Plans that are the same program, and those that do not fit, are left out.
    """
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if _compiled(row, "step"):
            plans = groups.setdefault((row["cluster"], row["program"]), {})
            plans.setdefault(row["program_hash"], row)
    out = {}
    for key, plans in groups.items():
        if len(plans) >= 3:
            predicted = [r["predicted"]["step_time"] for r in plans.values()]
            compiled = [r["compiled"]["step"] for r in plans.values()]
            out[key] = rank_correlation(predicted, compiled), len(plans)
    return out


def verdicts(rows: Iterable[Row]) -> tuple[int, int, list[Row]]:
    """How many times "fits" or "does not fit" is what the compiler says, of how many; the others.

    A plan that was refused because nothing fits was never compiled, and counts for neither.
    """
    agree, wrong = 0, []
    for row in rows:
        peak = _peak(row)
        if peak is None or not VERDICTS[0] <= peak / row["limit"] <= VERDICTS[1]:
            continue
        if (row["predicted"]["peak_memory"] <= row["limit"]) == (peak <= row["limit"]):
            agree += 1
        else:
            wrong.append(row)
    return agree, agree + len(wrong), wrong


# Words


def report(rows: Sequence[Row]) -> str:
    """The whole page."""
    clusters = sorted({r["cluster"] for r in rows})
    parts = [_HEAD, _versions(rows), "\n## In short\n", _summary(rows, clusters)]
    strangers = [r for r in rows if r["program"] in UNFITTED]
    if strangers:
        seen = [c for c in clusters if any(r["cluster"] == c for r in strangers)]
        parts += [_STRANGERS, _summary(strangers, seen)]
    for cluster in clusters:
        parts.append(f"\n## {cluster}\n")
        parts.append(_details([r for r in rows if r["cluster"] == cluster]))
    return "\n".join(parts) + "\n"


_HEAD = """# How accurate the predictions are

Every figure below is a prediction of `autoshard.plan` beside what the real compiler made of that
plan, without the hardware: `make accuracy` plans each program, compiles it for the cluster (extra
`verify-tpu`; for GPUs the two wheels that [the README](../README.md) names), reads the compiled
program, and writes this page. The programs are in `tests/accuracy/*_programs.py`.

A plan is compiled with the options that it carries. Those for v5p and v6e have XLA gather weights
beside compute, as it does by itself for v5e.

* **Memory** is the fullest moment of one device, as XLA's buffer assignment has it
  (`peak_memory_in_bytes`). Where the program does not fit, it is what the compiler says that it
  wanted. XLA:TPU counts its VMEM there where that holds more than the HBM beside arguments and
  results: up to 128 MiB that the HBM need not have.
* **Compute** is the sum of XLA:TPU's own estimated cycles, loops times their trips. XLA:GPU
  estimates none. For v6e it counts no traffic of a product's kernel that also reduces: up to two
  times faster than the memory can be. Predictions stay with what the memory can move.
* **Sent** is what one device sends in a step, over all collectives of the compiled program. Plans
  that send less than 1 MB by both do not count for the error.
* **Step** is the compiled schedule replayed: its cycles, and its collectives by
  `cost_models.collectives`, beside compute where the schedule runs them so.

No hardware was used; neither is the step of a real device.
"""


_STRANGERS = """
## Programs that no constant was fitted to

Of those above, the plans of library_programs.py (flax, haiku, equinox) and further_programs.py. All
constants but seven were chosen without them; how much stays in VMEM (of operands, of results, and
of what takes no HBM), how much longer products of two computed operands take, how many copies of
tables lie there at once, how soon a slice behind a chain is taken, and how small a gather holds up
none, over their plans too. Rules of what XLA fuses, keeps, and in which order it works, were found
by looking at some of them, for v5e, v5p, v6e, A100 and H100.
"""


def _versions(rows: Sequence[Row]) -> str:
    found = sorted({f"{k} {v}" for r in rows for k, v in r.get("versions", {}).items()})
    return f"Measured with {', '.join(found)}."


def _summary(rows: Sequence[Row], clusters: Sequence[str]) -> str:
    head = ["", *clusters, "to be met"]
    table = [head, ["---"] * len(head)]
    of = {c: [r for r in rows if r["cluster"] == c] for c in clusters}
    table.append(["plans", *(str(len(of[c])) for c in clusters), ""])
    table.append(["programs", *(str(len({r["program"] for r in of[c]})) for c in clusters), "12"])
    for line in LINES:
        errors = {c: [e for r in of[c] if (e := error(line, r)) is not None] for c in clusters}
        medians = [_percent(statistics.median(errors[c])) if errors[c] else "" for c in clusters]
        table.append([f"{line.name}, median error", *medians, _allowed(line.median)])
        worst = [_percent(max(errors[c])) if errors[c] else "" for c in clusters]
        bounded = line.worst < math.inf
        table.append([f"{line.name}, worst error", *worst, _allowed(line.worst)])
        if bounded:
            within = [_share([e <= line.worst for e in errors[c]]) for c in clusters]
            table.append([f"{line.name}, within the worst allowed", *within, "all"])
    found = ranks(rows)
    orders = {c: [v for (k, _), (v, _) in found.items() if k == c] for c in clusters}
    medians = [f"{statistics.median(orders[c]):.2f}" if orders[c] else "" for c in clusters]
    table.append(["order of a program's plans, median rank correlation", *medians, "0.90"])
    fits = [verdicts(of[c]) for c in clusters]
    table.append(
        ["fits or does not, as the compiler says", *(f"{a} of {n}" for a, n, _ in fits), "95 %"]
    )
    return _table(table)


def _details(rows: Sequence[Row]) -> str:
    head = ["program", "plan", "mesh", "memory", "compiled", "", "compute", "compiled", ""]
    head += ["sent", "compiled", "", "step", "compiled", ""]
    table = [head, ["---", "---", "---", *["---:"] * 12]]
    for row in rows:
        start = [row["program"], row["solver"]]
        if "predicted" not in row:
            table.append([*start, "refused: nothing fits", *[""] * 12])
            continue
        mesh = " ".join(f"{n}={s}" for n, s in row["mesh"].items())
        p = row["predicted"]
        cells = [*start, mesh]
        peak = _peak(row)
        over = "" if row.get("compiled") else " (does not fit)"
        cells += _cells(p["peak_memory"], peak, format_bytes, over)
        cells += _cells(p["compute_time"], _compiled(row, "compute"), format_seconds)
        cells += _cells(p["comm_bytes"], _compiled(row, "sent"), format_bytes)
        cells += _cells(p["step_time"], _compiled(row, "step"), format_seconds)
        table.append(cells)
    return _table(table)


def _cells(
    predicted: float, compiled: float | None, words: Callable[[float], str], over: str = ""
) -> list[str]:
    if compiled is None:
        return [words(predicted), "", ""]
    ratio = f"{predicted / compiled:.2f}" if compiled else ""
    return [words(predicted), words(compiled) + over, ratio]


def _allowed(error: float) -> str:
    return _percent(error) if error < math.inf else ""


def _percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def _share(kept: Sequence[bool]) -> str:
    return f"{sum(kept)} of {len(kept)}" if kept else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    REPORT.write_text(report(list(read_rows(ROWS).values())))
