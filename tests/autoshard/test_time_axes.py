"""Time axes: recurrent nets, models of libraries, plans, and what may be asked for and what not.

That any dim of any program may be split is for test_time_axes_random.py, and that microbatches are
right for test_microbatches.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from same_results import example
from time_programs import cut, near, numbers

import autoshard
from autoshard import cli
from autoshard.trace import trace
from passes.hints import HintError
from passes.ir.plan import TimeAxis
from passes.microbatch_loop import NoTimeLoop

pytestmark = pytest.mark.usefixtures("in_a_hurry")

typer_testing = pytest.importorskip("typer.testing")
PAGE = Path(__file__).parents[2] / "docs" / "microbatches.md"


# Models


def step_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    def train_step(params: Any, x: Any, y: Any = None) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x, y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    return train_step


def gates(kind: str) -> tuple[Callable[..., Any], Any]:
    """A train step of an LSTM or a GRU over time-first arrays, and its arguments."""
    n = 8
    params = {"x": numbers(4, 4 * n), "h": numbers(n, 4 * n), "out": numbers(n, 3)}

    def lstm(params: Any, state: Any, x: Any) -> Any:
        h, c = state
        i, f, o, g = jnp.split(x @ params["x"] + h @ params["h"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def gru(params: Any, state: Any, x: Any) -> Any:
        h, unused = state
        z, r, a, _ = jnp.split(x @ params["x"], 4, -1)
        u, v, b, _ = jnp.split(h @ params["h"], 4, -1)
        z, r = jax.nn.sigmoid(z + u), jax.nn.sigmoid(r + v)
        h = (1 - z) * h + z * jnp.tanh(a + r * b)
        return (h, unused), h

    def loss(params: Any, x: Any, y: Any) -> Any:
        cell = lstm if kind == "lstm" else gru
        start = (jnp.zeros((x.shape[1], n)),) * 2
        _, hs = lax.scan(lambda s, x: cell(params, s, x), start, x)
        scores = jax.nn.log_softmax(hs @ params["out"])
        return -jnp.take_along_axis(scores, y[..., None], -1).mean()

    return step_of(loss), (params, numbers(5, 8, 4), jnp.arange(5 * 8).reshape(5, 8) % 3)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_nets_over_time_first_arrays(kind: str) -> None:
    """The time of the data, dim 0, is scanned along; the batch is dim 1, and all runs in steps."""
    fn, args = gates(kind)
    made, said = cut(fn, args, TimeAxis("micro", 4, ((3, 1),)))
    assert near(jax.jit(made)(*args), jax.jit(fn)(*args))
    assert re.search("dim 1 of x, y: (99|100)% of the FLOPs", said)
    with pytest.raises(NoTimeLoop, match=r"over dim 0 of x: scan at test_time_axes.py:\d+ "):
        cut(fn, args, TimeAxis("micro", 5, ((3, 0),)))


def test_an_equinox_model_with_the_batch_on_dim_1(monkeypatch: pytest.MonkeyPatch) -> None:
    step, (state, (images, labels)) = example("03_equinox_vision_transformer.py", monkeypatch)

    def fn(state: Any, images: Any, labels: Any) -> Any:
        return step(state, (jnp.swapaxes(images, 0, 1), labels))

    args = (state, jnp.swapaxes(images, 0, 1), labels)
    place = len(jax.tree.leaves(state))
    made, said = cut(fn, args, TimeAxis("micro", 4, ((place, 1),)))
    assert near(jax.jit(made)(*args), jax.jit(fn)(*args), 2e-3)
    assert "dim 0 of labels and dim 1 of images" in said
    assert re.search("(9.|100)% of the FLOPs", said)


def test_a_haiku_model_with_the_batch_on_dim_1(monkeypatch: pytest.MonkeyPatch) -> None:
    step, (state, text) = example("07_haiku_lstm.py", monkeypatch)

    def fn(state: Any, text: Any) -> Any:
        return step(state, text.T)

    args = (state, jnp.asarray(text).T)
    made, said = cut(fn, args, TimeAxis("micro", 4, ((len(jax.tree.leaves(state)), 1),)))
    assert near(jax.jit(made)(*args), jax.jit(fn)(*args), 2e-3)
    assert "over dim 1 of text" in said
    assert re.search("(9.|100)% of the FLOPs", said)


def test_models_of_an_ensemble_one_after_another() -> None:
    """Stacked weights are split over time as all else: results are put together again."""
    params = {"a": numbers(4, 6, 16), "b": numbers(4, 16, 6)}

    def loss(params: Any, x: Any, _: Any) -> Any:
        return jax.vmap(lambda p: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - x) ** 2))(params).sum()

    fn, args = step_of(loss), (params, numbers(8, 6))
    made, said = cut(fn, args, TimeAxis("member", 4, ((0, 0), (1, 0))))
    assert near(jax.jit(made)(*args), jax.jit(fn)(*args))
    assert said == "member=4 runs over dim 0 of params/a, params/b: 100% of the FLOPs run in steps"
    shapes = {v.shape for v in trace(made, *args).graph.values}
    assert (1, 8, 16) in shapes
    assert (4, 8, 16) not in shapes


def test_rows_of_an_image_of_which_patches_are_made() -> None:
    """Every second row would take patches apart; stretches of rows do not."""

    def fn(w: Any, image: Any) -> Any:
        patches = image.reshape(4, 4, 4, 4).transpose(0, 2, 1, 3).reshape(4, 4, 16)
        return jnp.tanh(patches @ w).sum()

    args = (numbers(16, 8), numbers(16, 16))
    made, said = cut(fn, args, TimeAxis("row", 4, ((1, 0),)))
    assert near(jax.jit(made)(*args), jax.jit(fn)(*args))
    assert "100% of the FLOPs" in said


# Plans


def mlp() -> tuple[Callable[..., Any], Any]:
    def loss(params: Any, x: Any, y: Any) -> Any:
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)

    params = {"a": numbers(8, 32), "b": numbers(32, 8)}
    return step_of(loss), (params, numbers(16, 12, 8), numbers(16, 12, 8, seed=1))


def planned(**options: Any) -> autoshard.Plan:
    fn, args = mlp()
    return autoshard.plan(fn, *args, cluster="cpu:8", **options)


def test_microbatches_and_blockwise_are_short_for_time_axes() -> None:
    by_name = planned(time_axes={"micro": 4})
    assert by_name.to_json() == planned(microbatches=4).to_json()
    assert planned(time_axes={"only": 4}).cost == by_name.cost
    hinted = planned(time_axes={"micro": 4}, hints={"x": P("micro")})
    assert hinted.cost.peak_memory == by_name.cost.peak_memory
    x = numbers(1, 64, 4)

    def attend(x: Any) -> Any:
        return jax.nn.softmax(x @ jnp.swapaxes(x, 1, 2)) @ x

    both = autoshard.plan(attend, x, cluster="cpu:8", time_axes={"block": 8})
    assert both.to_json() == autoshard.plan(attend, x, cluster="cpu:8", blockwise=8).to_json()
    assert "time      block=8 over huge values" in str(both)


@pytest.mark.parametrize(
    ("axes", "hints", "said"),
    [
        ({"micro": 3}, {"x": P(None, "micro")}, ["micro=3 over dim 1 of x"]),
        ({"micro": 2}, {"x": P(("micro", "data"), None, None)}, ["micro=2 over dim 0 of x"]),
        ({"micro": 2}, {"?": P(None, ("micro", "data"))}, ["micro=2 over dim 1 of x, y"]),
        ({"micro": 4, "seq": 3}, {"y": P("micro", "seq")}, ["dim 0 of y", "seq=3 over dim 1 of y"]),
        ({"seq": 3, "micro": 4}, {"x": P(None, "seq")}, ["micro=4 over the batch"]),
        ({"seq": "auto"}, {"x": P(None, "seq")}, []),
    ],
)
def test_plans_run_say_so_and_are_read_back(axes: Any, hints: Any, said: Sequence[str]) -> None:
    fn, args = mlp()
    plan = planned(time_axes=axes, hints=hints)
    assert all(text in str(plan) for text in said)
    assert near(plan.compile()(*args), jax.jit(fn)(*args))
    again = autoshard.Plan.from_json(plan.to_json(), fn, *args)
    assert again.to_json() == plan.to_json()
    assert near(again.compile()(*args), jax.jit(fn)(*args))
    assert [a["name"] for a in json.loads(plan.to_json())["time_axes"]] == list(axes)
    names = {name for a in plan.alternatives for name, _ in a.mesh} | set(plan.mesh)
    assert names.isdisjoint(axes)


def test_over_time_and_over_devices_at_once() -> None:
    """Each device has a part of each step's part; the dim is as it lies, split over devices."""
    plan = planned(time_axes={"micro": 2}, hints={"x": P(("micro", "data"))}, mesh={"data": 8})
    assert plan.in_shardings[1] == P("data")
    free = planned(time_axes={"micro": 2}, hints={"x": P("micro", ...)}, mesh={"data": 8})
    assert free.cost.step_time <= plan.cost.step_time


