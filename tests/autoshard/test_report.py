"""The print-out of a plan: golden texts of plans made by hand, and what holds for any plan."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.alike import counterparts, local_bytes, mirrors, rows
from autoshard.columns import bar
from autoshard.report import WIDTH, report
from cost_models.cluster import cluster
from passes.ir.plan import Alternative, Cost, Move, OpPlan, Plan, TensorPlan, fingerprint

Spec = tuple[tuple[str, ...], ...]


def tensor(
    name: str, shape: tuple[int, ...], *split: str, origin: str = "", dtype: str = "float32"
) -> TensorPlan:
    """split: per dim the axes joined by `+`, or an empty text; dims left out are not split."""
    spec = tuple(tuple(s.split("+")) if s else () for s in split)
    spec += ((),) * (len(shape) - len(spec))
    nbytes = 4
    for n in shape:
        nbytes *= n
    return TensorPlan(name, shape, dtype, nbytes, spec, origin)


def op(id: int, name: str, source: str, *moves: Move) -> OpPlan:
    return OpPlan(
        id,
        name,
        source,
        "i k, k j -> i j",
        (("data", "i"),),
        "f32[8,8]",
        1e-3,
        64.0,
        1e9,
        1.0,
        moves,
    )


def move(kind: str, axis: str, seconds: float, source: str, value: str, trips: float = 1.0) -> Move:
    return Move(kind, (axis,), seconds * 1e9, seconds, source, value, trips)


def layers(root: str, count: int) -> list[TensorPlan]:
    out = []
    for i in range(count):
        h = f"{root}['h'][{i}]"
        out += [tensor(f"{h}['{w}']", (768, 768), "", "model") for w in ("wk", "wq", "wv")]
        out += [tensor(f"{h}['wo']", (768, 768), "model")]
        out += [tensor(f"{h}['norm']['{w}']", (768,)) for w in ("bias", "scale")]
    return [*out, tensor(f"{root}['embed']", (50304, 768), "data+model")]


MADE = Plan(
    name="train_step",
    fingerprint=fingerprint(()),
    signature=(),
    cluster=cluster("tpu-v5e:4x4").to_dict(),
    mesh=(("data", 4), ("model", 4)),
    solver="ilp",
    status="feasible",
    gap=0.0213,
    memory_limit=15.75 * 2**30,
    cost=Cost(31.4e-3, 24.1e-3, 7.3e-3, 9.87 * 2**30, 412e6, 2.1e12),
    arguments=(
        *layers("state['params']", 12),
        tensor("state['opt'][0].count", (), dtype="int32"),
        *layers("state['opt'][0].mu", 12),
        *layers("state['opt'][0].nu", 12),
        tensor("batch", (64, 1025), "data", origin="train.py:31", dtype="int32"),
        tensor("mask", (64, 1024), "data", origin="hints['mask']", dtype="bool"),
    ),
    results=(
        *layers("result[0]['params']", 12),
        tensor("result[0]['opt'][0].count", (), dtype="int32"),
        *layers("result[0]['opt'][0].mu", 12),
        *(replace(t, spec=((),) * len(t.shape)) for t in layers("result[0]['opt'][0].nu", 12)),
        tensor("result[1]", ()),
    ),
    ops=(
        op(
            0,
            "dot_general",
            "gpt.py:20 (block)",
            move(
                "all_gather",
                "data",
                40e-6,
                "gpt.py:20 (block)",
                "state['params']['h'][0]['wq']",
                12,
            ),
            move(
                "all_gather",
                "data",
                40e-6,
                "gpt.py:20 (block)",
                "state['params']['h'][7]['wq']",
                12,
            ),
            move(
                "all_gather",
                "data",
                30e-6,
                "gpt.py:20 (block)",
                "state['params']['h'][7]['wk']",
                12,
            ),
        ),
        op(
            1,
            "dot_general",
            "gpt.py:22 (block)",
            *(
                move(
                    "all_reduce",
                    "model",
                    2e-3,
                    "gpt.py:22 (block)",
                    "f32[16,1024,768] of dot_general",
                ),
            ),
        ),
        op(
            2,
            "add",
            "gpt.py:9 (<listcomp>)",
            *(
                move(
                    "reduce_scatter",
                    "data",
                    (9 - k) * 1e-5,
                    f"gpt.py:{30 + k} (<listcomp>)",
                    "f32[768,768] of add",
                )
                for k in range(9)
            ),
        ),
        op(3, "scatter-add", "", move("all_to_all", "data", 1e-6, "", "f32[64,8] of scatter-add")),
    ),
    values=(),
    reshards=(),
    alternatives=(
        Alternative("fsdp", (("data", 16),), Cost(33e-3, 24e-3, 9e-3, 8e9, 9e8, 2.1e12)),
        Alternative("fsdp+tp", (("data", 16),), Cost(33e-3, 24e-3, 9e-3, 8e9, 9e8, 2.1e12)),
        Alternative("ilp", (("data", 16),), Cost(33e-3, 24e-3, 9e-3, 8e9, 9e8, 2.1e12), "1.05x"),
        Alternative("tp", (("data", 4), ("model", 4)), Cost(52e-3, 45e-3, 7e-3, 12e9, 4e8, 4.2e12)),
        Alternative(
            "dp", (("data", 16),), Cost(30e-3, 24e-3, 6e-3, 29e9, 4e8, 2.1e12), "needs 27 GiB"
        ),
        Alternative("propagate", (("data", 4), ("model", 4)), None, "breaks a hint"),
    ),
    notes=(
        "sort at gpt.py:40 (top) has no rule of its own: Shardy's was used, which splits its batch"
        " only, so that every device sorts whole rows",
    ),
)

EMPTY = replace(
    MADE,
    name="nothing",
    arguments=(),
    results=(),
    ops=(),
    alternatives=(),
    notes=(),
    cost=Cost(0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    status="optimal",
)


def test_a_large_plan_is_one_screen(golden: Callable[[str, str], None]) -> None:
    text = report(MADE)
    golden("report_large", text)
    assert len(text.splitlines()) <= 60


def test_a_plan_of_nothing(golden: Callable[[str, str], None]) -> None:
    golden("report_empty", report(EMPTY))


def test_the_same_plan_reads_the_same_after_json() -> None:
    assert report(Plan.from_json(MADE.to_json())) == report(MADE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "optimal", "gap": 0.0}, "ilp, proven optimal"),
        ({"gap": 1e-9}, "at most 0.1% above the optimum"),
        ({"solver": "fsdp", "status": "fixed"}, "fsdp, a baseline"),
        ({"solver": "propagate", "status": "fixed"}, "the hints alone"),
        ({"notes": tuple(f"note {k}" for k in range(9))}, "and 5 more"),
    ],
)
def test_what_differs_is_said(change: dict[str, object], said: str) -> None:
    assert said in report(replace(MADE, **change))  # type: ignore[arg-type]


def test_too_many_arguments_leave_the_largest_and_a_count() -> None:
    many = tuple(tensor(f"p['a{'bcdefghijklmnopqrst'[k]}']", (8 + k, 4)) for k in range(19))
    many += tuple(tensor(f"q.{c}", (k + 1,), "data") for k, c in enumerate("uvwxyz"))
    text = report(replace(MADE, arguments=many, results=()))
    assert "and 8 smaller arrays" in text
    assert "6 of them split" in text


def test_a_result_split_otherwise_is_listed() -> None:
    results = (
        tensor("result['h'][0]['wq']", (768, 768), "model"),
        tensor("result['h'][0]['wk']", (768, 768), "", "model"),
    )
    arguments = tuple(replace(t, name=t.name.replace("result", "p")) for t in results)
    swapped = tuple(replace(t, spec=t.spec[::-1]) for t in results[:1]) + results[1:]
    lines = report(replace(MADE, arguments=arguments, results=swapped)).splitlines()
    below = lines[lines.index("results") :]
    assert "result/h/0/wq  f32[768,768{model}] " in below[1]
    assert "result/**      as p/**, but for those listed here" in below[2]


# What holds for any plan

names = st.sampled_from(["w", "b", "attention", "a_very_long_name_for_a_parameter", "0", "1", "17"])
paths = st.lists(names, min_size=1, max_size=5).map(
    lambda parts: parts[0] + "".join(f"['{p}']" for p in parts[1:])
)
shapes = st.lists(st.integers(1, 64), max_size=3).map(tuple)


seconds = st.floats(1e-9, 1e3) | st.just(0.0)


@st.composite
def tensors(draw: st.DrawFn) -> list[TensorPlan]:
    out = []
    for path in draw(st.lists(paths, max_size=30, unique=True)):
        shape = draw(shapes)
        split = [draw(st.sampled_from(["", "data", "model", "data+model"])) for _ in shape]
        out.append(tensor(path, shape, *split, origin=draw(st.sampled_from(["", "train.py:3"]))))
    return out


@settings(deadline=None, max_examples=60)
@given(tensors())
def test_rows_tell_of_every_array_once(found: list[TensorPlan]) -> None:
    mesh = {"data": 4, "model": 2}
    lines = rows(found, mesh=mesh)
    assert sum(r.count for r in lines) == len(found)
    assert sum(r.nbytes for r in lines) == pytest.approx(sum(local_bytes(t, mesh) for t in found))
    assert len(rows(found, mesh=mesh, names=False)) >= len(lines)


@settings(deadline=None, max_examples=60)
@given(tensors(), tensors())
def test_mirrors_have_the_shapes_of_their_originals(
    a: list[TensorPlan], b: list[TensorPlan]
) -> None:
    for m in mirrors(a):
        assert all(a[i].shape == a[k].shape and i != k for i, k in m.pairs)
    told = [k for m in mirrors(a) for _, k in m.pairs]
    assert len(told) == len(set(told))
    for m in counterparts(b, a):
        assert all(a[i].shape == b[k].shape for i, k in m.pairs)


@settings(deadline=None, max_examples=40)
@given(tensors(), tensors(), seconds, seconds)
def test_any_plan_is_one_screen(
    arguments: list[TensorPlan], results: list[TensorPlan], compute: float, comm: float
) -> None:
    cost = Cost(compute + comm, compute, comm, 1e12 * compute, 1.0, 1e9)
    plan = replace(MADE, arguments=tuple(arguments), results=tuple(results), cost=cost)
    lines = report(plan).splitlines()
    assert len(lines) <= 62
    assert max(map(len, lines)) <= WIDTH
    assert not [line for line in lines if line != line.rstrip() or "\t" in line]


def test_an_optimizer_that_comes_first_still_mirrors_the_parameters() -> None:
    found = mirrors([*layers("m", 2), *layers("params", 2), *layers("v", 2)])
    assert {(m.original, m.copy) for m in found} == {(("params",), ("m",)), (("params",), ("v",))}


def test_layers_of_one_stack_are_no_mirrors() -> None:
    assert not mirrors(layers("params", 6))
    assert re.search(r"params/h/\*/\{wk,wq,wv\}", rows(layers("params", 6))[0].path)


def test_layers_split_otherwise_are_told_apart() -> None:
    stack = [tensor(f"h[{i}]['w']", (8, 8), "model" if i in (1, 2, 5) else "") for i in range(6)]
    assert [(r.path, r.count) for r in rows(stack)] == [("h/{0,3-4}/w", 3), ("h/{1-2,5}/w", 3)]


def test_a_bar_is_never_longer_than_its_frame() -> None:
    assert bar([5.0, 5.0], 4.0, "#-", 8) == "[########]"
    assert bar([0.0, 0.0], 0.0, "#-", 8) == "[........]"
