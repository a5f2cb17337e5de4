"""Whatever jax.jit takes becomes a valid Graph, with the user's names and source lines."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.jax_compat import open_jaxpr
from autoshard.trace import INLINED, Traced, trace
from passes.ir.graph import Graph
from passes.ir.parse import parse_graph
from passes.ir.verify import verify
from passes.normalize import drop_dead, merge_same


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


programs = load("programs")
CASES = programs.CASES
X, W, STACK = programs.X, programs.W, programs.STACK


def traced(name: str) -> Traced:
    case = CASES[name]
    return trace(case.fn, *case.args, donate_argnums=case.donate)


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops]


def effects(graph: Graph) -> list[Any]:
    return [op.path for op in graph.ops if op.effects]


# Every kind of function


@pytest.mark.parametrize("name", CASES)
def test_graph_is_valid_and_has_what_the_function_does(name: str) -> None:
    graph, case = traced(name).graph, CASES[name]
    verify(graph)
    assert case.ops <= set(names(graph))
    assert tuple(r.kind for r in graph.regions[1:]) == case.regions


@pytest.mark.parametrize("name", CASES)
def test_graph_without_dead_code_is_valid_and_keeps_arguments_and_results(name: str) -> None:
    graph = traced(name).graph
    small = drop_dead(graph)
    verify(small)
    for part in ("inputs", "outputs"):
        before, after = ([g.values[v] for v in getattr(g, part)] for g in (graph, small))
        assert [(v.type, v.name) for v in before] == [(v.type, v.name) for v in after]
    assert [op.path for op in small.ops if op.effects] == [
        op.path for op in graph.ops if op.effects
    ]
    assert {op.path for op in small.ops} <= {op.path for op in graph.ops}
    assert drop_dead(small) == small


@pytest.mark.parametrize("name", CASES)
def test_what_is_done_twice_is_merged_and_said(name: str) -> None:
    graph = traced(name).graph
    merged, same = merge_same(graph)
    small = drop_dead(merged)
    verify(small)
    assert {op.path for op in merged.ops} | set(same) == {op.path for op in graph.ops}
    assert set(same.values()) <= {op.path for op in merged.ops}
    assert not merge_same(merged)[1]
    for part in ("inputs", "outputs"):
        before, after = ([g.values[v].type for v in getattr(g, part)] for g in (graph, small))
        assert before == after


def test_a_cast_for_each_of_three_readers_is_one_cast() -> None:
    """As flax does it: every layer casts its input by itself."""

    def qkv(x: Any, weights: Any) -> Any:
        return [(x * 2).astype(jnp.bfloat16) @ w for w in weights]

    found = trace(qkv, X, [X.T.astype(jnp.bfloat16)] * 3)
    merged, same = merge_same(found.graph)
    names = [op.name for op in drop_dead(merged).ops]
    assert names == ["mul", "convert_element_type", *["dot_general"] * 3]
    assert len(same) == 4


def test_what_a_hint_is_about_is_not_merged() -> None:
    def two(x: Any) -> Any:
        return [autoshard.annotate(x * 2, axis, None) for axis in ("data", "model")]

    merged, same = merge_same(trace(two, X).graph)
    assert [op.name for op in merged.ops] == ["mul", "autoshard_annotate", "autoshard_annotate"]
    assert len(same) == 1


@pytest.mark.parametrize("name", CASES)
def test_arguments_and_results_are_those_of_jit(name: str) -> None:
    case, found = CASES[name], traced(name)
    graph = found.graph
    shapes = jax.tree.leaves(jax.eval_shape(case.fn, *case.args))
    results = [graph.values[v].type for v in graph.outputs]
    assert [(t.shape, t.dtype) for t in results] == [(x.shape, str(x.dtype)) for x in shapes]
    parameters = list(inspect.signature(case.fn).parameters)
    paths = [
        parameters[path[0].idx] + jax.tree_util.keystr(path[1:])
        for path, _ in jax.tree_util.tree_leaves_with_path(case.args)
    ]
    assert [graph.values[v].name for v in graph.inputs] == paths


@pytest.mark.parametrize("name", CASES)
def test_every_operation_says_where_it_was_written(name: str) -> None:
    case, graph = CASES[name], traced(name).graph
    first = inspect.getsourcelines(inspect.unwrap(case.fn))[1]
    last = first + len(inspect.getsource(case.fn).splitlines())
    elsewhere = {"custom_jvp", "custom_vjp"}  # their rules are written above them
    for op in graph.ops:
        found = re.fullmatch(r"programs\.py:(\d+) \(\S+\)", op.source)
        assert found, f"{op.name}: {op.source!r}"
        assert first <= int(found[1]) < last or name in elsewhere, op


@pytest.mark.parametrize("name", CASES)
def test_paths_find_the_equation_that_an_operation_came_from(name: str) -> None:
    found = traced(name)
    for op in found.graph.ops:
        if not op.is_link:
            assert equation(found.jaxpr, op.path).primitive.name == op.name
    paths = [op.path for op in found.graph.ops]
    assert len(set(paths)) == len(paths)


def equation(jaxpr: Any, path: tuple[int | str, ...]) -> Any:
    """The equation at a path, found by another walk than the tracer's."""
    eqn = None
    at = list(path)
    while at:
        key = at.pop(0)
        if isinstance(key, int):
            eqn = open_jaxpr(jaxpr)[0].eqns[key]
            kind = eqn.primitive.name
            for parameter in (INLINED.get(kind), "jaxpr"):
                if parameter in eqn.params:
                    jaxpr = eqn.params[parameter]
            if kind == "custom_linear_solve":
                jaxpr = eqn.params["jaxprs"].solve
        else:
            assert eqn is not None
            jaxpr = {
                "body": lambda p: p["jaxpr"] if "jaxpr" in p else p["body_jaxpr"],
                "cond": lambda p: p["cond_jaxpr"],
                "branch": lambda p: p["branches"][at.pop(0)],
            }[key](eqn.params)
    return eqn


