"""What does `autoshard schedule` print and write?  A table of schedules, and the best over time.

Those above the memory limit stand below those within it, and those that can not be made last, each
with the reason. What is shown over time, drawn and traced is the best, or those asked for by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from autoshard import atomic_file, timeline_picture, timeline_text
from autoshard.columns import columns
from autoshard.timeline_trace import as_trace
from passes.pipeline.published import Made, Setting, schedules, weights_held
from passes.pipeline.schedule import ScheduleError
from passes.pipeline.timeline import Timeline

_ROOM = 1e-9  # of the limit: as far as sums of activations may differ
_PROVEN = 1e-6  # of the makespan: as far as a bound may be below it and prove it
_WIDTH = 100  # where there is no terminal
_TOO_MANY = "more tasks than letters: each is one of those at its time; --picture, --trace show all"


@dataclass(frozen=True)
class Compared:
    """entries: those that could be made, in the table's order. left_out: the others.

    shown: over time, as text, in pictures and traces.
    """

    setting: Setting
    entries: tuple[Entry, ...]
    left_out: tuple[Made, ...]
    shown: tuple[Timeline, ...]


@dataclass(frozen=True)
class Entry:
    """One schedule. makespan and peak are rounded, so that sums in another order are alike."""

    name: str
    timeline: Timeline
    makespan: float
    peak: float
    fits: bool
    bound: float | None


def compare(setting: Setting, only: Sequence[str] = ()) -> Compared:
    """All schedules of a setting, the best first. Raises ScheduleError where none can be used."""
    found = schedules(setting, only)
    entries = [_entry(m, m.timeline, setting.limit) for m in found if m.timeline is not None]
    left_out = tuple(made for made in found if made.timeline is None)
    if not entries:
        raise ScheduleError("; ".join(map(_reason, left_out)))
    entries.sort(key=lambda e: (not e.fits, e.makespan, e.peak))
    if not entries[0].fits:
        least = min(entries, key=lambda e: (e.peak, e.makespan))
        raise ScheduleError(
            f"no schedule stays within {setting.limit:.12g} activations per device; the least "
            f"limit of those compared is {least.peak:.12g}, that of {least.name}"
        )
    shown = tuple(e.timeline for e in (entries if only else entries[:1]))
    return Compared(setting, tuple(entries), left_out, shown)


def _entry(made: Made, timeline: Timeline, limit: float | None) -> Entry:
    peak = max(timeline.peaks)
    fits = limit is None or peak <= limit * (1 + _ROOM)
    makespan = _rounded(timeline.makespan)
    return Entry(made.name, timeline, makespan, _rounded(peak), fits, made.bound)


def _rounded(number: float) -> float:
    return float(f"{number:.12g}")


# The table


def table(found: Compared) -> str:
    """What was asked, every schedule in a line, and the reasons of those that are not there."""
    setting, best = found.setting, found.entries[0]
    lines: list[tuple[str, ...]] = [
        ("schedule", "makespan", "", "bubble", "peak", "sends", "time", "weights", "")
    ]
    lines += [_line(entry, best, setting) for entry in found.entries]
    limit = "" if setting.limit is None else f", at most {setting.limit:g} activations per device"
    return "\n".join(
        [
            f"{setting.devices} stages, {setting.microbatches} microbatches{limit}",
            f"  F {setting.forward:g}, B {setting.backward:g}, W {setting.weight:g}, "
            f"send {setting.send:g}, offload {setting.over_host_link:.4g}"
            f"{' (a guess)' * (setting.transfer is None)}; "
            f"W needs {setting.kept:.4g} of the activations",
            *columns(lines, "lrrrrrrrl", "  "),
            *(f"  not made: {_reason(made)}" for made in found.left_out),
            "peak: activations on the worst device, in those of one microbatch of one stage",
            "sends: of one microbatch between devices, and their time; weights: how often held",
        ]
    )


def _line(entry: Entry, best: Entry, setting: Setting) -> tuple[str, ...]:
    timeline = entry.timeline
    sends = timeline.sends / setting.microbatches
    return (
        entry.name,
        timeline_text.time(entry.makespan),
        f"{entry.makespan / best.makespan:.2f}x",
        f"{timeline.bubble:.1%}",
        f"{entry.peak:.4g}",
        f"{sends:.4g}",
        timeline_text.time(sends * setting.send),
        f"{weights_held(timeline.schedule):.4g}x",
        _remark(entry),
    )


def _remark(entry: Entry) -> str:
    if not entry.fits:
        return "above the limit"
    if entry.bound is None or not entry.makespan:
        return ""
    gap = 1 - entry.bound / entry.makespan
    return "optimal" if gap <= _PROVEN else f"at most {gap:.1%} above the optimum"


def _reason(made: Made) -> str:
    return made.reason if made.reason.startswith(made.name) else f"{made.name}: {made.reason}"


# Over time


def show_timelines(found: Compared) -> None:
    """Print what is shown over time to stdout, with colours where a terminal has them."""
    console = Console(highlight=False, soft_wrap=True)
    text = timelines_text(found.shown, console.width if console.is_terminal else _WIDTH)
    if console.is_terminal:
        console.print(text)
    else:
        print(text.plain)


def timelines_text(timelines: Sequence[Timeline], width: int) -> Text:
    """One below the other on the same scale, and what the letters mean."""
    out = Text()
    latency = max(timeline.latency for timeline in timelines)
    for timeline in timelines:
        out.append(f"\n{timeline.schedule.name}\n", "bold")
        for line in timeline_text.runs(timeline, width, latency):
            out.append_text(_coloured(line)).append("\n")
    kinds = sorted({row.kind for timeline in timelines for row in timeline.rows})
    out.append_text(_coloured(timeline_text.legend(kinds)))
    if not all(timeline_text.shows_all(timeline, width, latency) for timeline in timelines):
        out.append(f"\n{_TOO_MANY}")
    return out


def _coloured(line: Sequence[timeline_text.Run]) -> Text:
    out = Text()
    for run in line:
        colour = timeline_picture.COLOURS.get(run.kind)
        out.append(run.text, f"black on {colour}" if colour else "")
    return out


# Files


def check_files(picture: Path | None) -> None:
    """PictureError for a picture that can not be drawn, before anything is compared."""
    if picture is not None:
        timeline_picture.check(picture.suffix)


def write(found: Compared, json: Path | None, picture: Path | None, trace: Path | None) -> None:
    """The files that were asked for: each whole, or not at all."""
    contents: list[tuple[Path, str | bytes]] = []
    if json is not None:
        contents.append((json, as_json(found)))
    if picture is not None:
        contents.append((picture, timeline_picture.picture(found.shown, picture.suffix)))
    if trace is not None:
        contents.append((trace, as_trace(found.shown)))
    for path, content in contents:
        atomic_file.write(path, content)


def as_json(found: Compared) -> str:
    """{"schedules": [{"name", "makespan", "bubble", "peak_activation", "fits", "rows", "bound",
    "transfers"}]}.
    """
    body = [
        {
            "name": entry.name,
            "makespan": entry.makespan,
            "bubble": entry.timeline.bubble,
            "peak_activation": entry.peak,
            "fits": entry.fits,
            "rows": [list(row) for row in entry.timeline.rows],
            "bound": entry.bound,
            "transfers": [list(row) for row in entry.timeline.transfers],
        }
        for entry in found.entries
    ]
    return json.dumps({"schedules": body}) + "\n"
