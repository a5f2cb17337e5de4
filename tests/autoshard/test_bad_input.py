"""Bad input: each is one clear error with the user's line, or the path of the argument."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard import Plan, PlanError

X = np.ones((8, 16), np.float32)
W = np.ones((16, 16), np.float32)
HERE = Path(__file__).name


def plan(fn: Any, *args: Any, **options: Any) -> Plan:
    return autoshard.plan(fn, *args, **{"cluster": "cpu:8", **options})


def product(x: Any, w: Any) -> Any:
    return x @ w


def two(params: Any, x: Any) -> Any:
    return x @ params["wq"] @ params["wk"]


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def line_of(text: str) -> int:
    """The line of this file that ends in a comment."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = [n for n, line in enumerate(lines, 1) if line.endswith(f"# {text}")]
    return found


# Hints


@pytest.mark.parametrize("solver", ["ilp", "propagate", "dp"])
def test_wrong_axis_name(solver: str) -> None:
    def fn(x: Any) -> Any:
        return autoshard.annotate(x * 2, "modle", None)  # wrong axis

    with pytest.raises(autoshard.HintError) as caught:
        plan(fn, X, mesh={"data": 4, "model": 2}, solver=solver)
    message = str(caught.value)
    assert f"{HERE}:{line_of('wrong axis')}: [modle, .]" in message
    assert "there is no axis 'modle' in the mesh data=4 model=2" in message
    assert "did you mean 'model'?" in message


def test_wrong_axis_name_in_hints() -> None:
    with pytest.raises(autoshard.HintError, match=r"hints\['x'\].*on x, f32\[8,16\].*'dta'"):
        plan(product, X, W, mesh={"data": 8}, hints={"x": P("dta")})


def test_wrong_rank() -> None:
    def fn(x: Any) -> Any:
        return autoshard.annotate(x * 2, "data", None, None)  # wrong rank

    where = rf"{HERE}:{line_of('wrong rank')}: .*3 entries for 2 dims"
    with pytest.raises(autoshard.HintError, match=where):
        plan(fn, X)
    with pytest.raises(autoshard.HintError, match=r"hints\['x'\] on x.*3 entries for 2 dims"):
        plan(product, X, W, hints={"x": P("data", None, None)})


def test_glob_that_matches_nothing() -> None:
    with pytest.raises(autoshard.HintError, match=r"hints\['params/wz'\].*nearest are params/wk"):
        plan(two, {"wq": W, "wk": W}, X, hints={"params/wz": P("data")})


@pytest.mark.parametrize("spec", [7, P(3), "[data", P("data", "data")])
def test_no_spec(spec: Any) -> None:
    with pytest.raises(autoshard.HintError, match=r"x"):
        plan(product, X, W, mesh={"data": 8}, hints={"x": spec})


def test_a_mesh_axis_that_does_not_divide_a_hinted_dim() -> None:
    words = (
        r"hints\['x'\]: dim 0 of x, f32\[7,3\] has length 7, which data=8 does not divide; use a"
    )
    with pytest.raises(autoshard.HintError, match=words):
        plan(lambda x: x + 1, shape(7, 3), mesh={"data": 8}, hints={"x": P("data")})


def test_a_search_leaves_out_the_meshes_that_a_hint_does_not_fit() -> None:
    made = plan(lambda x: x + 1, shape(4, 3), hints={"x": P("data")})
    assert made.mesh["data"] == 4
    lost = [a for a in made.alternatives if a.mesh == (("data", 8),)]
    assert [(a.cost, a.note) for a in lost] == [(None, "breaks a hint")]
    with pytest.raises(autoshard.HintError, match="which data=8 does not divide"):
        plan(lambda x: x + 1, shape(7, 3), hints={"x": P("data")})


@pytest.mark.parametrize(
    "hints",
    [
        {"x": P("data", None), "*": P(None, "data")},
        {"x": P("data", P.UNCONSTRAINED), "*": P(P.UNCONSTRAINED, "data")},
        {"x": P("data"), "*": P()},
    ],
)
def test_hints_that_contradict_are_both_named(hints: Any) -> None:
    with pytest.raises(autoshard.HintConflict, match=r"on x, .*hints\['x'\].*hints\['\*'\]"):
        plan(lambda x: x + 1, X, mesh={"data": 8}, hints=hints)


def in_a_row(x: Any) -> Any:
    x = autoshard.annotate(x, "data", None)
    return autoshard.annotate(x, None, "data") + 1


