"""From seconds to a cluster file and to plans; the seconds are those of a known machine."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner, Result

import autoshard
from autoshard import calibration, cli, probes
from autoshard.calibration_file import Figures, Key, cluster_text
from autoshard.calibration_suite import figures, suite
from cost_models.cluster import Level
from cost_models.collectives import COLLECTIVES
from cost_models.fit import predicted

GFLOP, GB = 1e9, 1e9
WIRES = Level("w", "switch", bandwidth=0.5 * GB, latency=3e-6, startup=1e-4)
TRUE = {"float32": 5 * GFLOP, "bfloat16": 2 * GFLOP, "stream": 7 * GB}
FLOP_PER_ELEMENT = {"activation": 24.0, "polynomial": 16.0}  # as rules count exp, tanh and the rest


def seconds_of(key: Key) -> float:
    """What a step of this program takes on the machine above, with vectors of 3 GFLOP/s."""
    what, *sizes = key
    if what in COLLECTIVES:
        return predicted(WIRES, what, *sizes)
    if what == "kernels":
        return 1e-5 + 4e-6 * sizes[0]
    if what in FLOP_PER_ELEMENT:
        return FLOP_PER_ELEMENT[what] * sizes[0] / (3 * GFLOP)
    if what == "stream":
        return 2 * sizes[0] / TRUE[what]
    return 2 * sizes[0] * sizes[1] ** 2 / TRUE[what]


def known(quick: bool = False) -> Figures:
    seconds = {key: seconds_of(key) for key in suite(jax.devices(), quick)}
    return figures(seconds, 7, 3 << 30, "assumption: as told")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that are measured at once, and turn out to be those of `known`."""
    monkeypatch.setattr(calibration, "measured", lambda devices, quick, *_: known(quick))


@dataclass(frozen=True)
class Fake:
    """A device that is not here."""

    device_kind: str
    platform: str = "gpu"
    id: int = 0


