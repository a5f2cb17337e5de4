"""An annotation changes nothing but what the planner is told, under every jax transformation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from autoshard.annotation import OPEN, annotate
from autoshard.jax_compat import open_jaxpr
from passes.hints import HintError

X = np.arange(24, dtype=np.float32).reshape(4, 6)


def found(jaxpr: Any) -> Iterator[tuple[Any, int, bool, int]]:
    """(spec, priority, hard, rank) of every annotation in a jaxpr, bodies included."""
    inner, _ = open_jaxpr(jaxpr)
    for eqn in inner.eqns:
        if eqn.primitive.name == "autoshard_annotate":
            p = eqn.params
            yield p["spec"], p["priority"], p["hard"], len(eqn.invars[0].aval.shape)
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                    yield from found(part)


def annotations(fn: Callable[..., Any], *args: Any) -> list[tuple[Any, int, bool, int]]:
    return list(found(jax.make_jaxpr(fn)(*args)))


@pytest.mark.parametrize(
    ("spec", "dims"),
    [
        (("data", None), (("data",), ())),
        ((("data", "model"), OPEN), (("data", "model"), None)),
        ((...,), (None, None)),
        (("data", ...), (("data",), None)),
        ((..., "data"), (None, ("data",))),
        (("data", None, ...), (("data",), ())),
        ((P("data"),), (("data",), ())),
        ((P(None, ("a", "b")),), ((), ("a", "b"))),
        ((P("a", P.UNCONSTRAINED),), (("a",), None)),
    ],
)
def test_what_a_spec_means(spec: tuple[Any, ...], dims: Any) -> None:
    assert annotations(lambda x: annotate(x, *spec), X) == [(dims, 0, True, 2)]


def test_priority_and_softness_are_kept() -> None:
    got = annotations(lambda x: annotate(x, "a", None, priority=2, soft=True), X)
    assert got == [((("a",), ()), 2, False, 2)]


def test_outside_of_jit_nothing_happens() -> None:
    assert annotate(X, "data", None) is X
    assert annotate(2.0) == 2.0
    assert annotate(jnp.asarray(X), "data", None).shape == X.shape


def test_the_compiled_program_does_not_know_of_it() -> None:
    def plain(x: Any) -> Any:
        return jnp.sin(x) * 2

    def marked(x: Any) -> Any:
        return annotate(jnp.sin(annotate(x, "data", None)), ...) * 2

    texts = [jax.jit(f).lower(X).as_text() for f in (plain, marked)]
    assert texts[0].replace("plain", "marked") == texts[1]


def test_grad_annotates_the_cotangent_softly() -> None:
    def loss(x: Any) -> Any:
        return jnp.sum(annotate(x, "data", None, priority=1) ** 2)

    assert annotations(jax.grad(loss), X) == [
        ((("data",), ()), 1, True, 2),
        ((("data",), ()), 1, False, 2),
    ]
    np.testing.assert_array_equal(jax.grad(loss)(X), 2 * X)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(X), 2 * X)


def test_second_derivatives_and_forward_mode() -> None:
    def f(x: Any) -> Any:
        return annotate(x, "data") ** 3

    v = np.arange(3.0, dtype=np.float32)
    out, tangent = jax.jvp(f, (v,), (np.ones_like(v),))
    np.testing.assert_allclose(out, v**3)
    np.testing.assert_allclose(tangent, 3 * v**2)
    np.testing.assert_allclose(jax.hessian(lambda x: f(x).sum())(v), np.diag(6 * v), atol=1e-6)
    assert [hard for *_, hard, _ in annotations(lambda x: jax.jvp(f, (x,), (x,)), v)] == [
        True,
        False,
    ]


def test_integers_and_unused_results_have_no_gradient() -> None:
    def f(x: Any, n: Any) -> Any:
        annotate(x, "data", None)
        return jnp.sum(x) * annotate(n)

    np.testing.assert_array_equal(jax.grad(f)(X, 3), np.full_like(X, 3))


@pytest.mark.parametrize(
    ("axis", "dims"),
    [
        (0, (None, ("data",), ())),
        (1, (("data",), None, ())),
        (2, (("data",), (), None)),
        (-1, (("data",), (), None)),
    ],
)
def test_vmap_leaves_the_new_dim_open(axis: int, dims: Any) -> None:
    x = np.zeros((3, 3, 3), np.float32)
    mapped = jax.vmap(lambda x: annotate(x, "data", None), in_axes=axis, out_axes=axis)
    assert annotations(mapped, x) == [(dims, 0, True, 3)]
    assert mapped(x).shape == x.shape


def test_scan_and_remat_and_vmap_of_grad() -> None:
    def loss(w: Any, x: Any) -> Any:
        def body(c: Any, _: Any) -> Any:
            step = jax.checkpoint(lambda c: annotate(jnp.tanh(c @ w), "data", "model"))
            return step(c), None

        return jnp.sum(jax.lax.scan(body, x, length=3)[0])

    def bare(w: Any, x: Any) -> Any:
        for _ in range(3):
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    w = np.eye(6, dtype=np.float32) / 2
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(w, X), jax.grad(bare)(w, X), rtol=1e-4, atol=1e-6
    )
    assert {hard for *_, hard, _ in annotations(jax.grad(loss), w, X)} == {True, False}
    many = jax.vmap(jax.grad(loss), in_axes=(None, 0))(w, np.stack([X, X]))
    assert many.shape == (2, 6, 6)
    assert {rank for *_, rank in annotations(jax.vmap(loss, (None, 0)), w, np.stack([X, X]))} == {3}


def test_eval_shape_and_cond_and_shard_map() -> None:
    def f(x: Any) -> Any:
        return jax.lax.cond(x.sum() > 0, lambda x: annotate(x, "data", None), lambda x: -x, x)

    assert jax.eval_shape(f, X).shape == X.shape
    np.testing.assert_array_equal(jax.jit(f)(X), X)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    np.testing.assert_array_equal(jax.jit(mapped)(X), X)


def test_a_pytree_gets_the_spec_on_every_array() -> None:
    tree = {"a": X, "b": [X + 1, None]}
    got = annotations(lambda t: annotate(t, "data", None), tree)
    assert got == [((("data",), ()), 0, True, 2)] * 2
    assert annotate(tree, "data", None)["b"][1] is None


def line_of(text: str) -> int:
    """The line of this file that holds the text first."""
    with open(__file__) as file:
        return next(n for n, line in enumerate(file, 1) if text in line)


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (("data",), {}, "1 entry for 2 dims"),
        (("data", None, None), {}, "3 entries for 2 dims"),
        (("data", "data"), {}, "'data' is given twice"),
        ((3, None), {}, "3 is no axis"),
        ((P("a", "b", "c"),), {}, "3 entries for 2 dims"),
        (("data", None), {"priority": -1}, "priority is -1"),
        (("data", None), {"priority": 0.5}, "priority is 0.5"),
        (("data", None), {"priority": True}, "priority is True"),
    ],
)
def test_errors_name_the_users_line(spec: Any, options: Any, said: str) -> None:
    with pytest.raises(HintError, match=re.escape(said)) as error:
        jax.eval_shape(lambda x: annotate(x, *spec, **options), X)  # the line that errors name
    line = line_of("# the line that errors name")
    assert str(error.value).startswith(f"test_annotate.py:{line}: ")


def test_an_error_in_a_pytree_names_the_leaf() -> None:
    with pytest.raises(HintError, match=re.escape("annotate on ['b'], shape (6,): 2 entries for")):
        annotate({"a": X, "b": X[0]}, "data", None)
    with pytest.raises(HintError, match="str is no array"):
        annotate({"a": "text"}, "data")


def test_the_origin_is_the_users_line() -> None:
    inner, _ = open_jaxpr(jax.make_jaxpr(lambda x: annotate(x, ...))(X))  # the origin
    assert inner.eqns[0].params["origin"] == f"test_annotate.py:{line_of('# the origin')}"