def side_by_side(x: Any) -> Any:
    y = x * 2
    return autoshard.annotate(y, "data", None) + autoshard.annotate(y, None, "data")


def in_a_loop(x: Any) -> Any:
    def step(carry: Any, row: Any) -> Any:
        carry = autoshard.annotate(carry, "data", None)
        return autoshard.annotate(carry, autoshard.OPEN, "data") * row, None

    return jax.lax.scan(step, x, jnp.ones((3, 8, 16)))[0]


@pytest.mark.parametrize("fn", [in_a_row, side_by_side, in_a_loop])
@pytest.mark.parametrize("solver", ["ilp", "propagate", "fsdp"])
def test_annotations_of_one_value_that_contradict_are_both_named(fn: Any, solver: str) -> None:
    places = r"test_bad_input\.py:(\d+) wants .*test_bad_input\.py:(\d+) wants"
    with pytest.raises(autoshard.HintConflict, match=places):
        plan(fn, X, mesh={"data": 8}, solver=solver)


def test_an_argument_may_be_stored_in_one_way_and_used_in_another() -> None:
    """FSDP as users write it: the weight is split where it lies and gathered where it is used."""

    def fn(x: Any, w: Any) -> Any:
        return x @ autoshard.annotate(w, None, None)

    made = plan(fn, X, W, mesh={"data": 8}, hints={"w": P("data"), "x": P("data")})
    assert made.in_shardings == (P("data"), P("data"))
    assert [m.kind for op in made.ops for m in op.collectives] == ["all_gather"]
    np.testing.assert_allclose(made.compile()(X, W), X @ W, rtol=1e-5)


def test_an_operation_between_two_annotations_makes_them_a_reshard() -> None:
    def fn(x: Any) -> Any:
        x = autoshard.annotate(x, "data", None)
        return autoshard.annotate(x * 2, None, "data")

    assert plan(fn, X, mesh={"data": 8}).out_shardings == P(None, "data")


def test_annotations_of_one_value_may_complete_each_other() -> None:
    def fn(x: Any) -> Any:
        x = autoshard.annotate(x, "data", autoshard.OPEN)
        return autoshard.annotate(x, autoshard.OPEN, "model")

    assert plan(fn, X, mesh={"data": 4, "model": 2}).out_shardings == P("data", "model")


def test_a_constraint_and_an_annotation_in_a_row_are_two_values_and_a_reshard() -> None:
    def fn(x: Any) -> Any:
        y = jax.lax.with_sharding_constraint(x * 2, jax.sharding.NamedSharding(mesh, P("data")))
        return autoshard.annotate(y, None, "data")

    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:8]), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    made = plan(fn, X, mesh={"data": 8})
    assert made.out_shardings == P(None, "data")
    np.testing.assert_array_equal(made.compile()(X), X * 2)


# Clusters, meshes, memory, options


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ("tpu-v9:4x4", "no cluster is called 'tpu-v9'. Near it: tpu-v"),
        ("cpu:0", "whole numbers above zero"),
        ("cpu:", "cpu"),
        ("h100", "h100"),
        ("", "cluster"),
    ],
)
def test_unknown_cluster(cluster: str, words: str) -> None:
    with pytest.raises(autoshard.ClusterError, match=re.escape(words)):
        plan(product, X, W, cluster=cluster)


def test_what_is_no_cluster_no_mesh_and_no_hints() -> None:
    with pytest.raises(TypeError, match="cluster is text such as 'cpu:8'"):
        plan(product, X, W, cluster=8)
    with pytest.raises(TypeError, match="mesh is a mapping"):
        plan(product, X, W, mesh=8)
    with pytest.raises(TypeError, match="hints is a mapping"):
        plan(product, X, W, hints=[("x", P("data"))])
    with pytest.raises(autoshard.MeshError, match="'data' has size 0"):
        plan(product, X, W, mesh={"data": 0})


def test_the_size_of_a_mesh_axis_may_be_a_number_of_numpy() -> None:
    made = plan(product, X, W, mesh={"data": np.int64(4), "model": np.int32(2)})
    assert Plan.from_json(made.to_json()).mesh == {"data": 4, "model": 2}


def test_a_mesh_that_does_not_match_the_cluster() -> None:
    with pytest.raises(ValueError, match="mesh data=4 has 4 devices, but the cluster cpu:8 has 8"):
        plan(product, X, W, mesh={"data": 4})


