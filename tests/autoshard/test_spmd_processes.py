"""Two processes with two stages each are one pipeline: the numbers of the step as it is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 120

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]), initialization_timeout=60)

import jax.numpy as jnp
import numpy as np
import autoshard
from autoshard.in_stages import in_stages
from autoshard.spmd_pipeline import SpmdPipeline
from passes.pipeline import generators

def step(params, batch):
    def loss(params):
        def layer(x, w):
            return jnp.tanh(x @ w), None
        x, _ = jax.lax.scan(layer, batch["x"], params["layers"])
        return jnp.mean((x @ params["out"] - batch["y"]) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda p, g: p - g / norm, params, grads), value

rng = np.random.default_rng(0)
def numbers(*shape):
    return rng.uniform(-0.5, 0.5, shape).astype(np.float32)

params = {"layers": numbers(8, 8, 8), "out": numbers(8, 4)}
batch = {"x": numbers(16, 8), "y": numbers(16, 4)}
staged = in_stages(step, (params, batch), {}, {}, microbatches=8, count=4)
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("stage", "data"))
run = SpmdPipeline(staged.traced, staged.loop, staged.stages, generators.zb_h1(4, 4), mesh)
flat = jax.tree.leaves((params, batch))
placed = [jax.device_put(x, s) for x, s in zip(flat, run.shardings)]
program = jax.jit(run, out_shardings=jax.NamedSharding(mesh, jax.P()))
for _ in range(2):
    got = [np.asarray(x.addressable_data(0)) for x in program(*placed)]
want = [np.asarray(x) for x in jax.tree.leaves(jax.jit(step)(params, batch))]

plan = autoshard.plan(step, params, batch, cluster="cpu:8", stages=4, microbatches=4,
                      mesh={"stage": 4, "data": 2}, schedule="ZB-H1")
whole = jax.jit(lambda *xs: xs, out_shardings=jax.NamedSharding(mesh, jax.P()))
planned = whole(*jax.tree.leaves(plan.compile()(params, batch)))
planned = [np.asarray(x.addressable_data(0)) for x in planned]
print(json.dumps({
    "planned": max(float(np.abs(a - b).max()) for a, b in zip(planned, want, strict=True)),
    "lowering": plan.lowering,
    "here": [jax.local_device_count(), jax.device_count()],
    "stages": sorted({int(mesh.devices.tolist().index(row)) for row in mesh.devices.tolist()
                      if row[0].process_index == jax.process_index()}),
    "worst": max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True)),
    "loss": float(got[-1]),
    "moved": float(max(np.abs(a - b).max() for a, b in zip(got, flat))),
}))
"""


def run_twice() -> list[dict]:  # type: ignore[type-arg]
    """What each of the two processes says; none of them lives on after this."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    env.pop("XLA_FLAGS", None)  # the eight devices of the test process are not theirs
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), address],
            env={**env, "PYTHONHASHSEED": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
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


@pytest.mark.slow
def test_two_processes_with_two_stages_each() -> None:
    first, second = run_twice()
    assert first["here"] == second["here"] == [4, 8]
    assert (first["stages"], second["stages"]) == ([0, 1], [2, 3])
    assert first["loss"] == second["loss"]
    assert max(first["worst"], second["worst"]) < 1e-6
    assert first["moved"] > 0.01
    assert max(first["planned"], second["planned"]) < 1e-6
    assert first["lowering"].startswith("one program for all devices")