@pytest.mark.parametrize("name", CASES)
def test_same_operations_as_the_jaxpr(name: str) -> None:
    """Links and inlined calls apart, the graph has one operation per equation, bodies included."""
    found = traced(name)
    expected = sorted(eqn.primitive.name for eqn in leaves(found.jaxpr))
    assert sorted(op.name for op in found.graph.ops if not op.is_link) == expected


def leaves(jaxpr: Any) -> Iterator[Any]:
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        kind = eqn.primitive.name
        inner = list(jaxprs_in_params(eqn.params))
        if kind in INLINED:
            yield from leaves(eqn.params[INLINED[kind]])
        elif kind in ("scan", "while", "cond", "remat2", "checkpoint"):
            for body in inner:
                yield from leaves(body)
        elif kind == "custom_linear_solve":
            yield from leaves(eqn.params["jaxprs"].solve)
        else:
            yield eqn


@pytest.mark.parametrize("name", CASES)
def test_the_print_out_reads_back(name: str) -> None:
    graph = drop_dead(traced(name).graph)
    assert str(parse_graph(str(graph))) == str(graph)


@pytest.mark.parametrize("name", ["train_step", "scan_layers", "random_keys", "while_loop"])
def test_shapes_alone_give_the_same_graph_and_tracing_twice_too(name: str) -> None:
    case = CASES[name]
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype), case.args
    )
    assert str(trace(case.fn, *shapes).graph) == str(traced(name).graph)
    assert traced(name).graph == traced(name).graph


# Things to look at one by one


def test_scan_knows_its_trips_and_ties_its_carry() -> None:
    graph = traced("nested_scan").graph
    outer, inner = graph.regions[1:]
    assert (outer.trips, inner.trips, graph.trips(inner.id)) == (2.0, 2.0, 4.0)
    assert len(graph.ties) == 2
    layers = traced("scan_layers").graph
    assert layers.trips(1) == 4.0
    (product,) = [op for op in layers.ops if op.name == "dot_general"]
    assert product.region == 1


def test_branches_share_one_run() -> None:
    graph = traced("switch").graph
    assert [r.trips for r in graph.regions[1:]] == [pytest.approx(1 / 3)] * 3