def test_a_mesh_that_does_not_match_a_shard_map() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("i",))

    def fn(x: Any) -> Any:
        return jax.shard_map(lambda x: x * 2, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(x)

    with pytest.raises(ValueError, match=r"fn has a shard_map over mesh i=8.*data=8"):
        plan(fn, X, mesh={"data": 8})
    with pytest.raises(ValueError, match=r"fn has a shard_map over mesh i=8.*cpu:4"):
        plan(fn, X, cluster="cpu:4")


def test_impossible_memory() -> None:
    params = {"wq": shape(4096, 4096), "wk": shape(4096, 4096)}
    with pytest.raises(autoshard.NoFeasiblePlan) as caught:
        plan(two, params, shape(8, 4096), memory_limit="1MiB")
    message = str(caught.value)
    assert "no plan of two fits in 1 MiB per device" in message
    assert "15 MiB short even at its smallest" in message  # two arrays of 64 MiB over 8 devices
    assert "test_bad_input.py" in message
    assert "params['wk'] 8 MiB" in message
    assert "donate" in message
    assert "without" not in message  # there are no hints
    assert plan(two, params, shape(8, 4096), memory_limit="18MiB").cost.peak_memory < 18 * 2**20


def test_hints_that_need_too_much_memory_together() -> None:
    params = {"wq": shape(4096, 4096), "wk": shape(4096, 4096)}
    hints = {"params/wq": P(), "params/wk": P(None, "data"), "x": P()}
    asked = partial(plan, two, params, shape(8, 4096), mesh={"data": 8})
    with pytest.raises(autoshard.NoFeasiblePlan) as caught:
        asked(hints=hints, memory_limit="32MiB")
    message = str(caught.value)
    assert "params['wq'] 64 MiB, params['wk'] 8 MiB" in message
    assert "without hints['params/wq'] there would be room" in message
    with pytest.raises(autoshard.NoFeasiblePlan) as caught:
        asked(hints=hints, memory_limit="15MiB")
    assert "without" not in str(caught.value)  # nor would there be without
    del hints["params/wq"]
    assert asked(hints=hints, memory_limit="32MiB").cost.peak_memory < 32 * 2**20


@pytest.mark.parametrize(
    "limit", ["lots", -1, "12 parsecs", "", float("nan"), float("inf"), [1], True]
)
def test_what_is_no_memory_limit(limit: Any) -> None:
    with pytest.raises(ValueError, match="number of bytes; write 16GB"):
        plan(product, X, W, memory_limit=limit)


def test_unknown_solver() -> None:
    with pytest.raises(ValueError, match="unknown solver 'magic'; there are ilp, propagate, dp"):
        plan(product, X, W, solver="magic")


# Arguments and functions


@pytest.mark.parametrize("leaf", ["hello", object(), {1, 2}, np.array([None, 1]), np.array("a")])
def test_arguments_that_are_no_arrays(leaf: Any) -> None:
    with pytest.raises(TypeError):
        plan(two, {"wq": leaf, "wk": W}, X)


def test_the_path_of_what_is_no_array_is_said() -> None:
    with pytest.raises(TypeError, match="argument params/wq is str 'hello', which is no array"):
        plan(two, {"wq": "hello", "wk": W}, X)
    step = autoshard.parallelize(two, cluster="cpu:8")
    with pytest.raises(TypeError, match="argument params/wq is str"):
        step({"wq": "hello", "wk": W}, x=X)


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda x: float(x.sum()), (X,)),
        (lambda x: x if x.sum() > 0 else -x, (X,)),
        (product, (X, X)),
        (lambda x: "text", (X,)),
        (product, (X,)),
        (3, (X,)),
    ],
)
def test_a_function_that_jit_refuses_is_refused_as_jit_does(fn: Any, args: Any) -> None:
    def error(call: Callable[[], Any]) -> str:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call()
        return f"{type(caught.value).__name__}: {caught.value}"

    assert error(lambda: plan(fn, *args)) == error(lambda: jax.jit(fn).trace(*args))


def test_donating_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="donate_argnums"):
        plan(product, X, W, donate_argnums=5)


def test_calling_with_what_was_not_planned() -> None:
    call = plan(product, X, W).compile()
    for x, words in (
        (X[:4], "argument x is float32[4,16], but the plan is for float32[8,16]"),
        (X.astype(np.int32), "argument x is int32[8,16], but the plan is for float32[8,16]"),
        (X.astype(np.complex64), "argument x is complex64[8,16]"),
        (jnp.ones((8, 16), jnp.bfloat16), "argument x is bfloat16[8,16]"),
        ("text", "argument x is"),
        (shape(8, 16), "argument x is object"),
        (2.0, "argument x is float32[]"),
    ):
        with pytest.raises(TypeError, match=re.escape(words)):
            call(x, W)
    np.testing.assert_array_equal(call(X.astype(np.float64), W), X @ W)  # as jit: 64 bit become 32


