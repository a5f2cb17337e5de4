"""Which schedules are there for a setting, and which can not be made?  `schedules(setting)`.

All generators, each by its name, with the costs of equal stages. A generator more is a line more in
`PUBLISHED`.

>>> setting = Setting(devices=4, microbatches=6, forward=1, backward=1, weight=1)
>>> for made in schedules(setting, ["1F1B", "interleaved 1F1B", "ZB-H1"]):
...     print(made.name, made.timeline.makespan if made.timeline else made.reason)
1F1B 27.0
interleaved 1F1B interleaved 1F1B takes a multiple of 4 microbatches (as many as devices), not 6; \
the nearest is 8
ZB-H1 21.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from passes.pipeline import both_ways, generators, offload, vee
from passes.pipeline.auto import Best, best_schedule
from passes.pipeline.schedule import Schedule, ScheduleError, straight, there_and_back
from passes.pipeline.stage_costs import StageCosts, even
from passes.pipeline.timeline import Timeline, simulate

_LEAST_WORK, _MOST_WORK = 1e-100, 1e100
SEARCHED = "auto"  # the name of what is the best for the costs


@dataclass(frozen=True, slots=True)
class Setting:
    """What is to be scheduled. Raises ScheduleError, in words, for what is no setting.

    forward, backward, weight: time of F, B and W of one microbatch on one device's whole stage;
    send: from one device to the next. kept: the part of the activations that W needs. chunks:
    pieces per device where a schedule leaves that open. transfer: of one microbatch's activations
    of one stage over the host link, one way; none for half of F, B and W. limit: of activations
    per device, in those of one microbatch of one stage; none for any amount.
    """

    devices: int
    microbatches: int
    forward: float
    backward: float
    weight: float
    send: float = 0.0
    kept: float = 0.5
    chunks: int = 2
    limit: float | None = None
    transfer: float | None = None

    def __post_init__(self) -> None:
        for what, many in (("stage", self.devices), ("microbatch", self.microbatches)):
            if many < 1:
                raise ScheduleError(f"a pipeline has at least one {what}, not {many}")
        if self.chunks < 1:
            raise ScheduleError(f"a device has at least one chunk, not {self.chunks}")
        times = (self.forward, self.backward, self.weight, self.send, self.transfer or 0.0)
        names = ("forward", "backward", "weight", "sending", "a transfer")
        for what, time in zip(names, times, strict=True):
            if not 0 <= time < math.inf:
                raise ScheduleError(
                    f"{what} takes {time:g}; a time is a finite number, not below 0"
                )
        work = self.forward + self.backward + self.weight
        if not _LEAST_WORK < work < _MOST_WORK:  # so that sums of it are numbers
            raise ScheduleError(
                f"forward, backward and weight take {work:g} together: nothing can be scheduled"
            )
        if not 0 <= self.kept <= 1:
            raise ScheduleError(
                f"W needs {self.kept:g} of the activations; that is a part of them, from 0 to 1"
            )
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ScheduleError(f"a memory limit is a finite number above 0, not {self.limit:g}")

    @property
    def over_host_link(self) -> float:
        """How long a transfer takes; where it is not known, all of them just fit into a step."""
        half = (self.forward + self.backward + self.weight) / 2
        return half if self.transfer is None else self.transfer

    def costs(self, chunks: int = 1) -> StageCosts:
        """Those of each piece, so many on a device."""
        return self.for_pieces(self.devices * chunks)

    def for_pieces(self, pieces: int) -> StageCosts:
        """Those of each piece, where the model is cut into so many."""
        return even(
            self.devices,
            pieces,
            self.forward,
            self.backward,
            self.weight,
            self.send,
            self.kept,
            self.over_host_link,
        )


@dataclass(frozen=True, slots=True)
class OfPieces:
    """A setting whose pieces have costs of their own. Fields as those of `Setting`, limit in their
    unit of memory.
    """

    devices: int
    microbatches: int
    chunks: int
    pieces: StageCosts
    limit: float | None = None

    def costs(self, chunks: int = 1) -> StageCosts:
        """Those of each piece; ScheduleError where the model is not cut so."""
        return self.for_pieces(self.devices * chunks)

    def for_pieces(self, pieces: int) -> StageCosts:
        """The same, of so many pieces in all."""
        if pieces != self.pieces.pieces:
            raise ScheduleError(f"the model is cut into {self.pieces.pieces} pieces, not {pieces}")
        return self.pieces


@dataclass(frozen=True, slots=True)
class Published:
    """A generator by its name. pieces: per device; none for as many as the setting's chunks.

    apart: whether B and W are tasks of their own. ways: in how many directions microbatches go.
    """

    name: str
    make: Callable[[Setting | OfPieces], Schedule | Best]
    pieces: int | None = 1
    apart: bool = True
    ways: int = 1


def _best(setting: Setting | OfPieces) -> Best:
    """The best schedule within the limit, or with all microbatches under way."""
    ways = None
    if isinstance(setting, OfPieces):
        ways = [straight(setting.devices)]
        if setting.chunks > 1:
            ways = [there_and_back(setting.devices)]
        most = sum(setting.pieces.activation) * setting.microbatches
        limit = most if setting.limit is None else setting.limit
    else:
        limit = float(setting.microbatches) if setting.limit is None else setting.limit
    return best_schedule(setting.devices, setting.microbatches, setting.for_pieces, limit, ways)


PUBLISHED = (
    Published("GPipe", lambda s: generators.gpipe(s.devices, s.microbatches), apart=False),
    Published("1F1B", lambda s: generators.one_f_one_b(s.devices, s.microbatches), apart=False),
    Published("eager 1F1B", lambda s: generators.eager(s.devices, s.microbatches), apart=False),
    Published(
        "interleaved 1F1B",
        lambda s: generators.interleaved(s.devices, s.microbatches, s.chunks),
        pieces=None,
        apart=False,
    ),
    Published("2BP", lambda s: generators.two_bp(s.devices, s.microbatches)),
    Published("ZB-H1", lambda s: generators.zb_h1(s.devices, s.microbatches)),
    Published("ZB-H2", lambda s: generators.zb_h2(s.devices, s.microbatches)),
    Published("V-Min", lambda s: vee.v_min(s.devices, s.microbatches), 2),
    Published("V-Half", lambda s: vee.v_half(s.devices, s.microbatches), 2),
    Published("ZB-V", lambda s: vee.zb_v(s.devices, s.microbatches, s.costs(2)), 2),
    Published("DualPipe", lambda s: both_ways.dualpipe(s.devices, s.microbatches), 2, ways=2),
    Published("BitPipe", lambda s: both_ways.bitpipe(s.devices, s.microbatches), 4, ways=2),
    Published(
        "PipeOffload",
        lambda s: offload.pipe_offload(s.devices, s.microbatches, s.chunks, s.costs(s.chunks)),
        pieces=None,
    ),
    Published(SEARCHED, _best),
)


@dataclass(frozen=True)
class Made:
    """A schedule with its times, or the reason why there is none.

    pieces: per device. bound: no schedule of one or two pieces per device takes less; none where
    nobody asked.
    """

    name: str
    pieces: int
    timeline: Timeline | None
    reason: str = ""
    bound: float | None = None


def chunks_of(schedule: Published) -> int | None:
    """How many pieces of the model a device has in each direction; None where that is open."""
    return None if schedule.pieces is None else schedule.pieces // schedule.ways


def published(name: str) -> Published:
    """The schedule of that name, however it is spelt; ScheduleError where there is none."""
    return _called(name)


def timeline_of(name: str, setting: OfPieces) -> Timeline:
    """A schedule of that name with the costs of its pieces; ScheduleError where there is none."""
    made = _called(name).make(setting)
    if isinstance(made, Best):
        schedule = replace(made.timeline.schedule, name=published(name).name)
        return replace(made.timeline, schedule=schedule)
    return simulate(made, setting.costs(made.pieces // made.devices))


def schedules(setting: Setting, only: Sequence[str] = ()) -> tuple[Made, ...]:
    """Every schedule that has been published, or those of these names, in the order of the list."""
    wanted = {_called(name).name for name in only}
    return tuple(_made(p, setting) for p in PUBLISHED if not only or p.name in wanted)


def _searched(name: str, best: Best) -> Made:
    schedule = replace(best.timeline.schedule, name=name)
    pieces = schedule.pieces // schedule.devices
    return Made(name, pieces, replace(best.timeline, schedule=schedule), bound=best.bound)


def _made(published: Published, setting: Setting) -> Made:
    try:
        schedule = published.make(setting)
        if isinstance(schedule, Best):
            return _searched(published.name, schedule)
        timeline = simulate(schedule, setting.costs(schedule.pieces // schedule.devices))
    except ScheduleError as error:
        pieces = setting.chunks if published.pieces is None else published.pieces
        return Made(published.name, pieces, None, str(error))
    return Made(published.name, schedule.pieces // schedule.devices, timeline)


def _called(name: str) -> Published:
    """The schedule of that name, however it is spelt; ScheduleError where there is none."""
    known = {_plain(p.name): p for p in PUBLISHED}
    if _plain(name) in known:
        return known[_plain(name)]
    near = get_close_matches(_plain(name), known, n=1)
    guess = f"did you mean {known[near[0]].name}? There" if near else "there"
    names = ", ".join(p.name for p in PUBLISHED)
    raise ScheduleError(f"no schedule is called {name!r}; {guess} are {names}")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def weights_held(schedule: Schedule) -> float:
    """How often all devices together hold the model's weights: twice where they hold both ways."""
    return len({place for way in schedule.ways for place in way}) / schedule.pieces
