"""The contest's file format: there and back, and what a bad file is told."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passes.solve import iopddl
from passes.solve.brute import brute_force
from passes.solve.ilp import solve
from passes.solve.problem import INFINITY, Edge, Node, Problem, ProblemError
from passes.solve.samples import knotty_problem, random_problem

DATA = Path(__file__).parents[1] / "data" / "iopddl"


def test_the_contest_s_example() -> None:
    problem = iopddl.read(DATA / "example.json")
    assert (problem.name, problem.limit, len(problem.nodes)) == ("example", 50.0, 5)
    assert problem.edges[2].costs.tolist() == [[90.0, 10.0], [20.0, 80.0]]
    found = solve(problem)
    assert (found.cost, found.status) == (brute_force(problem).cost, "optimal")


def test_equal_tables_are_one_array() -> None:
    problem = iopddl.read(DATA / "asplos-2025-iopddl-G.json.gz")
    assert (len(problem.nodes), len(problem.edges)) == (816, 1023)
    assert len({id(e.costs) for e in problem.edges}) == 448


@pytest.mark.parametrize("name", ["p.json", "p.json.gz"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    for seed in range(20):
        problem = random_problem(seed) if seed % 2 else knotty_problem(seed)
        iopddl.write(problem, tmp_path / name)
        again = iopddl.read(tmp_path / name)
        # A node with several uses has become several, so compare what the problems mean.
        right = brute_force(problem)
        found = solve(again)
        assert found.cost == right.cost
        assert again.limit == problem.limit
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_written_problem_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    problem = knotty_problem(3)
    iopddl.write(problem, tmp_path / "a.json.gz")
    iopddl.write(problem, tmp_path / "b.json.gz")
    first = (tmp_path / "a.json.gz").read_bytes()
    assert first == (tmp_path / "b.json.gz").read_bytes()
    assert json.loads(gzip.decompress(first))["problem"]["name"] == "knotty 3"


def test_numbers_survive_exactly() -> None:
    costs = np.array([2.0**53 - 1, 0.1, -3.0, INFINITY])
    problem = Problem("n", (Node(costs), Node(np.zeros(1))), (Edge(0, 1, costs[:, None]),), None)
    text = iopddl.dumps(problem)
    again = iopddl.loads(text)
    assert again.nodes[0].costs.tolist() == costs.tolist()
    assert again.edges[0].costs[:, 0].tolist() == costs.tolist()
    assert again.limit is None
    assert "9007199254740991," in text
    assert "1000000000000000000" in text


def test_no_file_is_left_where_writing_fails(tmp_path: Path) -> None:
    bad = Problem("bad", (Node(np.zeros(1)),), (Edge(0, 3, np.zeros((1, 1))),))
    with pytest.raises(ProblemError, match="ends at node 3"):
        iopddl.write(bad, tmp_path / "p.json")
    assert not list(tmp_path.iterdir())


def good() -> dict[str, Any]:
    return {
        "problem": {
            "name": "x",
            "nodes": {
                "intervals": [[0, 2], [1, 3]],
                "costs": [[1, 2], [3]],
                "usages": [[4, 5], [6]],
            },
            "edges": {"nodes": [[0, 1]], "costs": [[7, 8]]},
            "usage_limit": 10,
        }
    }


def put(path: str, value: Any) -> str:
    data = good()
    at: Any = data
    *way, last = path.split(".")
    for key in way:
        at = at[int(key) if isinstance(at, list) else key]
    if value is ...:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1, 2]", "the file has no 'problem'"),
        ('{"problem": 3}', "'problem' in the file is not an object"),
        (put("problem.nodes", ...), "problem has no 'nodes'"),
        (put("problem.nodes.costs", 5), "'costs' in problem.nodes is not a list"),
        (put("problem.nodes.costs", [[1, 2]]), "2 intervals, 1 lists of costs and 2 lists"),
        (put("problem.nodes.costs.1", []), "node 1 has 0 choices but 1 memory usages"),
        (put("problem.nodes.usages.0", [4]), "node 0 has 2 choices but 1 memory usages"),
        (put("problem.nodes.usages.0", [4, -1]), "node 0 has a memory usage that is negative"),
        (
            put("problem.nodes.costs.0", [1, "2"]),
            r"costs\[0\] holds '2', which is not a number",
        ),
        (put("problem.nodes.costs.0", [1, None]), r"nodes.costs\[0\] holds None"),
        (put("problem.nodes.costs.0", [1, [2]]), r"nodes.costs\[0\] holds \[2\]"),
        (put("problem.nodes.intervals.0", [0]), r"intervals\[0\] is \[0\]; give two whole numbers"),
        (put("problem.nodes.intervals.0", [0.5, 2]), "give two whole numbers"),
        (put("problem.nodes.intervals.0", [-1, 2]), "node 0 is alive from time -1"),
        (put("problem.edges.nodes.0", [0, 2]), "edge 0 ends at node 2, but there are 2 nodes"),
        (put("problem.edges.nodes.0", [0, -1]), "edge 0 ends at node -1"),
        (put("problem.edges.nodes", []), "0 pairs of nodes but 1 lists of costs"),
        (put("problem.edges.costs.0", [7]), "edge 0 between nodes 0 and 1 has 1 costs; .* 2 x 1"),
        (put("problem.usage_limit", "much"), "usage_limit is 'much', not a number"),
        (put("problem.usage_limit", -5), "the memory limit is -5"),
        (put("problem.nodes.costs.0", [1, float("nan")]), "a cost that is not a number"),
    ],
)
def test_a_bad_file_is_told_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ProblemError, match=message) as caught:
        iopddl.read(path)
    assert str(path) in str(caught.value)


def test_a_good_file_is_read() -> None:
    assert iopddl.loads(json.dumps(good())).edges[0].costs.tolist() == [[7.0], [8.0]]


def test_a_broken_archive_and_a_missing_file(tmp_path: Path) -> None:
    whole = (DATA / "asplos-2025-iopddl-G.json.gz").read_bytes()
    (tmp_path / "half.json.gz").write_bytes(whole[: len(whole) // 2])
    for name in ("half.json.gz", "none.json"):
        with pytest.raises(ProblemError, match=f"cannot read .*{name}"):
            iopddl.read(tmp_path / name)