def test_a_compiled_plan_can_not_be_traced() -> None:
    call = plan(product, X, W).compile()
    with pytest.raises(
        TypeError, match=r"argument x is traced by jax, .* call the function itself"
    ):
        jax.jit(call)(X, W)


def test_calling_in_another_form_than_planned() -> None:
    call = plan(two, {"wq": W, "wk": W}, X).compile()
    for args, kwargs, words in (
        (({"wq": W, "wk": W},), {"x": X}, "without args/1 and with x. Give"),
        (({"wq": W},), {}, "without args/0/wk, args/1. Give each"),
        (({"wq": W, "wk": [W, W]}, X), {}, "without args/0/wk and with args/0/wk/0, args/0/wk/1."),
        (({"wq": W, "wk": W, "wv": None}, X), {}, "PyTreeDef"),
    ):
        with pytest.raises(
            TypeError, match=f"two is called with arguments of another form than planned: .*{words}"
        ):
            call(*args, **kwargs)


def test_python_numbers_take_the_planned_type_only_where_jit_would() -> None:
    call = plan(lambda a, b: a + b, np.float32(1), np.int32(1)).compile()
    assert call(True, 2) == 3
    assert call(2, True) == 3
    with pytest.raises(TypeError, match="argument b is float32"):
        call(1.0, 2.5)


def test_a_function_without_any_array_has_a_plan() -> None:
    made = plan(lambda a, b: (a, None), {}, ())
    assert (made.in_shardings, made.out_shardings) == (({}, ()), ({}, None))
    assert made.cost.step_time == 0
    assert made.compile()({}, ()) == ({}, None)
    assert "none: every device does the whole work" in str(made)


def test_too_few_devices() -> None:
    made = plan(product, X, W)
    with pytest.raises(autoshard.DevicesError, match="needs 8 devices, but only 4 are here"):
        made.compile(jax.devices()[:4])


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (8, "8 is no device; give a list such as jax.devices"),
        ("cpu", "'cpu' is no device"),
        (list(range(8)), "0 is no device"),
        ("twice", "is given twice; a mesh has each device once"),
    ],
)
def test_what_are_no_devices(devices: Any, words: str) -> None:
    if devices == "twice":
        devices = [jax.devices()[0]] * 8
    with pytest.raises(autoshard.DevicesError, match=words):
        plan(product, X, W).lower(devices)


# Plans as JSON


@pytest.fixture(scope="module")
def text() -> str:
    return plan(product, X, W, mesh={"data": 8}).to_json()