def test_while_loop_says_that_its_trips_are_unknown() -> None:
    (note,) = traced("while_loop").graph.notes
    assert "unknown trip count" in note
    assert "programs.py:" in note


@pytest.mark.parametrize("name", ["prints", "calls_back", "calls_back_in_order"])
def test_effects_are_kept_and_not_split(name: str) -> None:
    graph = traced(name).graph
    found = [op for op in graph.ops if op.effects]
    assert len(found) == (2 if name == "calls_back_in_order" else 1)
    for op in found:
        assert not any(op.rule.splittable(f) for f in range(len(op.rule.factors)))
        assert any(op.name in note and op.source in note for note in graph.notes)


def test_donation_is_per_leaf() -> None:
    found = trace(CASES["train_step"].fn, *CASES["train_step"].args, donate_argnums=(0,))
    assert found.donated == (True, True, False, False)
    assert found.graph.donated == frozenset(found.graph.inputs[:2])


def test_what_is_returned_untouched_is_the_argument() -> None:
    graph = traced("outputs_that_are_inputs").graph
    first, second, same, unused = graph.inputs
    assert graph.outputs[:3] == (first, same, same)
    assert graph.outputs[4] == first
    assert unused not in graph.outputs
    assert second not in graph.outputs


def test_a_shard_map_demands_its_mesh_and_suggests_its_specs() -> None:
    found = traced("manual")
    assert found.required_mesh == {"data": 4, "model": 2}
    assert {h.dims for h in found.graph.hints} == {
        (("data",), ("model",)),
        (("model",), ()),
        (("data",), ()),
    }
    assert not any(h.hard for h in found.graph.hints)


def test_two_meshes_in_one_function_are_refused_with_a_line() -> None:
    devices = np.array(jax.devices()[:8])
    meshes = [Mesh(devices.reshape(4, 2), ("a", "b")), Mesh(devices, ("a",))]

    def fn(x: Any) -> Any:
        for mesh in meshes:
            x = jax.shard_map(lambda x: x, mesh=mesh, in_specs=P("a"), out_specs=P("a"))(x)
        return x

    with pytest.raises(ValueError, match=r"different meshes.*test_trace\.py:\d+"):
        trace(fn, X)


def test_keyword_and_static_arguments() -> None:
    def fn(x: Any, power: int, *, scale: Any, mode: str = "sum") -> Any:
        y = scale["by"] * x**power
        return y.sum() if mode == "sum" else y

    graph = trace(
        fn, X, 3, scale={"by": W[:8]}, mode="all", static_argnums=1, static_argnames="mode"
    ).graph
    verify(graph)
    assert [graph.values[v].name for v in graph.inputs] == ["x", "scale['by']"]
    assert names(graph) == ["integer_pow", "mul"]


def test_defaults_and_variadic_arguments() -> None:
    def fn(x: Any, *rest: Any, y: Any = 2.0) -> Any:
        return x * y + rest[0] + rest[1]["deep"][0]

    graph = trace(fn, X, X, {"deep": [X]}).graph
    verify(graph)
    paths = [graph.values[v].name for v in graph.inputs]
    assert paths[0] == "x"
    assert paths[1].startswith("rest[0]")
    assert paths[2].endswith("['deep'][0]")


def test_bits_of_narrow_types_and_keys() -> None:
    int4 = jax.ShapeDtypeStruct((8, 6), jnp.int4)
    key = jax.ShapeDtypeStruct((5,), jax.random.key(0).dtype)
    graph = trace(lambda a, k: (a.astype(jnp.int8), k), int4, key).graph
    a, k = (graph.values[v].type for v in graph.inputs)
    assert (a.bits, a.nbytes) == (4, 24)
    assert (k.bits, k.nbytes, str(k)) == (64, 40, "key<fry>[5]")


def test_a_users_own_constraint_is_a_hint_and_its_mesh_is_not_asked_for() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))

    def fn(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P("data"))) + 1

    found = trace(fn, X)
    (hint,) = found.graph.hints
    assert hint.dims == (("data",), ())
    assert re.search(r"test_trace\.py:\d+", hint.origin)
    assert found.required_mesh is None