def test_a_pipeline_over_another_dim() -> None:
    fn, args = mlp()
    mesh = {"stage": 2, "data": 2, "model": 2}
    common = {"cluster": "cpu:8", "stages": 2, "schedule": "1F1B", "mesh": mesh}
    short = autoshard.plan(fn, *args, **common, microbatches=2)
    assert autoshard.plan(fn, *args, **common, time_axes={"micro": 2}).to_json() == short.to_json()
    hints = {"x": P(None, ("m", "data"))}
    plan = autoshard.plan(fn, *args, **common, time_axes={"m": 3}, hints=hints)
    assert "m=6 runs over dim 1 of x, the microbatches of all groups" in str(plan)
    assert near(plan.compile()(*args), jax.jit(fn)(*args))
    again = autoshard.Plan.from_json(plan.to_json(), fn, *args)
    assert again.to_json() == plan.to_json()
    assert near(again.compile()(*args), jax.jit(fn)(*args))


def test_an_annotation_of_an_argument_names_a_time_axis() -> None:
    fn, args = mlp()

    def annotated(params: Any, x: Any, y: Any) -> Any:
        return fn(params, autoshard.annotate(x, None, "seq", None), y)

    plan = autoshard.plan(annotated, *args, cluster="cpu:8", time_axes={"seq": 3})
    assert "seq=3 over dim 1 of x" in str(plan)
    assert near(plan.compile()(*args), jax.jit(fn)(*args))
    again = autoshard.Plan.from_json(plan.to_json(), annotated, *args)
    assert again.to_json() == plan.to_json()

    def too_late(params: Any, x: Any, y: Any) -> Any:
        return fn(params, autoshard.annotate(jnp.sin(x), None, "seq", None), y)

    with pytest.raises(HintError, match=r"test_time_axes.py:\d+: time axis 'seq' .* argument"):
        autoshard.plan(too_late, *args, cluster="cpu:8", time_axes={"seq": 3})


