"""A parallelized function is called, looked up, traced and lowered as a jitted one is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import autoshard

X = np.arange(128, dtype=np.float32).reshape(8, 16)
PARAMS = {"w": np.ones((16, 8), np.float32), "b": None, "n": 2.0}


def loss(params: Any, x: Any) -> Any:
    return ((x @ params["w"]) ** 2).mean() * params["n"]


def step(params: Any, batch: Any, *, rate: float) -> Any:
    value, grads = jax.value_and_grad(loss)(params, batch["x"])
    return jax.tree.map(lambda p, g: p - rate * g, params, grads), value


def parallel(fn: Any, **options: Any) -> Any:
    return autoshard.parallelize(fn, cluster="cpu:8", **options)


def same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_a_lowered_program_takes_and_gives_what_the_function_does() -> None:
    made = parallel(step, donate_argnums=0)
    expected = jax.jit(step)(PARAMS, {"x": X}, rate=0.1)
    lowered = made.lower(PARAMS, {"x": X}, rate=0.1)
    compiled = lowered.compile()
    same(compiled(PARAMS, {"x": X}, rate=0.1), expected)
    (params, batch), named = compiled.input_shardings
    assert params["w"].is_equivalent_to(compiled.output_shardings[0]["w"], 2)
    assert [leaf.donated for leaf in jax.tree.leaves(lowered.args_info)] == [
        True,
        True,
        False,
        False,
    ]
    assert batch.keys() == {"x"}
    assert named.keys() == {"rate"}


def test_keyword_arguments_may_be_donated() -> None:
    made = parallel(lambda state, x: (state + x, x), donate_argnums=0)
    state = jax.device_put(X, jax.NamedSharding(jax.make_mesh((8,), ("data",)), P("data")))
    again = made(state=made(state=state, x=1.0)[0], x=1.0)[0]
    np.testing.assert_array_equal(again, X + 2)
    assert made.plan(state=state, x=1.0).data.donated == (0,)


def test_a_method_has_its_plan_and_its_program() -> None:
    class Scale:
        @autoshard.parallelize(cluster="cpu:8", static_argnums=0)
        def times(self, x: Any) -> Any:
            """Twice x."""
            return x * 2

    scale = Scale()
    np.testing.assert_array_equal(scale.times(X), X * 2)
    assert scale.times.plan(X).out_shardings is not None
    same(scale.times.lower(X).compile()(X), X * 2)
    assert Scale.times.__doc__ == "Twice x."
    assert "Scale.times" in repr(Scale.times)


def test_under_a_transformation_it_is_the_function() -> None:
    made = parallel(loss)
    params = {"w": PARAMS["w"], "n": 2.0}
    same(jax.grad(made)(params, X), jax.grad(loss)(params, X))
    same(jax.jit(made)(params, X), loss(params, X))
    same(
        jax.vmap(made, (None, 0))(params, X[:, None]), jax.vmap(loss, (None, 0))(params, X[:, None])
    )
    assert jax.eval_shape(made, params, X).shape == ()
    assert not made._plans


def test_a_plan_of_a_parallelized_function_keeps_its_hints_and_options() -> None:
    def scaled(x: Any, mode: str) -> Any:
        return x * 2 if mode == "double" else x

    made = parallel(scaled, donate_argnums=0, static_argnums=1, hints={"x": P(None, "model")})
    plan = autoshard.plan(made, X, "double", cluster="tpu-v5e:2x2")
    assert plan.in_shardings == (P(None, "model"),)
    assert plan.data.donated == (0,)
    assert autoshard.plan(
        made, X, "double", cluster="cpu:8", hints={"x": P("model")}
    ).in_shardings == (P("model"),)
    read = autoshard.Plan.from_json(plan.to_json(), made, X, "double")
    same(read.compile()(X), X * 2)


def test_static_arguments_by_place_or_by_name() -> None:
    def scaled(x: Any, mode: Any) -> Any:
        return x * (2 if mode == "double" else 7 if mode is True else 3)

    for options in ({"static_argnums": 1}, {"static_argnums": -1}, {"static_argnames": "mode"}):
        made = parallel(scaled, **options)
        same(made(X, "double"), X * 2)
        same(made(X, 1), X * 3)
        same(made(X, True), X * 7)
    same(parallel(scaled, static_argnums=1)(X, mode="double"), X * 2)
    same(parallel(scaled, static_argnames="mode")(X, mode="double"), X * 2)


def test_static_arguments_of_a_function_of_any_number() -> None:
    made = parallel(lambda *args: args[0] * args[-1], static_argnums=-1)
    same(made(X, X, 3), X * 3)


def test_options_that_can_not_be() -> None:
    with pytest.raises(
        ValueError, match=r"static argument mode is list \[2\], which can not be hash"
    ):
        parallel(lambda x, mode: x * mode[0], static_argnums=1)(X, [2])
    with pytest.raises(TypeError, match="parallelize takes a function, not int 3"):
        parallel(3)
    for donated in ("0", 1.0, (0, "1")):
        with pytest.raises(
            TypeError, match=r"donate_argnums is .*; give the number of an argument"
        ):
            parallel(loss, donate_argnums=donated)(PARAMS, X)


def test_forms_that_jit_does_not_distinguish_are_planned_once() -> None:
    made = parallel(lambda x: jnp.sin(x))
    for x in (X, X.astype(np.float64), jnp.asarray(X)):
        made(x)
    assert len(made._plans) == 1


@pytest.mark.parametrize("explicit", [True, False])
def test_where_arguments_lie_and_which_mesh_is_set_does_not_matter(explicit: bool) -> None:
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("q",), axis_types=(kind,))
    x = jax.device_put(X, jax.NamedSharding(mesh, P("q")))
    made = parallel(lambda x: x @ x.T)  # under explicit axes jax would refuse it
    np.testing.assert_allclose(made(x), X @ X.T)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(parallel(lambda x: x @ x.T)(X), X @ X.T)
