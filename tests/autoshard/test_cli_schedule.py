"""`autoshard schedule`: its table, its timelines, the files that it writes, and what is refused.

pytest tests/autoshard/test_cli_schedule.py --update-golden      renews what docs/schedules.md shows
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner, Result

from autoshard import cli, cli_schedule, timeline_picture, timeline_text
from autoshard.timeline_trace import MICROSECONDS, as_trace
from passes.pipeline import published
from passes.pipeline.check import faults
from passes.pipeline.generators import gpipe, interleaved, one_f_one_b, zb_h1
from passes.pipeline.published import PUBLISHED, Setting, schedules, weights_held
from passes.pipeline.schedule import Schedule, ScheduleError, other_way_round, straight
from passes.pipeline.stage_costs import even
from passes.pipeline.timeline import Timeline, simulate

PAGE = Path(__file__).parent.parent.parent / "docs" / "schedules.md"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
PAPER = {
    "--stages": "8",
    "--microbatches": "24",
    "--forward": "18.522",
    "--backward": "18.086",
    "--weight": "9.337",
    "--comm": "0.601",
}

needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="needs matplotlib: autoshard[plots]"
)


def command(*args: str | Path, **changed: str) -> Result:
    options = PAPER | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    words = [word for pair in options.items() for word in pair]
    return CliRunner().invoke(cli.app, ["schedule", *words, *map(str, args)])


def unit(microbatches: int = 8) -> Timeline:
    return simulate(zb_h1(4, microbatches), even(4, 4, 1, 1, 1))


# The registry


def test_every_generator_is_there_by_its_own_name() -> None:
    found = schedules(Setting(4, 8, 2, 3, 1, 0.5))
    assert [made.name for made in found] == [p.name for p in PUBLISHED]
    names = ["GPipe", "1F1B", "eager 1F1B", "interleaved 1F1B", "2BP", "ZB-H1", "ZB-H2"]
    assert set(names) <= {made.name for made in found}
    assert all(made.timeline for made in found if made.name in names)
    assert [made.timeline.schedule.name for made in found if made.timeline] == [
        made.name for made in found if made.timeline
    ]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.tuples(*[st.floats(0.1, 9)] * 3),
    st.floats(0, 2),
    st.floats(0, 1),
    st.integers(1, 3),
)
def test_all_of_them_are_sound(
    devices: int,
    microbatches: int,
    times: tuple[float, float, float],
    send: float,
    kept: float,
    chunks: int,
) -> None:
    for made in schedules(Setting(devices, microbatches, *times, send, kept, chunks)):
        if made.timeline is None:
            assert made.reason
        else:
            assert faults(made.timeline, max(made.timeline.peaks)) == ()
            assert made.pieces * devices == made.timeline.schedule.pieces


def test_what_can_not_be_made_has_its_reason_and_its_pieces() -> None:
    (made,) = schedules(Setting(4, 6, 1, 1, 1, chunks=3), ["interleaved 1F1B"])
    assert (made.timeline, made.pieces) == (None, 3)
    assert "multiple of 4 microbatches" in made.reason


def test_chunks_share_the_costs_of_a_stage() -> None:
    costs = Setting(4, 8, 6, 3, 1.5, 0.5, kept=0.5).costs(3)
    assert (costs.pieces, costs.forward[0], costs.backward[0], costs.weight[0]) == (12, 2, 1, 0.5)
    assert (costs.send, costs.activation[0], costs.kept[0]) == (0.5, 1 / 3, 1 / 6)


def test_both_ways_hold_the_weights_twice() -> None:
    way = straight(2)
    assert weights_held(Schedule("one", (way,), (0,), ((), ()))) == 1
    assert weights_held(Schedule("both", (way, other_way_round(way)), (0, 1), ((), ()))) == 2
    assert weights_held(interleaved(2, 4, 3)) == 1


# The table


def rows_of(text: str) -> list[list[str]]:
    """The lines of the table, by cell."""
    body = text.split("\npeak:")[0].splitlines()[3:]
    return [re.split(r" {2,}", line.strip()) for line in body if "not made" not in line]


def test_the_table_is_in_the_order_of_makespans() -> None:
    done = command()
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    rows = rows_of(done.stdout)
    assert {"GPipe", "1F1B", "interleaved 1F1B", "ZB-H2"} <= {row[0] for row in rows}
    spans = [float(row[1]) for row in rows]
    assert spans == sorted(spans)
    assert rows[0][2] == "1.00x"
    by_name = {row[0]: row[3:] for row in rows}
    # The bubble of the paper's table, 0.2431; per microbatch 7 sends there and 7 back.
    assert by_name["1F1B"] == ["24.3%", "8", "14", "8.414", "1x"]
    assert by_name["interleaved 1F1B"][2:] == ["30", "18.03", "1x"]
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_published_bubbles_are_met() -> None:
    setting = Setting(8, 24, 18.522, 18.086, 9.337, 0.601, chunks=3)
    bubbles = {m.name: m.timeline.bubble for m in schedules(setting) if m.timeline}
    for name, said in {"1F1B": 0.2431, "ZB-H1": 0.1585, "ZB-H2": 0.1083}.items():
        assert bubbles[name] == pytest.approx(said, abs=1e-3)
    assert bubbles["interleaved 1F1B"] < 0.11


def test_what_does_not_fit_stands_below_and_is_marked() -> None:
    done = command(memory_limit="8")
    rows = rows_of(done.stdout)
    over = [row[-1] == "above the limit" for row in rows]
    assert over == sorted(over)
    assert any(over)
    assert not all(over)
    fitting = [float(row[4]) for row, out in zip(rows, over, strict=True) if not out]
    assert max(fitting) <= 8
    assert "at most 8 activations per device" in done.stdout
    assert f"\n{rows[0][0]}\ndevice 0 |" in done.stdout


def test_a_limit_of_exactly_what_is_said_is_enough() -> None:
    changed = {"stages": "3", "microbatches": "3", "chunks": "3", "memory_limit": "0.01"}
    only = ("--only", "interleaved 1F1B")
    done = command(*only, **changed)
    least = re.search(r"the least limit of those compared is ([\d.]+), that of", done.stderr)
    assert least is not None
    assert done.exit_code == 2
    assert command(*only, **changed | {"memory_limit": least[1]}).exit_code == 0


def test_what_can_not_be_made_is_listed_with_its_reason() -> None:
    done = command(microbatches="23")
    assert done.exit_code == 0
    assert "\n  not made: interleaved 1F1B takes a multiple of 8 microbatches" in done.stdout
    assert "interleaved 1F1B" not in {row[0] for row in rows_of(done.stdout)}


def test_of_equal_makespans_the_smaller_comes_first() -> None:
    # Sums of 0.1, in another order, differ in their last digits.
    found = cli_schedule.compare(Setting(4, 7, 0.1, 0.3, 0.7), ["gpipe", "1f1b"])
    assert [e.name for e in found.entries] == ["1F1B", "GPipe"]
    assert found.entries[0].makespan == found.entries[1].makespan


@pytest.mark.parametrize("name", ["ZB-H1", "zb-h1", "zbh1", "ZB H1"])
def test_only_takes_names_however_spelt(name: str) -> None:
    done = command("--only", name)
    assert [row[0] for row in rows_of(done.stdout)] == ["ZB-H1"]


def test_several_of_them_are_shown_on_one_scale() -> None:
    done = command("--only", "1f1b", "--only", "zb-h1", stages="4", microbatches="8",
                   forward="1", backward="1", weight="1", comm="0")  # fmt: skip
    assert "0                                                   27\n" in done.stdout
    assert "0                                                               33\n" in done.stdout


# Over time


def drawn(text: str) -> list[str]:
    return [line.partition("|")[2].rstrip("|") for line in text.splitlines() if "|" in line]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(1, 30),
    st.tuples(*[st.floats(0.01, 9)] * 3),
    st.integers(1, 200),
)
def test_letters_stand_where_their_tasks_are(
    devices: int, microbatches: int, times: tuple[float, float, float], width: int
) -> None:
    timeline = simulate(zb_h1(devices, microbatches), even(devices, devices, *times))
    lines = timeline_text.lines(timeline, width)
    room = max(20, width - len("device 0 ||"))
    assert len(lines) == devices + 1
    assert {len(line) for line in lines[:-1]} == {room + len("device 0 ||")}
    bodies = drawn("\n".join(lines))
    for row in timeline.rows:
        scale = room / timeline.latency
        first, last = round(row.start * scale), round(row.end * scale)
        assert bodies[row.device][first:last].startswith(row.kind[: last - first])


def test_whole_numbers_take_as_many_characters_each() -> None:
    assert timeline_text.lines(unit(2), 79)[:2] == [
        "device 0 |F0----F1----                              B0----W0----B1----W1----|",
        "device 1 |      F0----F1----                  B0----      B1----W0----W1----|",
    ]


def test_it_says_where_there_are_more_tasks_than_letters() -> None:
    assert "more tasks than letters" not in command("--only", "zb-h1", microbatches="8").stdout
    assert "more tasks than letters" in command("--only", "zb-h1", microbatches="64").stdout


@pytest.mark.parametrize("colour", [True, False])
def test_colour_changes_no_letter(colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    found = cli_schedule.compare(Setting(4, 8, 1, 1, 1), ["1f1b", "zb-h1"])
    plain = cli_schedule.timelines_text(found.shown, 70).plain

    def console(**options: Any) -> Console:
        return Console(file=out, force_terminal=True, no_color=not colour, width=70, **options)

    monkeypatch.setattr(cli_schedule, "Console", console)
    cli_schedule.show_timelines(found)
    assert ("\x1b[30;4" in out.getvalue() or "\x1b[30;48" in out.getvalue()) == colour
    assert ANSI.sub("", out.getvalue()) == plain + "\n"
    assert max(len(line) for line in plain.splitlines() if "|" in line) == 70


# Files


def test_json_is_what_simulate_says(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = command("--json", out)
    assert done.exit_code == 0, done.stderr
    whole = json.loads(out.read_text())
    assert list(whole) == ["schedules"]
    assert [s["name"] for s in whole["schedules"]] == [row[0] for row in rows_of(done.stdout)]
    made = {m.name: m.timeline for m in schedules(Setting(8, 24, 18.522, 18.086, 9.337, 0.601))}
    for said in whole["schedules"]:
        timeline = made[said["name"]]
        assert timeline is not None
        assert said["rows"] == [
            [r.device, r.start, r.end, r.kind, r.microbatch, r.chunk] for r in timeline.rows
        ]
        assert said["makespan"] == pytest.approx(timeline.makespan, rel=1e-11)
        assert said["bubble"] == pytest.approx(1 - max(timeline.busy) / timeline.makespan)
        assert said["peak_activation"] == pytest.approx(max(timeline.peaks))
        assert said["fits"] is True


def test_json_has_what_is_above_the_limit_and_says_so(tmp_path: Path) -> None:
    command("--json", tmp_path / "out.json", memory_limit="8")
    whole = json.loads((tmp_path / "out.json").read_text())["schedules"]
    fits = [s["fits"] for s in whole]
    assert fits == sorted(fits, reverse=True)
    assert {s["name"] for s in whole if s["peak_activation"] > 8} == {
        s["name"] for s in whole if not s["fits"]
    }


def test_the_trace_has_a_thread_per_device_and_an_event_per_task(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    assert command("--trace", out, "--only", "1f1b", "--only", "zb-h1").exit_code == 0
    events = json.loads(out.read_text())["traceEvents"]
    named = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert named == ["ZB-H1", "1F1B"]
    threads = [e["args"]["name"] for e in events if e["name"] == "thread_name" and not e["pid"]]
    assert threads == [f"device {d}" for d in range(8)]
    timelines = cli_schedule.compare(
        Setting(8, 24, 18.522, 18.086, 9.337, 0.601), ["1f1b", "zb-h1"]
    ).shown
    tasks = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert tasks == [
        (pid, r.device, str(r.task), r.start * MICROSECONDS, (r.end - r.start) * MICROSECONDS)
        for pid, timeline in enumerate(timelines)
        for r in timeline.rows
    ]


def test_the_trace_counts_activations() -> None:
    events = json.loads(as_trace([unit()]))["traceEvents"]
    counters = [e for e in events if e["ph"] == "C"]
    assert {e["name"] for e in counters} == {f"activations of device {d}" for d in range(4)}
    assert max(v for e in counters for v in e["args"].values()) == 4
    last = {e["name"]: e for e in counters}
    assert all(v == 0 for e in last.values() for v in e["args"].values())


@needs_matplotlib
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml")])
def test_a_picture_is_written(tmp_path: Path, suffix: str, start: bytes) -> None:
    out = tmp_path / f"out{suffix}"
    assert command("--picture", out, stages="3", microbatches="4").exit_code == 0
    assert out.read_bytes().startswith(start)
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@needs_matplotlib
def test_a_picture_has_its_colours_and_numbers_and_no_clock() -> None:
    many = [unit(12), simulate(one_f_one_b(4, 12), even(4, 4, 1, 1, 1))]
    drawn = timeline_picture.picture(many, ".svg")
    assert drawn == timeline_picture.picture(many, ".svg")
    root = ElementTree.fromstring(drawn)
    texts = ["".join(t.itertext()).strip() for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"11", "ZB-H1: makespan 39, bubble 7.7%", "1F1B: makespan 45, bubble 20.0%"} <= {*texts}
    # Each microbatch has F, B and W, or F and BW, on four devices.
    assert texts.count("11") == 4 * 3 + 4 * 2
    styles = drawn.decode().lower()
    assert all(colour.lower() in styles for colour in timeline_picture.COLOURS.values())


@needs_matplotlib
def test_a_picture_leaves_out_numbers_that_do_not_fit() -> None:
    large = simulate(gpipe(2, 300), even(2, 2, 1, 1, 1))
    assert b">299<" not in timeline_picture.picture([large], ".svg")


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = command("--picture", tmp_path / "out.svg", "--json", tmp_path / "out.json")
    assert done.exit_code == 2
    assert "pip install autoshard[plots]" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--json", "--trace"])
def test_files_are_written_whole_or_not_at_all(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    assert command(option, out).exit_code == 0
    whole = out.read_bytes()

    def broken(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    done = command(option, out, microbatches="16")
    assert done.exit_code == 2
    assert "No space left" in done.stderr
    assert out.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


def test_ctrl_c_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_schedule, "as_trace", interrupted)
    done = command("--json", tmp_path / "out.json", "--trace", tmp_path / "trace.json")
    assert done.exit_code != 0
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


# What is refused


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--stages", "0"], "a pipeline has at least one stage, not 0"),
        (["--microbatches", "-3"], "at least one microbatch, not -3"),
        (["--chunks", "0"], "at least one chunk, not 0"),
        (["--forward", "-1"], "forward takes -1; a time is a finite number, not below 0"),
        (["--weight", "inf"], "weight takes inf"),
        (["--backward", "nan"], "backward takes nan"),
        (["--comm", "-0.5"], "sending takes -0.5"),
        (["--forward", "0", "--backward", "0", "--weight", "0"], "take 0 together"),
        (["--forward", "1e308"], "take 1e+308 together: nothing can be scheduled"),
        (["--kept", "1.5"], "W needs 1.5 of the activations"),
        (["--kept", "nan"], "W needs nan of the activations"),
        (["--memory-limit", "0"], "a memory limit is a finite number above 0"),
        (["--memory-limit", "nan"], "a memory limit is a finite number above 0"),
        (["--memory-limit", "inf"], "a memory limit is a finite number above 0"),
        (["--memory-limit", "0.1"], "the least limit of those compared is "),
        (["--only", "1f1b", "--memory-limit", "7"], "compared is 8, that of 1F1B"),
        (["--only", "zb-h3"], "no schedule is called 'zb-h3'; did you mean ZB-H"),
        (["--only", "qqq"], "no schedule is called 'qqq'; there are GPipe, 1F1B"),
        (["--only", "interleaved1f1b", "--microbatches", "9"], "takes a multiple of 8"),
        (["--json", "no/out.json"], "cannot write no/out.json: there is no folder no"),
        (["--trace", "."], "cannot write .: it is a folder"),
        (["--picture", "out.pdf"], "a picture is .svg or .png, not .pdf"),
        (["--picture", "out"], "a picture is .svg or .png, not without a suffix"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [] if "--json" in args else ["--json", "out.json"]
    done = command(*args, *files)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.startswith("autoshard: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_fault() -> None:
    words = [word for pair in PAPER.items() for word in pair]
    code = f"{shlex.join([sys.executable, '-m', 'autoshard', 'schedule', *words])} | head -n 0"
    spec = find_spec("autoshard")
    assert spec is not None
    assert spec.origin is not None
    path = os.pathsep.join([str(Path(spec.origin).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        code, shell=True, env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr


def test_the_same_question_has_the_same_answer(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "c.json", "d.json")]
    first = command("--json", files[0], "--trace", files[1])
    second = command("--json", files[2], "--trace", files[3])
    assert first.stdout == second.stdout
    assert files[0].read_bytes() == files[2].read_bytes()
    assert files[1].read_bytes() == files[3].read_bytes()


def test_a_schedule_that_can_not_be_run_is_no_fault_of_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stuck(setting: Setting) -> Schedule:
        raise ScheduleError("it can not be")

    more = published.Published("stuck", stuck, pieces=2)
    monkeypatch.setattr(published, "PUBLISHED", (*PUBLISHED, more))
    done = command()
    assert done.exit_code == 0
    assert "  not made: stuck: it can not be\n" in done.stdout


# The page


def shown(text: str) -> Sequence[re.Match[str]]:
    return list(re.finditer(r"```text\n\$ (autoshard schedule [^\n]*)\n(.*?)```", text, re.S))


def test_the_page_shows_what_the_command_prints(request: pytest.FixtureRequest) -> None:
    text = PAGE.read_text()
    blocks = shown(text)
    assert len(blocks) >= 2
    for block in reversed(blocks):
        done = CliRunner().invoke(cli.app, shlex.split(block[1])[1:])
        assert done.exit_code == 0, done.stderr
        printed = "".join(line.rstrip() + "\n" for line in done.stdout.splitlines())
        if request.config.getoption("--update-golden"):
            text = text[: block.start(2)] + printed + text[block.end(2) :]
        else:
            how = "renew it: pytest tests/autoshard/test_cli_schedule.py --update-golden"
            assert block[2] == printed, how
    if request.config.getoption("--update-golden"):
        PAGE.write_text(text)


def test_the_page_tells_of_every_schedule() -> None:
    table = PAGE.read_text().partition("## The schedules")[2].partition("\n## ")[0]
    assert [p.name for p in PUBLISHED if f"\n| {p.name} |" not in table] == []
