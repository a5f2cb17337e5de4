"""The command line: what it prints, how it fails, what it leaves on disk."""

from __future__ import annotations

import io
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from rich.console import Console
from typer.testing import CliRunner, Result

from autoshard import atomic_file, cli, cli_tables, progress
from autoshard.api import Plan
from autoshard.cli_errors import failure
from autoshard.columns import columns
from autoshard.same_numbers import compare
from autoshard.spec_text import expression
from cost_models.cluster import names

# A folder of targets, good and bad.
TARGETS = """
import jax, jax.numpy as jnp
import autoshard

def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)

PARAMS = {"w1": shape(256, 512), "w2": shape(512, 256)}

def step(params, x, label):
    def loss(params):
        out = jnp.tanh(x @ params["w1"]) @ params["w2"]
        return jnp.mean((out.sum(axis=1) - label) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

def job():
    return step, (PARAMS, shape(64, 256), shape(64, dtype=jnp.int32))

def decorated():
    return autoshard.parallelize(step, cluster="cpu:8"), job()[1]

def static():
    return autoshard.parallelize(lambda x, n: x * n, static_argnums=1), (shape(8), 3)

def keys():
    def draw(key, count):
        return jax.random.uniform(key, (8,)) * count, jax.random.split(key)[0], count > 0
    return draw, (shape(dtype=jax.random.key(0).dtype), shape(dtype=jnp.bfloat16))

def drift():
    from itertools import count
    calls = count(1)
    def f(x):
        return jax.pure_callback(lambda x: x + next(calls), x, x)  # not pure at all
    return f, (shape(8),)

number = 3
def needs(a, b, c=3): ...
def nothing(): ...
def lone(): return step, shape(8)
def boom(): raise RuntimeError("bang\\nand more")
def refused(): return lambda x: x if x.sum() > 0 else -x, (shape(8),)
def text(): return lambda x: "abc", (shape(8),)
def no_array(): return lambda x: x, ("abc",)
def raises():
    def f(x):
        raise ValueError("my own mistake")
    return f, (shape(8),)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    (folder / "targets.py").write_text(TARGETS)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "needy.py").write_text("import no_such_thing\n")
    return folder


Command = Callable[..., Result]


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line in the folder of targets, in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*args: str) -> Result:
        return CliRunner().invoke(cli.app, list(args))

    return run


def test_plan_prints_what_the_plan_prints(command: Command) -> None:
    done = command("plan", "targets.py:job", "--cluster", "tpu-v5e:2x2", "--mesh", "data=2,model=2")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    assert "tpu-v5e:2x2, 4 x TPU v5e" in done.stdout
    assert "params/w1" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert done.stdout == command(
        "plan", "targets:job", "--cluster", "tpu-v5e:2x2", "--mesh", "data=2 model=2"
    ).stdout, "a module is as good as a file"  # fmt: skip


def test_hints_solver_and_limit_reach_the_plan(command: Command) -> None:
    done = command(
        "plan", "targets.py:job", "--cluster", "cpu:8", "--mesh", "data=4,model=2", "--hint",
        "params/w1=None,model", "--hint", "x=data", "--solver", "propagate",
        "--memory-limit", "1GiB",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "f32[256,512{model}]" in done.stdout
    assert "hints['params/w1']" in done.stdout
    assert "f32[64{data},256]" in done.stdout
    assert "propagate: the hints alone" in done.stdout
    assert "of 1 GiB" in done.stdout


def test_specs_are_python_that_says_what_the_plan_says(command: Command, folder: Path) -> None:
    options = ("targets.py:job", "--cluster", "cpu:8", "--mesh", "data=4,model=2", "--hint",
               "params/w1=data+model,None")  # fmt: skip
    file = folder / "plan.json"
    done = command("plan", *options, "--specs", "--json", str(file))
    assert done.exit_code == 0, done.stderr
    said: dict[str, Any] = {}
    exec(done.stdout, said)
    assert dict(said["mesh"].shape) == {"data": 4, "model": 2}
    from targets import job  # type: ignore[import-not-found]

    fn, args = job()
    plan = Plan.from_json(file.read_text(), fn, *args)
    assert said["in_shardings"] == plan.in_shardings
    assert said["out_shardings"] == plan.out_shardings
    assert said["in_shardings"][0]["w1"] == PartitionSpec(("data", "model"))


def test_specs_of_other_containers_become_dicts_by_name() -> None:
    from typing import NamedTuple

    class Pair(NamedTuple):
        left: Any
        right: Any

    p = PartitionSpec
    tree = [Pair(p("data"), (p(),)), {"a": None, 3: {}}]
    read = eval(expression(tree), {"P": p})
    assert read == [{"left": p("data"), "right": (p(),)}, {"a": None, 3: {}}]


def test_json_is_the_plan_and_is_written_whole_or_not_at_all(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "out.json"
    options = ("plan", "targets.py:job", "--cluster", "cpu:8", "--json", str(file))
    assert command(*options).exit_code == 0
    whole = file.read_text()
    assert Plan.from_json(whole).to_json() == whole
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask

    def broken(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    done = command(*options, "--mesh", "data=8")
    assert done.exit_code == 2
    assert "No space left" in done.stderr
    assert file.read_text() == whole
    assert not list(folder.glob(".*part*"))


def test_json_to_a_folder_that_is_not_there(command: Command) -> None:
    done = command("plan", "targets.py:job", "--cluster", "cpu:8", "--json", "no/where.json")
    assert done.exit_code == 2
    assert done.stderr == "autoshard: cannot write no/where.json: there is no folder no\n"
    with pytest.raises(OSError, match=r"cannot write no/where.json: No such file"):
        atomic_file.write(Path("no/where.json"), "x")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["plan", "nofile.py:job"], "there is no file nofile.py"),
        (["plan", "target.py:job"], "did you mean targets.py?"),
        (["plan", "no.such.module:job"], "there is no module 'no'"),
        (["plan", "targets.py"], "write file.py:name or package.module:name"),
        (["plan", "targets.py:jobb"], "has no 'jobb'; it has job"),
        (["plan", "targets.py:number"], "is int, not a function"),
        (["plan", "targets.py:needs"], "needs a, b; a target takes no arguments"),
        (["plan", "targets.py:nothing"], "should give back (fn, args)"),
        (["plan", "targets.py:lone"], "write (fn, (x,)) for one argument"),
        (["plan", "targets.py:no_array"], "argument x is str 'abc', which is no array"),
        (["plan", "targets.py:text"], "tracing targets.py:text failed: TypeError"),
        (["audit", "targets.py:text"], "tracing targets.py:text failed: TypeError"),
        (["audit", "targets.py:job"], "names no mesh"),
        (["plan", "targets.py:job", "--cluster", "nope:8"], "no cluster is called 'nope'"),
        (["plan", "targets.py:job", "--mesh", "data=3"], "mesh data=3 has 3 devices"),
        (["plan", "targets.py:job", "--mesh", "data"], "cannot read 'data' as a mesh axis"),
        (["plan", "targets.py:job", "--hint", "x"], "write GLOB=SPEC"),
        (["plan", "targets.py:job", "--hint", "x=data", "--hint", "x=None,data"], "is given twice"),
        (["plan", "targets.py:job", "--json", "."], "cannot write .: it is a folder"),
        (["plan", "targets.py:job", "--json", "/proc/x.json"], "cannot write /proc/x.json"),
        (["plan", "targets.py:job", "--cluster", ""], "written as text such as h100:2x8, not ''"),
        (["run", "targets.py:static"], "has static arguments (static_argnums), which run does not"),
        (["plan", "targets.py:job", "--hint", "xx=data"], "the nearest are x"),
        (["plan", "targets.py:job", "--hint", "x=a,b,c"], "3 entries for 2 dims"),
        (["plan", "targets.py:job", "--solver", "magic"], "unknown solver 'magic'"),
        (["plan", "targets.py:job", "--memory-limit", "12XB"], "cannot read '12XB'"),
        (["explain", "targets.py:job", "params/w3"], "the nearest are params/w1, params/w2"),
        (["run", "targets.py:job", "--cluster", "tpu-v5e:2x2"], "run it on cpu:4"),
        (["clusters", "h10"], "Near it: h100"),
    ],
)
def test_a_users_mistake_is_one_sentence(command: Command, args: list[str], said: str) -> None:
    if args[0] in ("plan", "explain", "audit") and "--cluster" not in args:
        args = [*args, "--cluster", "cpu:8"]
    done = command(*args)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.startswith("autoshard: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "line", "said"),
    [
        (
            "targets.py:boom",
            'raise RuntimeError("bang',
            "targets.py:boom raised RuntimeError: bang",
        ),
        ("targets.py:refused", "x.sum() > 0", "failed: TracerBoolConversionError"),
        ("targets.py:raises", 'raise ValueError("my own', "failed: ValueError: my own mistake"),
        ("broken.py:f", "def f(:", "broken.py raised SyntaxError"),
        ("needy.py:f", "import no_such_thing", "needy.py raised ModuleNotFoundError"),
    ],
)
def test_the_users_own_traceback_is_kept_and_ours_hidden(
    command: Command, target: str, line: str, said: str
) -> None:
    done = command("plan", target, "--cluster", "cpu:8")
    assert done.exit_code == 2
    assert line in done.stderr
    assert said in done.stderr.splitlines()[-1]
    for ours in ("autoshard/cli", "autoshard/api", "importlib", "jax/_src"):
        assert ours not in done.stderr


def test_a_parallelized_target_keeps_its_options(command: Command) -> None:
    done = command("plan", "targets.py:static", "--cluster", "cpu:8", "--specs")
    assert done.exit_code == 0, done.stderr
    assert "in_shardings = (\n    P('data'),\n)" in done.stdout


def test_debug_shows_the_whole_traceback(command: Command) -> None:
    done = command("plan", "targets.py:boom", "--cluster", "cpu:8", "--debug")
    assert done.exit_code not in (0, 2)
    assert done.exception is not None
    assert type(done.exception.__cause__) is RuntimeError


def test_no_feasible_plan_is_exit_code_one(command: Command) -> None:
    done = command("plan", "targets.py:job", "--cluster", "cpu:8", "--memory-limit", "1KiB")
    assert done.exit_code == 1
    assert "no plan of step fits in 1 KiB" in done.stderr


def test_a_fault_of_ours_is_not_called_the_users() -> None:
    try:
        columns([("a",)], "ll")  # a caller's bug, deep inside
    except IndexError as error:
        found = failure(error)
    assert found.code == 3
    assert "report it" in found.sentence
    assert "columns.py" in found.details


@pytest.mark.parametrize("args", [["frob"], ["plan"], ["run", "x.py:f", "--steps", "0"]])
def test_wrong_usage_is_exit_code_two(command: Command, args: list[str]) -> None:
    done = command(*args)
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr


# The other commands


@pytest.mark.parametrize("target", ["targets.py:job", "targets.py:decorated"])
def test_run_finds_the_same_numbers(command: Command, target: str) -> None:
    done = command(
        "run", target, "--steps", "2", "--mesh", "data=4,model=2", "--hint", "x=data",
        "--hint", "params/w1=None,model", "--donate", "0",
    )  # fmt: skip
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "same numbers: all 3 results of 2 steps agree" in done.stdout
    assert "result/0/w1  float32[256,512]" in done.stdout


def test_run_takes_keys_and_narrow_floats(command: Command) -> None:
    done = command("run", "targets.py:keys")
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "all 3 results" in done.stdout


def test_run_ends_with_one_when_numbers_differ(command: Command) -> None:
    done = command("run", "targets.py:drift")
    assert done.exit_code == 1
    assert "NUMBERS DIFFER: 1 of 1 results" in done.stdout
    assert "TOO LARGE" in done.stdout


def test_state_goes_round_and_both_start_from_the_same() -> None:
    def step(x: jax.Array) -> jax.Array:
        return x * 2

    seen: list[float] = []

    def sharded(x: jax.Array) -> jax.Array:
        seen.append(float(x[0]))
        return step(x) * (1 + 1e-6)

    found = compare(step, sharded, (jax.numpy.ones(3),), [(0, 0)], 3)
    assert seen == pytest.approx([1, 2, 4], rel=1e-5)
    assert found.ok
    assert 0 < found.differences[0].largest < 2e-6
    assert not compare(step, sharded, (jax.numpy.ones(3),), [], 1, tolerance=1e-8).ok


def test_what_is_only_rounding_may_differ_as_rounding_does() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        """A sum in bf16, one that is 0 but for rounding, and an exact one."""
        short = (x.astype("bfloat16") @ w.astype("bfloat16")).astype("float32")
        return short, jax.numpy.sum(jax.nn.softmax(x) - 1 / x.size), w * 2

    def backwards(w: jax.Array, x: jax.Array) -> Any:
        return (*step(w[::-1], x[::-1])[:2], w * 2)

    def wrong(w: jax.Array, x: jax.Array) -> Any:
        short, zero, twice = backwards(w, x)
        return short * 1.2, zero, twice * 1.05

    rng = np.random.default_rng(0)
    args = tuple(np.float32(rng.normal(size=(2, 999))))
    assert compare(step, jax.jit(backwards), args, [], 1).ok
    found = compare(step, jax.jit(wrong), args, [], 1)
    assert [d.path for d in found.differences if not d.ok] == ["result[0]", "result[2]"]


def test_compare_shows_every_solver_once(command: Command) -> None:
    done = command("compare", "targets.py:job", "--cluster", "h100:8")
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:-1]]
    assert [r[0] for r in rows] == ["ilp", "propagate", "dp", "fsdp", "tp", "fsdp+tp"]
    assert "1.00x" in rows[0]


def test_compare_says_what_does_not_fit(command: Command) -> None:
    done = command("compare", "targets.py:job", "--cluster", "cpu:8", "--memory-limit", "700KiB")
    assert done.exit_code == 0, done.stderr
    assert " no\n" in done.stdout
    assert " yes\n" in done.stdout


def test_explain(command: Command) -> None:
    done = command("explain", "targets.py:job", "params/w1", "--cluster", "cpu:8")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("params/w1  f32[")
    assert "instead it could be" in done.stdout


def test_clusters_lists_all_and_shows_one_with_its_sources(command: Command) -> None:
    listed = command("clusters")
    assert listed.exit_code == 0
    assert set(names()) <= {line.split()[0] for line in listed.stdout.splitlines() if line}
    assert max(map(len, listed.stdout.splitlines())) <= 100
    one = command("clusters", "v5e:4x4")
    assert one.stdout.startswith("tpu-v5e:4x4: 16 x TPU v5e")
    assert "hbm_bandwidth_GBps = 819" in one.stdout
    two = command("clusters", "v3:32x4").stdout.splitlines()
    assert two[0] == "tpu-v3:32x4: 256 x TPU v3 (one core), 15.5 GiB for a program on each"
    assert two[2:4] == [
        "  2 on chip, 225 GB/s", "  32x4 on ICI, 82 GB/s on each link, ring x open",
    ]  # fmt: skip
    assert cli_tables.cluster_text("h100").startswith("#")


# In a process of its own


def autoshard(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    spec = find_spec("autoshard")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent.parent
    path = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
    whole = {**os.environ, "PYTHONPATH": path, **env}
    whole.pop("XLA_FLAGS")  # the virtual devices are its own business
    return subprocess.run(
        [sys.executable, "-W", "error", *args], cwd=folder, env=whole, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


def test_run_makes_its_own_devices(folder: Path) -> None:
    done = autoshard(
        folder, "-m", "autoshard", "run", "targets.py:job", "--cluster", "cpu:4", "--hint", "x=data"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "silent where stderr is no terminal"
    assert "on 4 devices" in done.stdout


def test_help_and_clusters_do_without_jax(folder: Path) -> None:
    code = (
        "import sys; from autoshard.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "slow = {'jax', 'networkx', 'ortools'} & set(sys.modules); assert not slow, slow"
    )
    for args in (["--help"], ["clusters"], ["plan", "--help"]):
        done = autoshard(folder, "-c", code, *args)
        assert done.returncode == 0, done.stderr
        assert done.stdout


# The terminal


def test_a_bar_appears_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.05)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with progress.progress("planning", console) as tell:
        tell("mesh data=8")
        assert out.getvalue() == ""
        time.sleep(0.3)
    assert "planning: mesh data=8" in out.getvalue()


def test_no_bar_for_what_is_quick_nor_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.05)
    out = io.StringIO()
    with progress.progress("planning", Console(file=out, force_terminal=True)) as tell:
        tell("mesh data=8")
    with progress.progress("planning", Console(file=out, force_terminal=False)):
        time.sleep(0.2)
    assert out.getvalue() == ""


def test_colour_changes_no_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(
        cli, "Console", lambda **k: Console(file=out, force_terminal=True, width=40, **k)
    )
    text = "train_step\n  step [##--]\n  w  f32[8{data},8]  hints['w']  [bold]" + "x" * 60
    cli.show(text)
    assert "\x1b[" in out.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()) == text + "\n"
