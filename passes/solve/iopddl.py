"""How are problems shared?  Read and write the JSON format of Google's IOPDDL contest.

    {"problem": {"name": ..., "usage_limit": ...,
                 "nodes": {"intervals": [[begin, end], ...],
                           "costs": [[...], ...], "usages": [[...], ...]},
                 "edges": {"nodes": [[u, v], ...], "costs": [[row by row, u by v], ...]}}}

(Moffitt and Fegade, "The ASPLOS 2025 / EuroSys 2025 Contest on Intra-Operator Parallelism for
Distributed Deep Learning", github.com/google/iopddl, Apache-2.0.) A contest node has one interval;
a node of ours with several uses is written as several, tied by edges that are 0 on the diagonal and
INFINITY off it. Files may be gzipped.

>>> text = '{"problem": {"name": "a", "nodes": {"intervals": [[0, 2]], "costs": [[3, 1]],'
>>> text += ' "usages": [[1, 4]]}, "edges": {"nodes": [], "costs": []}, "usage_limit": 5}}'
>>> problem = loads(text)
>>> problem.nodes[0].costs.tolist(), problem.limit, loads(dumps(problem)).nodes[0].uses[0].end
([3.0, 1.0], 5.0, 2)
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from passes.solve.problem import INFINITY, Costs, Edge, Node, Problem, ProblemError, Use, check


def read(path: str | os.PathLike[str]) -> Problem:
    """Read a .json or .json.gz file; raises ProblemError saying what is wrong where."""
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return loads(data.decode("utf-8"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ProblemError(f"cannot read {path}: {error}") from error
    except ProblemError as error:
        raise ProblemError(f"{path}: {error}") from error


def loads(text: str) -> Problem:
    """The problem in a JSON text; raises ProblemError saying what is wrong where."""
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ProblemError(f"not JSON: {error}") from error
    body = _member(data, "problem", dict, "the file")
    nodes = _member(body, "nodes", dict, "problem")
    intervals = _member(nodes, "intervals", list, "problem.nodes")
    costs = _member(nodes, "costs", list, "problem.nodes")
    usages = _member(nodes, "usages", list, "problem.nodes")
    if not len(intervals) == len(costs) == len(usages):
        raise ProblemError(
            f"problem.nodes has {len(intervals)} intervals, {len(costs)} lists of costs"
            f" and {len(usages)} lists of usages; give one of each per node"
        )
    limit = body.get("usage_limit")
    if limit is not None and not _is_number(limit):
        raise ProblemError(f"problem.usage_limit is {limit!r}, not a number")
    made = [_node(i, *three) for i, three in enumerate(zip(intervals, costs, usages, strict=True))]
    problem = Problem(
        str(body.get("name", "")),
        tuple(made),
        tuple(_edges(_member(body, "edges", dict, "problem"), made)),
        None if limit is None else float(limit),
    )
    check(problem)
    return problem


def _node(i: int, interval: Any, costs: Any, usages: Any) -> Node:
    """One node of the contest."""
    begin, end = _pair(interval, f"problem.nodes.intervals[{i}]")
    values = _numbers(costs, f"problem.nodes.costs[{i}]")
    bytes_ = _numbers(usages, f"problem.nodes.usages[{i}]")
    if len(values) != len(bytes_):
        raise ProblemError(f"node {i} has {len(values)} choices but {len(bytes_)} memory usages")
    return Node(values, (Use(begin, end, bytes_),))


def _edges(edges: dict[str, Any], nodes: list[Node]) -> list[Edge]:
    """The edges; equal lists of costs share one array."""
    ends = _member(edges, "nodes", list, "problem.edges")
    costs = _member(edges, "costs", list, "problem.edges")
    if len(ends) != len(costs):
        raise ProblemError(
            f"problem.edges has {len(ends)} pairs of nodes but {len(costs)} lists of costs"
        )
    shared: dict[tuple[int, int, bytes], Costs] = {}
    out = []
    for i, (pair, values) in enumerate(zip(ends, costs, strict=True)):
        u, v = _pair(pair, f"problem.edges.nodes[{i}]")
        for end in (u, v):
            if not 0 <= end < len(nodes):
                raise ProblemError(f"edge {i} ends at node {end}, but there are {len(nodes)} nodes")
        rows, columns = len(nodes[u].costs), len(nodes[v].costs)
        table = _numbers(values, f"problem.edges.costs[{i}]")
        if len(table) != rows * columns:
            raise ProblemError(
                f"edge {i} between nodes {u} and {v} has {len(table)} costs;"
                f" their choices ask for {rows} x {columns}"
            )
        key = (rows, columns, table.tobytes())
        out.append(Edge(u, v, shared.setdefault(key, table.reshape(rows, columns))))
    return out


def _member(data: Any, key: str, kind: type, where: str) -> Any:
    """data[key], of this kind, or a ProblemError."""
    if not isinstance(data, dict) or key not in data:
        raise ProblemError(f"{where} has no {key!r}")
    if not isinstance(data[key], kind):
        name = {"dict": "an object", "list": "a list"}[kind.__name__]
        raise ProblemError(f"{key!r} in {where} is not {name}")
    return data[key]


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _pair(pair: Any, where: str) -> tuple[int, int]:
    """Two whole numbers."""
    if (
        not isinstance(pair, list)
        or len(pair) != 2
        or not all(isinstance(x, int) and not isinstance(x, bool) for x in pair)
    ):
        raise ProblemError(f"{where} is {pair!r}; give two whole numbers")
    return pair[0], pair[1]


def _numbers(values: Any, where: str) -> Costs:
    """A list of numbers as an array."""
    if not isinstance(values, list):
        raise ProblemError(f"{where} is not a list")
    try:
        array = np.array(values)
    except ValueError:  # lists of unequal lengths inside
        array = np.array(None)
    if array.ndim == 1 and array.dtype.kind in "iuf":
        return array.astype(np.float64)
    for x in values:
        if not _is_number(x):
            raise ProblemError(f"{where} holds {x!r}, which is not a number")
    return np.array([float(x) for x in values], dtype=np.float64)


def dumps(problem: Problem) -> str:
    """The problem as the contest's JSON; whole numbers are written without a point."""
    check(problem)
    first: list[int] = []
    intervals: list[list[int]] = []
    costs: list[list[float]] = []
    usages: list[list[float]] = []
    ends: list[list[int]] = []
    tables: list[list[float]] = []
    for node in problem.nodes:
        first.append(len(costs))
        for k, use in enumerate(node.uses or (Use(0, 0, np.zeros(len(node.costs))),)):
            intervals.append([use.begin, use.end])
            usages.append(_plain(use.usages))
            costs.append(_plain(node.costs if k == 0 else np.zeros(len(node.costs))))
            if k:
                tie = np.full((len(node.costs),) * 2, INFINITY)
                np.fill_diagonal(tie, 0.0)
                ends.append([first[-1], len(costs) - 1])
                tables.append(_plain(tie.ravel()))
    for edge in problem.edges:
        ends.append([first[edge.u], first[edge.v]])
        tables.append(_plain(edge.costs.ravel()))
    body: dict[str, Any] = {
        "name": problem.name,
        "nodes": {"intervals": intervals, "costs": costs, "usages": usages},
        "edges": {"nodes": ends, "costs": tables},
    }
    if problem.limit is not None:
        body["usage_limit"] = _plain(np.array([problem.limit]))[0]
    return json.dumps({"problem": body}, separators=(",", ":"))


def _plain(values: Costs) -> list[float]:
    """Numbers for JSON: whole ones as int, nothing above INFINITY."""
    capped = np.minimum(values, INFINITY).tolist()
    return [int(x) if math.isfinite(x) and x == int(x) else x for x in capped]


def write(problem: Problem, path: str | os.PathLike[str]) -> None:
    """Write a file, gzipped when its name ends in .gz; it appears whole or not at all."""
    data = dumps(problem).encode("utf-8")
    target = Path(path)
    if target.suffix == ".gz":
        data = gzip.compress(data, mtime=0)  # no time stamp: same problem, same bytes
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
