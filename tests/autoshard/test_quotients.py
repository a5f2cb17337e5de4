"""Weights of an attention lie there where XLA:TPU sends what is made of them by an all-to-all."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from passes.answer import read_back
from passes.held import held

PLACES, WIDTH = 16384, 128
BF16 = jnp.bfloat16


def planned(cluster: str, heads: int = 4) -> autoshard.Plan:
    """Each device mixes for its own heads; what comes then, for its own places."""

    def loss(ws: Any, x: Any) -> Any:
        q, k, v = ((x @ w).reshape(1, PLACES, heads, WIDTH) for w in ws[:3])
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / 11).astype(BF16)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        mixed = autoshard.annotate(mixed, None, None, "x", None)
        rows = mixed.reshape(1, PLACES, heads * WIDTH)
        rows = autoshard.annotate(rows, None, "x", None)
        return jnp.square((rows @ ws[3]).astype(jnp.float32)).mean()

    def step(ws: Any, x: Any) -> Any:
        return jax.value_and_grad(loss, (0, 1))(ws, x)

    w = jax.ShapeDtypeStruct((heads * WIDTH, heads * WIDTH), BF16)
    x = jax.ShapeDtypeStruct((1, PLACES, heads * WIDTH), BF16)
    hints = {f"ws[{n}]": jax.P(None, "x") for n in range(3)} | {"ws[3]": jax.P(), "x": jax.P()}
    return autoshard.plan(step, [w] * 4, x, cluster=cluster, mesh={"x": 4}, hints=hints)


def weights_lie_there(plan: autoshard.Plan) -> bool:
    found = plan._search()
    assert found is not None
    graph = found.priced.graph
    (weights,) = found.priced.fusion.quotients
    assert graph.values[weights].shape[2:] == (PLACES, PLACES)
    answer = read_back(found.priced, found.solution.choice)
    lying = held(found.priced, answer.values, answer.changes)
    return any(h.value == weights and not h.copy for h in lying)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"cluster": "tpu-v6e:2x2"}, True),
        ({"cluster": "tpu-v6e:2x2", "heads": 8}, False),
        ({"cluster": "tpu-v5e:2x2"}, False),
    ],
)
def test_weights_lie_there_where_what_is_made_of_them_is_exchanged(how: Any, kept: bool) -> None:
    assert weights_lie_there(planned(**how)) == kept


@pytest.mark.libtpu
def test_the_compiler_keeps_them_then_too() -> None:
    from autoshard.targets import target_devices

    plan = planned("tpu-v6e:2x2")
    devices = target_devices(autoshard.cluster("tpu-v6e:2x2"))
    text = plan.lower(devices).compile(compiler_options=dict(plan.compiler_options)).as_text()
    assert text is not None
    entry = text[text.index("\nENTRY") :]
    made = [line for line in entry.splitlines() if " fusion(" in line]
    assert sum(" = bf16[16384,16384]" in line for line in made) == 1
