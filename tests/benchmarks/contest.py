"""The solver on the IOPDDL contest's instances, within the contest's time limits.  `make contest`.

Each instance is solved by `autoshard solve FILE --time-limit SECONDS --json OUT`, and what it wrote
is counted again from the file in exact integers. Other instances: `make contest ARGS="FOLDER 180"`
solves every file of a folder, each in so many seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from passes.solve import iopddl
from passes.solve.recount import recount

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "iopddl"


@dataclass(frozen=True, slots=True)
class Instance:
    """seconds: allowed. contest: best cost of any team; known: best cost known, 0 where none is."""

    file: Path
    seconds: float
    contest: int = 0
    known: int = 0


def _file(letter: str) -> Path:
    return DATA / f"asplos-2025-iopddl-{letter}.json.gz"


INSTANCES = (
    Instance(_file("A"), 60, 6548641531, 6548553650),
    Instance(_file("G"), 120, 217039, 217039),
    Instance(_file("K"), 180, 2274276676, 2147392497),
    Instance(_file("M"), 180, 49928460991, 49927233583),
    Instance(_file("S"), 240, 1534613444, 1511377982),
)
ROW = "{:28} {:>7} {:>7} {:>13} {:>13} {:>9} {:>9} {:>9}"


def rows(instances: tuple[Instance, ...]) -> Iterator[str]:
    """A line for each instance as soon as it is solved."""
    yield ROW.format("instance", "allowed", "took", "cost", "bound", "gap", "/ contest", "/ known")
    for one in instances:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            begin = time.monotonic()
            done = subprocess.run(
                [
                    sys.executable, "-m", "autoshard", "solve", str(one.file),
                    "--time-limit", str(one.seconds - 1), "--json", str(out),
                ],
                cwd=ROOT, capture_output=True, text=True,
            )  # fmt: skip
            took = time.monotonic() - begin
            if done.returncode:
                yield f"{one.file.name}: {done.stderr.strip()}"
                continue
            found = json.loads(out.read_text())
        yield _row(one, found, took)


def _row(one: Instance, found: dict[str, float], took: float) -> str:
    problem = iopddl.read(one.file)
    cost, peak = recount(problem, found["solution"])  # type: ignore[arg-type]
    fits = problem.limit is None or peak <= problem.limit
    said = "" if (cost, peak) == (found["cost"], found["peak"]) and fits else "  NOT WHAT IT SAYS"
    return (
        ROW.format(
            one.file.name.removesuffix(".json.gz"),
            f"{one.seconds:g} s",
            f"{took:.1f} s",
            cost,
            found["bound"],
            f"{found['gap']:.4%}",
            f"{cost / one.contest:.4f}" if one.contest else "",
            f"{cost / one.known:.4f}" if one.known else "",
        )
        + said
    )


def main(args: list[str]) -> None:
    """The five instances, or those of a folder."""
    chosen = INSTANCES
    if args:
        seconds = float(args[1]) if len(args) > 1 else 180.0
        chosen = tuple(Instance(f, seconds) for f in sorted(Path(args[0]).glob("*.json*")))
    for line in rows(chosen):
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
