"""Two processes with four devices each: one plan, one program, the numbers of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
SECONDS = 120

SCRIPT = """
import hashlib, json, sys
import numpy as np
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P

rank, count, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8 // count)
jax.config.update("jax_disable_most_optimizations", True)
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, rank, initialization_timeout=60)
assert len(jax.devices()) == 8, jax.devices()

import autoshard
from jax.experimental import multihost_utils

def step(params, batch):
    def loss(params):
        def layer(x, w):
            return jnp.tanh(x @ w), None
        x, _ = jax.lax.scan(layer, batch["x"], params["layers"])
        return jnp.mean((x @ params["out"] - batch["y"]) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value

rng = np.random.default_rng(0)
def numbers(*shape):
    return rng.uniform(-0.5, 0.5, shape).astype(np.float32)

params = {"layers": numbers(2, 16, 16), "out": numbers(16, 8)}
batch = {"x": numbers(32, 16), "y": numbers(32, 8)}
plan = autoshard.plan(
    step, params, batch, cluster="cpu:8", mesh={"data": 4, "model": 2}, donate_argnums=0,
    hints={"batch/*": P("data"), "params/layers": P(None, None, "model"), "params/out": P("data")},
)
call = plan.compile()
params = plan.place(params, batch)[0]
losses = []
for _ in range(3):
    params, loss = call(params, batch)
    losses.append(float(loss))
whole = params
if count > 1:
    whole = multihost_utils.process_allgather(params, tiled=True)
print(json.dumps({
    "plan": hashlib.sha256(plan.to_json().encode()).hexdigest(),
    "here": len(jax.local_devices()),
    "losses": losses,
    "sums": [float(np.abs(np.asarray(x)).sum()) for x in jax.tree.leaves(whole)],
}))
"""


def run(count: int) -> list[dict]:  # type: ignore[type-arg]
    """What each of `count` processes says; none of them lives on after this."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    env.pop("XLA_FLAGS", None)  # the eight devices of the test process are not theirs
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(count), address],
            env={**env, "PYTHONHASHSEED": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        told = [child.communicate(timeout=SECONDS) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, (_, err) in zip(children, told, strict=True):
        assert child.returncode == 0, err
    return [json.loads(out.splitlines()[-1]) for out, _ in told]


def test_two_processes_plan_alike_and_compute_as_one() -> None:
    (alone,) = run(1)
    first, second = run(2)
    assert (alone["here"], first["here"], second["here"]) == (8, 4, 4)
    assert first["plan"] == second["plan"] == alone["plan"]
    assert first["losses"] == second["losses"]
    assert first["sums"] == second["sums"]
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(first["sums"], alone["sums"], rtol=1e-5)
    assert alone["losses"][2] < alone["losses"][0]
