"""A train step over stages, as one program for all devices, gives the numbers of the step as it is.

The oracle is the function itself, run by jax.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from jax.experimental import topologies

from autoshard.in_stages import Staged, in_stages
from autoshard.spmd_pipeline import NoSpmdPipeline, SpmdPipeline, why_not
from autoshard.spmd_rows import from_rows, rows_of, spread, to_rows
from passes.pipeline import both_ways, generators, offload, vee
from passes.pipeline.schedule import Schedule, there_and_back

pytestmark = pytest.mark.usefixtures("in_a_hurry")

Job = tuple[Callable[..., Any], Any]


def gpt() -> Job:
    return zoo.gpt(width=8, layers=2, heads=2, sequence=4, batch=16, vocab=16)


def gpt_scan() -> Job:
    return zoo.gpt(width=8, layers=4, heads=2, sequence=4, batch=16, vocab=16, scan=True)


def skips() -> Job:
    """What each half of the layers makes is read by all of the other half; with dropout.

    The error of each row of the batch is a result, and one that is the same for all of them.
    """
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9))
    params = {"down": [shape(8, 8)] * 4, "up": [shape(8, 8)] * 4, "scale": shape(8)}

    def loss(params: Any, batch: Any, key: Any) -> Any:
        x, seen = batch["x"], []
        for k, w in enumerate(params["down"]):
            x = jnp.tanh(x @ w) * jax.random.bernoulli(jax.random.fold_in(key, k), 0.8, x.shape)
            seen.append(x)
        for w in params["up"]:
            x = jnp.tanh(x @ w) + sum(seen) * params["scale"]
        errors = jnp.mean((x - batch["y"]) ** 2, 1)
        return jnp.mean(errors), (errors, jnp.sum(params["scale"]))

    def train_step(state: Any, batch: Any, key: Any) -> Any:
        params, opt = state
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value, aux

    batch = {"x": shape(16, 8), "y": shape(16, 8)}
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return train_step, ((params, jax.eval_shape(tx.init, params)), batch, key)


def shape(*sizes: int) -> Any:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


MODELS: dict[str, Callable[[], Job]] = {f.__name__: f for f in (gpt, gpt_scan, skips)}
SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": generators.gpipe,
    "1f1b": generators.one_f_one_b,
    "interleaved": partial(generators.interleaved, chunks=2),
    "zb_h1": generators.zb_h1,
    "zb_h2": generators.zb_h2,
    "zb_v": vee.zb_v,
}


@cache
def case(name: str, count: int, microbatches: int = 8) -> tuple[Staged, list[Any], list[Any]]:
    """A model in microbatches and so many stages, its arguments and its results."""
    fn, shapes = MODELS[name]()
    args = zoo.filled(shapes)
    staged = in_stages(fn, args, {}, {}, microbatches=microbatches, count=count)
    return staged, jax.tree.leaves(args), jax.tree.leaves(jax.jit(fn)(*args))


def mesh_of(stages: int, data: int = 1) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: stages * data]).reshape(stages, data)
    return jax.sharding.Mesh(devices, ("stage", "data"))


def pipeline(staged: Staged, schedule: Schedule, mesh: jax.sharding.Mesh) -> SpmdPipeline:
    return SpmdPipeline(staged.traced, staged.loop, staged.stages, schedule, mesh)


def check(name: str, schedule: Schedule, data: int = 1) -> tuple[SpmdPipeline, str]:
    """The pipeline, and its compiled program as text."""
    staged, flat, want = case(name, schedule.pieces, schedule.microbatches * data)
    run = pipeline(staged, schedule, mesh_of(schedule.devices, data))
    program = jax.jit(run, in_shardings=run.shardings).lower(*flat).compile()
    got = program(*[jax.device_put(x, s) for x, s in zip(flat, run.shardings, strict=True)])
    for x, y in zip(got, want, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(a - b).max(initial=0) < 1e-4 * (1e-3 + np.abs(b).max(initial=0))
    return run, program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stages", "data"),
    [
        ("gpipe", 2, 1),
        ("1f1b", 2, 2),
        ("interleaved", 2, 1),
        ("zb_h1", 4, 1),
        ("zb_h2", 4, 2),
        ("zb_v", 2, 1),
    ],
)
def test_every_schedule_gives_the_numbers(name: str, stages: int, data: int) -> None:
    check("skips", SCHEDULES[name](stages, 4), data)


def copied_in_loops(text: str) -> set[str]:
    """Shapes that a program copies outside its entry, and not to compute with them at once."""
    parts = re.split(r"\n(?=\S.*\{\n)", text)
    loops = [x for x in parts if not x.startswith(("ENTRY", "%fused", "%wrapped"))]
    return {x for part in loops for x in re.findall(r"= \w+\[(\S+?)\]\{\S* copy\(", part)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "schedule", "stages", "data"),
    [
        ("gpt", "1f1b", 2, 1),
        ("gpt_scan", "zb_h1", 4, 2),
    ],
)
def test_every_model_gives_the_numbers(model: str, schedule: str, stages: int, data: int) -> None:
    run, text = check(model, SCHEDULES[schedule](stages, 8), data)
    layout = run.layout
    # One value down and one up in a tick: what is only laid out is not sent.
    assert len(layout.tables.links) <= 2
    # Buffers and sums are changed where they lie, and not copied in any tick.
    large = [(many, *form[0]) for form, many in layout.tables.slots.items() if many > 4]
    large += [form[0] for _, form in layout.results.count if len(form[0]) == 2]
    assert large
    assert not {",".join(map(str, each)) for each in large} & copied_in_loops(text)
    if stages == 4:
        # The stages in the middle are alike: one F, one B and one W for both of them.
        assert len(layout.tables.keys) == 11
        assert len(run.branches.programs) == 8
        # And so hardly more lies on a device than it needs.
        assert layout.buffer_bytes < 1.01 * max(layout.buffer_bytes_needed)


@pytest.mark.slow
@pytest.mark.libtpu
def test_a_tpu_lays_no_buffer_anew() -> None:
    """All tasks take its values in one order of dims; else XLA copies it for each of them."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = jax.sharding.Mesh(np.array(topology.devices[:2]), ("stage",))
    fn, shapes = zoo.gpt(width=256, layers=2, heads=2, sequence=256, batch=16, vocab=256, scan=True)
    staged = in_stages(fn, shapes, {}, {}, microbatches=8, count=2)
    run = pipeline(staged, generators.gpipe(2, 8), mesh)
    flat = jax.tree.leaves(shapes)
    text = jax.jit(run, in_shardings=run.shardings).lower(*flat).compile().as_text()
    buffers = {",".join(map(str, (n, *form[0]))) for form, n in run.layout.tables.slots.items()}
    assert "79,1,2,256,256" in buffers
    assert not buffers & set(re.findall(r"= \w+\[(\S+?)\]\{\S* copy\(", text))


