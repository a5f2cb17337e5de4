"""The report says what was collected, and finds the plan that is put in the wrong order."""

from __future__ import annotations

import math
from typing import Any

import pytest
from accuracy_report import LINES, REPORT, error, rank_correlation, ranks, report, verdicts
from collect import ROWS, read_rows, write_rows

GIB = 2.0**30


def row(solver: str = "ilp", **changes: Any) -> dict[str, Any]:
    """One collected row: a plan that takes 2 ms and 1 GiB, and is predicted so."""
    found: dict[str, Any] = {
        "program": "gpt",
        "cluster": "tpu-v5e:4x4",
        "solver": solver,
        "mesh": {"data": 16},
        "limit": 16 * GIB,
        "program_hash": solver,
        "predicted": {
            "step_time": 2e-3,
            "compute_time": 1e-3,
            "comm_time": 1e-3,
            "peak_memory": GIB,
            "comm_bytes": 1e6,
        },
        "compiled": {"compute": 1e-3, "sent": 1e6, "step": 2e-3, "memory": {"peak": GIB}},
        "needed": 0.0,
        "versions": {"jax": "0"},
    }
    for key, value in changes.items():
        found[key] = {**found[key], **value} if isinstance(value, dict) else value
    return found


def test_the_page_is_that_of_the_rows() -> None:
    """docs/accuracy.md is generated, never written by hand."""
    assert REPORT.read_text() == report(list(read_rows(ROWS).values()))


def test_an_error_is_relative_to_what_was_compiled() -> None:
    memory, compute, sent, step = LINES
    found = row(predicted={"peak_memory": 1.5 * GIB}, compiled={"compute": None, "sent": 0.0})
    assert error(step, row(predicted={"step_time": 1e-3})) == pytest.approx(0.5)
    assert error(memory, found) == pytest.approx(0.5)
    assert error(compute, found) is None
    assert error(sent, found) is None, "nothing is sent: there is no ratio"


def test_what_does_not_fit_is_compared_with_what_it_wanted() -> None:
    memory, compute, *_ = LINES
    found = row(predicted={"peak_memory": 30 * GIB}, needed=40 * GIB)
    found["compiled"] = None
    assert error(memory, found) == pytest.approx(0.25)
    assert error(compute, found) is None


def test_verdicts_count_near_the_limit_only() -> None:
    far = row()  # a sixteenth of the limit
    tiny = row(compiled={"memory": {"peak": 0.01 * GIB}})
    wrong = row(predicted={"peak_memory": 15 * GIB}, compiled={"memory": {"peak": 17 * GIB}})
    agree, count, others = verdicts([far, tiny, wrong])
    assert (agree, count, others) == (1, 2, [wrong])


def test_plans_in_the_wrong_order_are_noticed() -> None:
    steps = {"ilp": (1e-3, 3e-3), "fsdp": (2e-3, 2e-3), "tp": (3e-3, 1e-3)}
    rows = [row(s, predicted={"step_time": p}, compiled={"step": c}) for s, (p, c) in steps.items()]
    assert ranks(rows) == {("tpu-v5e:4x4", "gpt"): (-1.0, 3)}
    assert ranks(rows[:2]) == {}, "two plans are no order"
    same = [{**r, "program_hash": "one"} for r in rows]
    assert ranks(same) == {}, "one program under three names is one plan"


def test_equal_values_share_their_rank() -> None:
    assert rank_correlation([1, 1, 2], [1, 1, 2]) == 1
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_rows_are_kept_with_as_many_digits_as_matter(tmp_path: Any) -> None:
    found = row(predicted={"step_time": 1 / 3})
    key = found["program"], found["cluster"], found["solver"]
    write_rows({key: found}, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl")[key]["predicted"]["step_time"] == 0.333333
    assert read_rows(tmp_path / "none.jsonl") == {}