def test_a_plan_comes_back(text: str) -> None:
    again = Plan.from_json(text, product, X, W)
    assert again.to_json() == text
    assert Plan.from_json(text).cost == again.cost
    np.testing.assert_allclose(again.compile()(X, W), X @ W)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("", "no.* plan: the JSON breaks off"),
        ("{", "no.* plan: the JSON breaks off"),
        ("not json", "no.* plan: the JSON breaks off"),
        ("[1]", "not an autoshard plan"),
        ("null", "not an autoshard plan"),
        ('{"a": 1}', "not an autoshard plan"),
        ({"a": 1}, "from JSON text, not from dict"),
        (b"\xff\x00", "no.* plan: the JSON breaks off"),
    ],
)
def test_what_is_no_plan(bad: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Plan.from_json(bad)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_plan_cut_short(text: str, part: float) -> None:
    with pytest.raises(PlanError, match="breaks off"):
        Plan.from_json(text[: int(len(text.rstrip()) * part)])


def test_a_plan_of_a_newer_version(text: str) -> None:
    data = {**json.loads(text), "version": 99}
    with pytest.raises(PlanError, match="schema version 99, and this autoshard reads"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("value", [None, 7, "text", [], {}, [[[]]], True])
def test_a_plan_with_any_field_damaged(text: str, value: Any) -> None:
    """Each field in turn: gone, doubled by another, or of another type."""
    data = json.loads(text)
    for name, held in data.items():
        if name in ("fingerprint", "version"):
            continue
        with pytest.raises(PlanError, match="damaged"):
            Plan.from_json(json.dumps({k: v for k, v in data.items() if k != name}))
        with pytest.raises(PlanError, match="damaged"):
            Plan.from_json(json.dumps({**data, f"{name}2": held}))
        number = isinstance(held, int | float) and isinstance(value, int | float)
        if type(value) is not type(held) and not number:
            with pytest.raises(PlanError, match=f"damaged: {name} of a Plan"):
                Plan.from_json(json.dumps({**data, name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mesh", [1]),
        ("mesh", [["data", "8"]]),
        ("mesh", [["data", 0]]),
        ("mesh", [["data", 4], ["data", 2]]),
        ("notes", [1]),
        ("cluster", {}),
        ("values", [["x"]]),
        ("donated", [0.5]),
        ("arguments", [{"name": "x"}]),
        ("gap", True),
    ],
)
def test_a_plan_damaged_inside_a_field(text: str, name: str, value: Any) -> None:
    with pytest.raises(PlanError, match="damaged"):
        Plan.from_json(json.dumps({**json.loads(text), name: value}))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("mesh", 0, 1), 4, "its mesh data=4 has 4 devices, its cluster cpu:8 8"),
        (("fingerprint",), "0" * 16, "is not that of its signature"),
        (("signature", 0), "argument y: f32[8,16]", "is not that of its signature"),
        (("arguments", 0, "spec"), [], r"the spec \(\) of x does not fit shape \(8, 16\)"),
        (("arguments", 0, "spec"), [["dta"], []], "of x does not fit .* on mesh data=8"),
        (("arguments", 0, "spec"), [["data"], ["data"]], "of x does not fit"),
        (("donated",), [2], r"donated \(2,\) are not among its 2 arguments"),
        (("values", 0), [0, 0], r"\(0, 0\) is no sharding on mesh data=8"),
        (("cost", "step_time"), float("nan"), "step_time of a Cost can not be nan"),
        (("cost", "comm_time"), float("inf"), "its cost is no number"),
        (("cluster", "network"), [], "at least one level of network"),
        (("cluster", "chip", "hbm_bytes"), "much", "hbm_bytes of a Chip can not be 'much'"),
        (("cluster", "platform"), "abacus", "platform of a Cluster can not be 'abacus'"),
    ],
)
def test_a_plan_edited_by_hand(text: str, path: tuple[Any, ...], value: Any, words: str) -> None:
    data = json.loads(text)
    part = data
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(PlanError, match=f"damaged: .*{words}"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("part", ["arguments", "results", "values"])
def test_a_plan_that_lacks_a_part_is_not_bound(text: str, part: str) -> None:
    data = json.loads(text)
    data[part] = data[part][:-1]
    with pytest.raises(PlanError, match="damaged: it does not say all about product"):
        Plan.from_json(json.dumps(data), product, X, W)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (
            lambda x: x.sum(0),
            lambda x: x.sum(1),
            r"reduce_sum .* i j -> j .*, the function .* -> i ",
        ),
        (
            lambda x: autoshard.annotate(x + 1, "data", None),
            lambda x: autoshard.annotate(x + 1, None, "data"),
            r"hint 3 \[data, .\] hard, priority 0`, the function has `hint 3 \[., data\]",
        ),
        (
            lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x * 2, x),
            lambda x: jax.lax.fori_loop(0, 5, lambda i, x: x * 2, x),
            "scan of 3 trips .* the function has `scan of 5 trips",
        ),
        (lambda x: (x, x + 1), lambda x: {"a": x, "b": x + 1}, r"result\[0\] .*result\['a'\]"),
    ],
)
def test_what_the_same_types_hide_is_in_the_fingerprint(one: Any, other: Any, words: str) -> None:
    text = plan(one, W, mesh={"data": 8}).to_json()
    Plan.from_json(text, one, W)
    with pytest.raises(PlanError, match=words):
        Plan.from_json(text, other, W)


def test_a_plan_for_another_function_says_what_differs(text: str) -> None:
    with pytest.raises(PlanError, match=r"dot_general.*the function has `reduce_sum"):
        Plan.from_json(text, lambda x, w: x + w.sum(), X, W)
    with pytest.raises(PlanError, match=r"x: f32\[8,16\]`, the function has `argument x: f32\[16"):
        Plan.from_json(text, product, shape(16, 16), W)
    with pytest.raises(PlanError, match=r"`argument w: .*`, the function has `argument weight: "):
        Plan.from_json(text, lambda x, weight: x @ weight, X, W)


def test_a_plan_without_its_function_can_print_but_not_run(text: str) -> None:
    read = Plan.from_json(text)
    assert "data=8" in str(read)
    for use in (lambda: read.in_shardings, lambda: read.out_shardings, read.lower, read.compile):
        with pytest.raises(PlanError, match="needs the function: give it to Plan"):
            use()