def test_weights_lie_on_their_stages_and_come_back() -> None:
    """Each device has its own pieces' values, and from there all of them come back."""
    mesh, way = mesh_of(4), there_and_back(4)
    values = {p: np.full((4, 3) if p % 3 else (5,), p, np.float32) for p in range(12)}
    own = [[p for p in values if p % 8 == piece] for piece in range(8)]
    rows = rows_of(way, own, lambda p: (values[p].shape, "float32"))
    arrays = jax.jit(lambda: to_rows(rows, mesh, "stage", lambda p: jnp.asarray(values[p])))()
    for piece, each in enumerate(own):
        for p in each:
            form, device, row = rows.row(piece, p)
            assert device == way[piece].device
            array = arrays[list(rows.count).index(form)]
            (shard,) = (s for s in array.addressable_shards if s.index[0].start == device)
            assert shard.data.shape[0] == 1
            np.testing.assert_array_equal(shard.data[0, row], values[p])
    back = jax.jit(lambda: from_rows(rows, mesh, "stage", arrays))()
    for p, x in values.items():
        np.testing.assert_array_equal(back[p], x)


def test_arguments_are_split_evenly_where_they_can_be() -> None:
    mesh = mesh_of(4)
    assert spread((8, 12), mesh, "stage") == jax.P(None, "stage")
    assert spread((8, 6), mesh, "stage") == jax.P("stage")
    assert spread((3, 5), mesh, "stage") == spread((), mesh, "stage") == jax.P()
    assert spread((8, 8, 4), mesh, "stage", before=2) == jax.P(None, None, "stage")


def test_what_can_not_run_as_one_program_says_why() -> None:
    staged, _, _ = case("skips", 4)

    def why(schedule: Schedule, mesh: jax.sharding.Mesh) -> str:
        return why_not(schedule, staged.stages, staged.loop, mesh)

    assert why(generators.zb_h1(4, 8), mesh_of(4)) == ""
    assert "both ways" in why(both_ways.dualpipe(4, 8), mesh_of(4))
    assert "to the host" in why(offload.pipe_offload(2, 8), mesh_of(2))
    assert "has 8 stages, and the function is cut into 4" in why(vee.zb_v(4, 8), mesh_of(4))
    assert "has 4 devices, and the mesh 2 along stage" in why(generators.gpipe(4, 8), mesh_of(2))
    assert "cut it into 16" in why(generators.gpipe(4, 16), mesh_of(4))
    along = "8 microbatches for each of 2 devices along data, and the batch is cut into 8; cut it"
    assert along in why(generators.gpipe(4, 8), mesh_of(4, 2))
    other = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("model",))
    assert "need a mesh axis called 'stage'" in why(generators.gpipe(4, 8), other)
    with pytest.raises(NoSpmdPipeline, match="both ways"):
        pipeline(staged, both_ways.dualpipe(4, 8), mesh_of(4))


def test_typed_keys_of_each_microbatch_are_refused() -> None:
    def step(weights: Any, x: Any, seeds: Any) -> Any:
        def one(weights: Any, x: Any, key: Any) -> Any:
            for w in weights:
                key, now = jax.random.split(key)
                x = jnp.tanh(x @ w) * jax.random.bernoulli(now, 0.9, x.shape)
            return jnp.sum(x)

        def loss(weights: Any) -> Any:
            keys = jax.random.wrap_key_data(seeds)
            return jnp.mean(jax.vmap(one, (None, 0, 0))(weights, x, keys))

        return jax.value_and_grad(loss)(weights)

    args = [shape(8, 8)] * 4, shape(16, 8), jax.ShapeDtypeStruct((16, 2), jnp.uint32)
    staged = in_stages(step, args, {}, {}, microbatches=8, count=2)
    with pytest.raises(NoSpmdPipeline, match=r"step makes random keys of each microbatch"):
        pipeline(staged, generators.gpipe(2, 8), mesh_of(2))