def test_the_decorator_takes_time_axes() -> None:
    fn, args = mlp()
    step = autoshard.parallelize(
        fn, cluster="cpu:8", time_axes={"seq": 3}, hints={"x": P(None, "seq")}
    )
    assert near(step(*args), jax.jit(fn)(*args))
    assert "seq=3 over dim 1 of x" in str(step.plan(*args))


def test_the_page_prints_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text().split("## Any other dim: time axes")[1]
    code, printed = (
        re.findall(f"```{kind}\n(.*?)```", text, re.S)[0] for kind in ("python", "text")
    )
    said = " ".join(re.findall("```text\n(.*?)```", text, re.S)[1].split())
    file = tmp_path / "train.py"
    file.write_text(code)
    names: dict[str, Any] = {}
    exec(compile(code, str(file), "exec"), names)
    assert capsys.readouterr().out == printed
    args = [names[name] for name in ("train_step", "params", "x", "y")]
    with pytest.raises(NoTimeLoop) as error:
        autoshard.plan(*args, cluster="cpu:8", time_axes={"micro": 4}, hints={"x": P("micro")})
    assert str(error.value) == said


def test_less_memory_with_more_steps() -> None:
    fn, args = mlp()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*x.shape[:-2], 1 << 12, 8), x.dtype), args
    )
    shapes = (args[0], *shapes[1:])
    peaks = [
        autoshard.plan(
            fn, *shapes, cluster="h100:1", time_axes={"s": n}, hints={"x": P(None, "s")}
        ).cost.peak_memory
        for n in (1, 4, 16)
    ]
    compiled = [peak_of(fn, shapes, n) for n in (1, 4, 16)]
    for found in (peaks, compiled):
        assert found[0] > 1.5 * found[1] > 1.5 * found[2]


