"""The same function, shapes, cluster and options give the same plan, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Plans with dictionaries, sets of ties and hints, donation, a search over meshes, and a loop.
SCRIPT = """
import hashlib, sys
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import autoshard

def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)

def step(state, batch):
    def loss(params):
        def layer(x, w):
            return jnp.tanh(x @ w["in"]) @ w["out"], x.mean()
        x, seen = jax.lax.scan(layer, params["table"][batch["ids"]], params["layers"])
        return jnp.mean((x - batch["y"]) ** 2) + seen.sum()
    value, grads = jax.value_and_grad(loss)(state["params"])
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], momentum)
    return {"params": params, "momentum": momentum}, value

params = {
    "table": shape(1024, 256),
    "layers": {"in": shape(3, 256, 512), "out": shape(3, 512, 256)},
}
args = {"params": params, "momentum": params}, {
    "ids": shape(64, dtype=jnp.int32), "y": shape(64, 256)}

def unrolled(state, x):
    def loss(params):
        y = x
        for w in params:
            z = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
            y = y + jax.nn.silu(z @ w["up"]) @ w["down"]
        return jnp.mean(y * y)
    grads = jax.grad(loss)(state["params"])
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], momentum)
    return {"params": params, "momentum": momentum}

layers = [{"up": shape(256, 1024), "down": shape(1024, 256)}] * 60

def plans():
    many = autoshard.plan(unrolled, {"params": layers, "momentum": layers}, shape(64, 256),
                          cluster="h100:16", donate_argnums=0)
    assert any("repeat others" in note for note in many.data.notes)
    yield many
    yield autoshard.plan(step, *args, cluster="h100:8", donate_argnums=0)
    yield autoshard.plan(step, *args, cluster="cpu:8", hints={"batch/*": P("data")},
                         mesh={"data": 4, "model": 2}, memory_limit="8MiB")
    for solver in ("propagate", "fsdp+tp"):
        yield autoshard.plan(step, *args, cluster="tpu-v5e:2x4", solver=solver)

for _ in range(int(sys.argv[1])):
    for plan in plans():
        print(hashlib.sha256(plan.to_json().encode()).hexdigest())
"""


def hashes(seed: str, runs: int) -> list[str]:
    """Of the plans of a process that makes all of them so many times."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(runs)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_two_processes_with_different_hash_seeds_and_two_runs_in_one_of_them() -> None:
    first = hashes("1", runs=1)
    assert len(set(first)) == 5
    assert hashes("2", runs=2) == first * 2
