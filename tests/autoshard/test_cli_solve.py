"""`autoshard solve`, `plan --dump-problem`: exact numbers out, one sentence for what is wrong."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import autoshard
from autoshard import cli, solved
from passes.solve import iopddl
from passes.solve.ilp import solve
from passes.solve.meter import Progress
from passes.solve.problem import INFINITY, Edge, Node, Problem, Use
from passes.solve.recount import recount

DATA = Path(__file__).parent.parent / "data" / "iopddl"
CONTEST = DATA / "asplos-2025-iopddl-G.json.gz"


def command(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def two(limit: float | None) -> Problem:
    """Two nodes alive together: 3 and 2 bytes at least, cheaper with more."""
    a = Node(np.array([0.0, 7.0]), (Use(0, 2, np.array([9.0, 3.0])),))
    b = Node(np.array([1.0, 4.0]), (Use(1, 3, np.array([8.0, 2.0])),))
    return Problem("two", (a, b), (Edge(0, 1, np.array([[0.0, 0.0], [INFINITY, 0.0]])),), limit)


def test_it_prints_and_writes_exact_numbers(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = command("solve", CONTEST, "--json", out)
    assert done.exit_code == 0, done.stderr
    assert "816 nodes, 1023 edges" in done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["cost", "217039"], ["bound", "217039"], ["gap", "0.0000%"], ["peak", "14381224"]
    ]  # fmt: skip
    found = json.loads(out.read_text())
    assert list(found) == ["cost", "bound", "gap", "peak", "solution"]
    problem = iopddl.read(CONTEST)
    assert recount(problem, found["solution"]) == (found["cost"], found["peak"])
    assert command("solve", CONTEST, "--json", out).stdout == done.stdout
    assert json.loads(out.read_text()) == found


def test_a_time_limit_ends_it_and_is_said(tmp_path: Path) -> None:
    done = command("solve", CONTEST, "--time-limit", "0")
    assert done.exit_code == 1
    assert (
        "no choice of asplos-2025-iopddl-G was found that fits before time ran out" in done.stderr
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON"),
        (b'{"problem": {}}', "problem has no 'nodes'"),
        (gzip.compress(b"{}", mtime=0)[:-9], "cannot read"),
        (b"\xff\xfe", "cannot read"),
        (
            json.dumps(
                {
                    "problem": {
                        "name": "x",
                        "nodes": {"intervals": [[0, 1]], "costs": [[1]], "usages": [[-4]]},
                        "edges": {"nodes": [], "costs": []},
                    }
                }
            ).encode(),
            "negative",
        ),
        (
            json.dumps(
                {
                    "problem": {
                        "name": "x",
                        "nodes": {"intervals": [[0, 1]], "costs": [[1]], "usages": [[4]]},
                        "edges": {"nodes": [[0, 3]], "costs": [[1]]},
                    }
                }
            ).encode(),
            "edge 0 ends at node 3, but there are 1 nodes",
        ),
    ],
    ids=["half", "empty", "cut", "binary", "negative", "no such node"],
)
def test_bad_files_get_a_sentence(tmp_path: Path, data: bytes, message: str) -> None:
    file, out = tmp_path / "bad.json", tmp_path / "out.json"
    file.write_bytes(data)
    done = command("solve", file, "--json", out)
    assert done.exit_code == 2
    assert message in done.stderr
    assert str(file) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()


def test_no_such_file_and_nowhere_to_write(tmp_path: Path) -> None:
    done = command("solve", tmp_path / "none.json")
    assert (done.exit_code, "none.json" in done.stderr) == (2, True)
    done = command("solve", CONTEST, "--json", tmp_path / "no" / "out.json")
    assert (done.exit_code, "there is no folder" in done.stderr) == (2, True)


def test_an_infeasible_limit_says_what_is_missing_where(tmp_path: Path) -> None:
    iopddl.write(two(4.0), tmp_path / "two.json")
    done = command("solve", tmp_path / "two.json")
    assert done.exit_code == 1
    assert "at time 1 even the smallest choices take 5, 1 more than 4" in done.stderr
    assert solve(two(5.0)).cost == 11
    assert solve(two(None)).cost == 1


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_solve_leaves_no_file(tmp_path: Path, stop: signal.Signals) -> None:
    out = tmp_path / "out.json"
    args = [sys.executable, "-m", "autoshard", "solve", str(CONTEST), "--json", str(out)]
    running = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    running.send_signal(stop)
    running.wait(30)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_prints_the_best_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = two(17.0)
    iopddl.write(problem, tmp_path / "two.json")

    def interrupted(given: Problem, **_: Any) -> Any:
        def stop(_: Progress) -> None:
            raise KeyboardInterrupt

        return solve(given, starts=[(1, 1)], progress=stop)

    monkeypatch.setattr("passes.solve.ilp.solve", interrupted)
    done = command("solve", tmp_path / "two.json", "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.stderr
    assert "interrupted: the best so far" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["solution"] == [1, 1]


def test_numbers_of_a_bound_are_never_too_high() -> None:
    problem = two(None)
    found = solve(problem)
    count = recount(problem, found.choice)
    vague = replace(found, status="feasible", bound=0.9999)
    assert solved.bound_of(vague, count) == 0
    assert solved.bound_of(found, count) == count.cost == 1
    assert json.loads(solved.as_json(replace(vague, bound=-np.inf), count))["bound"] is None
    assert solved.as_progress(Progress(8.0, 4.0, 1.0)) == "best 8, bound 4, gap 50.000%"
    assert "none yet" in solved.as_progress(Progress(np.inf, -np.inf, 0.0))


def test_a_plans_problem_can_be_written_and_solved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "def step(w, x):\n"
        "    return jnp.tanh(x @ w) @ w\n"
        "def job():\n"
        "    f = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)\n"
        "    return step, (f, f)\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("p.json", "p.json.gz"):
        done = command(
            "plan", "job.py:job", "--cluster", "h100:8", "--mesh", "data=8",
            "--dump-problem", name,
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        problem = iopddl.read(name)
        assert problem.name == "step"
        found = solve(problem)
        done = command("solve", name)
        assert f"cost   {found.cost:.0f}" in " ".join(done.stdout.split("\n"))


def test_ctrl_c_while_planning_keeps_the_best_mesh_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(w: Any, x: Any) -> Any:
        return x @ w @ w

    f = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    whole = autoshard.plan(step, f, f, cluster="h100:8")
    calls: list[int] = []

    def interrupted_at(call: int) -> Any:
        def once(problem: Problem, **options: Any) -> Any:
            calls.append(call)
            if len(calls) < call:
                return solve(problem, **options)
            if not options["starts"]:
                raise KeyboardInterrupt
            stopped = solve(problem, **options)
            return replace(stopped, stopped="interrupted")

        calls.clear()
        return once

    monkeypatch.setattr("passes.fitting.solve", interrupted_at(1))
    plan = autoshard.plan(step, f, f, cluster="h100:8")
    assert len(calls) == 1
    meshes = {a.mesh for a in whole.alternatives} | {whole.data.mesh}
    assert f"interrupted: {len(meshes) - 1} of {len(meshes)} meshes were not searched" in str(plan)

    def nothing(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("passes.fitting.solve", nothing)
    with pytest.raises(KeyboardInterrupt):
        autoshard.plan(step, f, f, cluster="h100:8")