def command(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


@pytest.mark.parametrize("quick", [False, True])
def test_the_known_machine_is_found(quick: bool) -> None:
    found = known(quick)
    assert found.products == pytest.approx({k: TRUE[k] for k in ("float32", "bfloat16")})
    assert found.memory == pytest.approx(7 * GB)
    assert found.vector == pytest.approx(3 * GFLOP)
    assert found.kernel == pytest.approx(4e-6)
    assert found.wires.bandwidth == pytest.approx(WIRES.bandwidth, rel=0.01)
    assert found.wires.startup == pytest.approx(WIRES.startup, rel=0.01)
    assert found.wires_off == pytest.approx(1.0, abs=0.01)


def test_a_program_lost_in_the_noise_is_an_error() -> None:
    seconds = {key: seconds_of(key) for key in suite(jax.devices(), True)}
    seconds["stream", 16 << 20] = 0.0
    with pytest.raises(autoshard.CalibrationError, match="stream 16777216 took no time"):
        figures(seconds, 7, 1 << 30, "")


@pytest.mark.parametrize("count", [2, 3, 8, 12, 64, 512])
def test_groups_and_sizes_suit_any_number_of_devices(count: int) -> None:
    devices = [Fake("A")] * count
    for kind, nbytes, group in (key for key in suite(devices, False) if key[0] in COLLECTIVES):
        assert count % group == 0, kind
        assert nbytes > 0
        assert nbytes % (4 * group) == 0
    assert {key[2] for key in suite(devices, True) if key[0] == "permute"} >= {count}


@pytest.mark.usefixtures("machine")
def test_the_file_says_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    found = autoshard.calibrate(out=file)
    assert str(found) == "mine:8"
    assert found == autoshard.cluster(f"{file}:8") == autoshard.cluster(str(file))
    assert found.platform == "cpu"
    assert found.chip.peak_flops == pytest.approx({k: TRUE[k] for k in ("float32", "bfloat16")})
    assert found.chip.hbm_bandwidth == pytest.approx(7 * GB)
    assert found.chip.hbm_bytes == 3 << 30
    assert found.chip.kernel_latency == pytest.approx(4e-6)
    assert found.network[0].bandwidth == pytest.approx(0.5 * GB, rel=0.01)


@pytest.mark.usefixtures("machine")
def test_every_number_of_the_file_says_how_it_was_found(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    autoshard.calibrate(out=file)
    text = file.read_text()
    numbers = [line for line in text.splitlines() if re.match(r"\w+ *= *[\[\d.-]*\d", line)]
    assert len(numbers) == 11
    day = datetime.date.today()
    for line in numbers:
        source = line.partition("#")[2]
        measured = f" measured {day}, jax {jax.__version__}, 8 devices, median of 7"
        assert source.startswith((measured, " assumption: ")), line
    assert "#   all_reduce of 4 MiB over 8" in text
    assert all(len(line) < 160 for line in text.splitlines())


def test_a_chip_of_the_catalogue_keeps_what_the_compiler_is_told() -> None:
    devices = [Fake("NVIDIA A100-SXM4-80GB")] * 2
    text = cluster_text("mine", devices, known(), datetime.date(2026, 1, 2))
    a100 = autoshard.cluster("a100:8").compiler
    assert tomllib.loads(text)["compiler"] == dict(a100)


@pytest.mark.usefixtures("machine")
def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert autoshard.calibrate(jax.devices()[:4]).shape == (4,)
    assert list(tmp_path.iterdir()) == []


def step(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


ARGS = (jax.ShapeDtypeStruct((256, 256), jnp.float32), jax.ShapeDtypeStruct((64, 256), jnp.float32))


@pytest.mark.usefixtures("machine")
def test_a_plan_for_the_measured_cluster(tmp_path: Path) -> None:
    found = autoshard.calibrate(out=tmp_path / "mine.toml")
    by_path = autoshard.plan(step, *ARGS, cluster=f"{tmp_path}/mine.toml:8")
    assert by_path.to_json() == autoshard.plan(step, *ARGS, cluster=found).to_json()
    # The file may be gone by the time the plan is read.
    (tmp_path / "mine.toml").unlink()
    again = autoshard.Plan.from_json(by_path.to_json(), step, *ARGS)
    assert again.compile()(jnp.ones((256, 256)), jnp.ones((64, 256))).shape == (64, 256)


JOB = """
import jax, jax.numpy as jnp
def job():
    return lambda w, x: jnp.tanh(x @ w), (jax.ShapeDtypeStruct((256, 256), jnp.float32),) * 2
"""


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("word", ["plan", "compare", "run", "verify"])
def test_every_command_takes_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    autoshard.calibrate(out="mine.toml")
    Path("target.py").write_text(JOB)
    done = command(word, "target.py:job", "--cluster", "./mine.toml:8")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()


@pytest.mark.usefixtures("machine")
def test_the_command_writes_and_tells(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    done = command("calibrate", str(file), "--devices", "8")
    assert done.exit_code == 0, done.output
    assert "5 GFLOP/s" in done.stdout
    assert f"--cluster {file}:8" in done.stdout
    before = file.read_bytes()
    again = command("calibrate", str(file))
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert "--force" in again.stderr
    assert command("calibrate", str(file), "--force", "--devices", "4").exit_code == 0
    assert file.read_bytes() != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("no/such/folder/mine.toml",), "there is no folder"),
        (("mine.txt",), "ends in .toml"),
        (("folder.toml",), "it is a folder"),
        (("mine.toml", "--devices", "64"), "here are 8 devices of kind cpu, not 64"),
    ],
)
def test_what_can_not_be_done_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    def never(*_: Any) -> Figures:
        raise AssertionError("measured before it was checked")

    monkeypatch.setattr(calibration, "measured", never)
    monkeypatch.chdir(tmp_path)
    Path("folder.toml").mkdir()
    done = command("calibrate", *words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], "here is 0"),
        (jax.devices()[:1], "here is 1"),
        (jax.devices()[:2] * 2, "given twice"),
        ([Fake("A"), Fake("B")], "of one kind, not A and B"),
    ],
)
def test_devices_that_make_no_cluster(devices: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoshard.calibrate(devices)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(autoshard.CalibrationError, match="in one, and give its file to all"):
        autoshard.calibrate()


def test_an_interrupted_measurement_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Figures:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "measured", interrupted)
    file = tmp_path / "mine.toml"
    file.write_text("as it was")
    with pytest.raises(KeyboardInterrupt):
        autoshard.calibrate(out=file, force=True)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.toml"]
    assert file.read_text() == "as it was"


MAKE: dict[str, Callable[[], probes.Probe]] = {
    "product": lambda: probes.product(jax.devices(), 16, 8, "bfloat16"),
    "stream": lambda: probes.stream(jax.devices(), 1024),
    "chain": lambda: probes.chain(jax.devices(), 64, probes.activation),
    "kernels": lambda: probes.kernels(jax.devices(), 3),
} | {
    kind: lambda kind=kind: probes.collective(jax.devices(), kind, 4, 1024)  # type: ignore[misc]
    for kind in probes.KINDS
}


@pytest.mark.parametrize("name", MAKE)
def test_every_program_runs_any_number_of_turns(name: str) -> None:
    probe = MAKE[name]()
    for turns in (1, 0, 3):
        probe.run(turns)


def _calibrated(out: Path) -> autoshard.Cluster:
    """What the error asks for: again, while something else keeps the machine too busy."""
    for _ in range(5):
        with suppress(autoshard.CalibrationError):
            return autoshard.calibrate(out=out, quick=True)
    return autoshard.calibrate(out=out, quick=True)


@pytest.mark.slow
def test_a_real_quick_calibration(tmp_path: Path) -> None:
    found = _calibrated(tmp_path / "mine.toml")
    assert found.devices == 8
    # Not a test of the machine: only that no figure is absurd.
    assert 1e7 < found.chip.peak_flops["float32"] < 1e13
    assert 1e6 < found.chip.vector_flops < 1e13
    assert 1e7 < found.chip.hbm_bandwidth < 1e13
    assert 1e5 < found.network[0].bandwidth < 1e13
    assert autoshard.plan(step, *ARGS, cluster=found).cost.step_time > 0