def test_annotations_of_a_scan_body_are_hints_with_their_line() -> None:
    def fn(x: Any, stack: Any) -> Any:
        def layer(c: Any, w: Any) -> Any:
            return autoshard.annotate(jnp.tanh(c @ w), "data", None), None

        return jax.lax.scan(layer, x, stack)[0]

    (hint,) = trace(fn, X, STACK).graph.hints
    assert (hint.dims, hint.hard) == ((("data",), ()), True)
    assert re.fullmatch(r"test_trace\.py:\d+", hint.origin)


def test_nothing_is_allocated_or_run() -> None:
    huge = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)  # 4 TiB

    def fn(x: Any) -> Any:
        return jnp.tanh(x @ x.T) @ x

    before = len(jax.live_arrays())
    assert trace(fn, huge).graph.values[0].type.nbytes == 1 << 42
    assert len(jax.live_arrays()) == before


def test_what_jit_refuses_comes_through() -> None:
    with pytest.raises(jax.errors.TracerBoolConversionError):
        trace(lambda x: x if x.sum() > 0 else -x, X)


# Models of the libraries


def check_model(fn: Any, *args: Any, paths: str) -> Graph:
    graph = drop_dead(trace(fn, *args).graph)
    verify(graph)
    assert names(graph).count("dot_general") >= 4  # two layers forward, and back
    assert any(paths == graph.values[v].name for v in graph.inputs), [
        graph.values[v].name for v in graph.inputs
    ]
    here = [op for op in graph.ops if op.source.startswith("test_trace.py:")]
    assert len(here) > len(graph.ops) / 2  # not the library's lines: the user's
    assert not [n for n in graph.notes if "no sharding rule" in n]
    return graph


def test_flax_nnx_with_optax() -> None:
    nnx, optax = pytest.importorskip("flax.nnx"), pytest.importorskip("optax")

    class Model(nnx.Module):  # type: ignore[name-defined,misc]
        def __init__(self, rngs: Any) -> None:
            self.first = nnx.Linear(16, 32, rngs=rngs)
            self.norm = nnx.LayerNorm(32, rngs=rngs)
            self.last = nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(self.norm(nnx.relu(self.first(x))))

    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    definition, params = nnx.split(abstract)
    tx = optax.adamw(1e-3)
    opt = jax.eval_shape(tx.init, params)

    def step(params: Any, opt: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean(nnx.merge(definition, params)(x) ** 2)

        grads = jax.grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    graph = drop_dead(trace(step, params, opt, X).graph)
    verify(graph)
    assert names(graph).count("dot_general") == 5
    paths = [graph.values[v].name for v in graph.inputs]
    assert any("first" in p and "kernel" in p for p in paths), paths


def test_flax_linen() -> None:
    linen = pytest.importorskip("flax.linen")

    class Model(linen.Module):  # type: ignore[name-defined,misc]
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(4)(linen.LayerNorm()(linen.relu(linen.Dense(32)(x))))

    model = Model()
    variables = jax.eval_shape(model.init, jax.random.key(0), X)

    def loss(variables: Any, x: Any) -> Any:
        return jnp.mean(model.apply(variables, x) ** 2)

    check_model(jax.grad(loss), variables, X, paths="variables['params']['Dense_0']['kernel']")


def test_equinox() -> None:
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(16, 4, 32, 2, key=jax.random.key(0))
    params, static = equinox.partition(model, equinox.is_array)

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(jax.vmap(equinox.combine(params, static))(x) ** 2)

    check_model(jax.grad(loss), params, X, paths="params.layers[0].weight")


def test_haiku() -> None:
    haiku = pytest.importorskip("haiku")
    net = haiku.transform(lambda x: haiku.nets.MLP([32, 4])(x).sum())
    params = jax.eval_shape(net.init, jax.random.key(0), X)

    def loss(params: Any, key: Any, x: Any) -> Any:
        return net.apply(params, key, x)

    check_model(jax.grad(loss), params, jax.random.key(1), X, paths="params['mlp/~/linear_0']['w']")