def peak_of(fn: Callable[..., Any], shapes: Any, steps: int) -> int:
    """Bytes of temporaries, as compiled."""
    made = cut(fn, shapes, TimeAxis("s", steps, ((2, 1),)))[0] if steps > 1 else fn
    return int(jax.jit(made).lower(*shapes).compile().memory_analysis().temp_size_in_bytes)


# What can not be


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"time_axes": {"micro": 0}}, ValueError, "time axis 'micro' has a size, a whole number"),
        ({"time_axes": {"micro": 2.0}}, ValueError, "'micro' has a size, .* not 2.0"),
        ({"time_axes": {"": 2}}, ValueError, "a time axis has a name"),
        ({"time_axes": 8}, TypeError, r"a mapping such as {'micro': 8}, not 8"),
        (
            {"time_axes": {"seq": 3}, "microbatches": 4},
            ValueError,
            r"leave microbatches out, and write time_axes={'micro': 4, 'seq': 3}",
        ),
        (
            {"time_axes": {"micro": 2}, "blockwise": 4},
            ValueError,
            r"leave blockwise out, and write time_axes={'block': 4, 'micro': 2}",
        ),
        (
            {"time_axes": {"data": 2}, "mesh": {"data": 8}},
            ValueError,
            "'data' is an axis of the mesh",
        ),
        (
            {"time_axes": {"micro": 5}, "hints": {"x": P(None, "micro")}},
            NoTimeLoop,
            "dim 1 of x, of 12, can not be cut into 5 steps .* nearest that divide it: 4 and 6",
        ),
        (
            {"time_axes": {"a": 4}, "mesh": {"data": 8}, "hints": {"x": P(("a", "data"))}},
            NoTimeLoop,
            r"dim 0 of x, f32\[16,12,8\], can not be split over a=4 and data=8 at once: that is 32",
        ),
        ({"time_axes": {"a": 2, "b": 2}}, HintError, "no hint says what time axis 'a' runs over"),
        (
            {"time_axes": {"a": 2, "b": 2}, "hints": {"x": P(("a", "b"))}},
            HintError,
            "dim 0 is split over the time axes a and b; give it one",
        ),
        (
            {"time_axes": {"a": 2}, "hints": {"x": P("a"), "**/x": P(None, "a")}},
            HintError,
            r"splits dim 0 of x by hints\['x'\], and dim 1 by hints\['\*\*/x'\]",
        ),
        (
            {"time_axes": {"block": 2}, "hints": {"x": P("block")}},
            HintError,
            "'block' runs over huge values",
        ),
        (
            {"time_axes": {"a": 2, "micro": 2}, "hints": {"x": P("a")}, "stages": 2},
            ValueError,
            "a pipeline has one time axis, its microbatches, not 'a' and 'micro'",
        ),
        ({"time_axes": {"stage": 2}, "stages": 2}, ValueError, "'stage' is an axis of the mesh"),
        ({"time_axes": {"block": 2}, "stages": 2}, ValueError, "does not go with stages"),
    ],
)
def test_what_is_refused(options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        planned(**options)


# Commands


def test_the_command(tmp_path: Any) -> None:
    file = tmp_path / "train.py"
    file.write_text(
        "import jax.numpy as jnp\n"
        "def job():\n"
        "    return lambda x: jnp.tanh(x @ jnp.ones((4, 4))).sum(), (jnp.ones((8, 6, 4)),)\n"
    )

    def run(*more: str) -> Any:
        words = ["plan", f"{file}:job", "--cluster", "cpu:8", *more]
        return typer_testing.CliRunner().invoke(cli.app, words)

    told = run("--time-axis", "seq=3", "--hint", "x=None,seq", "--time-axis", "micro=2")
    assert told.exit_code == 0
    assert "seq=3 over dim 1 of x" in told.output
    assert "micro=2 over the batch" in told.output
    for words in (
        ["seq"],
        ["seq=0"],
        ["seq=2", "--time-axis", "seq=3"],
        ["micro=auto", "--microbatches", "2"],
    ):
        refused = run("--time-axis", *words)
        assert refused.exit_code == 2, words
        assert "fault of autoshard" not in refused.output
