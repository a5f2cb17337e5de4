"""Which activations can wait in the memory of the host, and when do they go there and back?

PipeOffload (Wan et al., arXiv 2503.01328). A device's activations lie idle between F and B. They
are sent to the host after F, and fetched back in time for B, beside the compute.

*Budget*: with t_O for a piece's activations over the host link, one way,

  k = 2 t_O / (F + B + W)

All can be offloaded where k <= 1, but for those that B needs at once; otherwise about 1/k of them.
`offloaded` leaves all compute tasks as early as they are. Step by step it looks at the first peak
of a device and offloads, of the pieces that lie there then, the one needed last (as Belady's rule
does for caches, IBM Systems Journal 5(2), 1966), as long as the link can bring all back in time.
Those are the chunks that are held longest, and of these an even selection over time.

*More than linear*: memory is the sum of how long pieces are held. `spread` lays the tasks of a
microbatch out so that they repeat evenly: with v chunks on each of p devices, F = 1 and BW = 2 of a
chunk, every 3v. Chunk c of device d is then held for

  3 (p-1-d) + 3 + (a+b) (v-1-c),   a >= p, b >= 2p: from one chunk to the next, there and back

With v = 2 that is 6p and 3p on the first of many devices: 3/4 p microbatches of activations, and
the half that is held longer makes two thirds of them. In interleaved 1F1B the chunks take turns in
groups of p microbatches, and more lies there at a time. It has a smaller bubble: a spread schedule
of equal stages takes as long as 1F1B. `offloaded` takes any of them.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from passes.pipeline.schedule import Schedule, ScheduleError, Task, Transfer, straight
from passes.pipeline.stage_costs import StageCosts, even
from passes.pipeline.timeline import Row, Timeline, simulate

Numbers = npt.NDArray[np.float64]

_NEAR = 1e-12  # of a time or an amount: as far as sums that make it up may differ


def pipe_offload(
    devices: int, microbatches: int, chunks: int = 2, costs: StageCosts | None = None
) -> Schedule:
    """A spread schedule, offloaded as far as the link keeps up.

    costs: by default of equal stages, F = B = W, and k = 2: half of the pieces can be offloaded.
    """
    if costs is None:
        costs = even(devices, devices * chunks, 1, 1, 1, transfer=3)
    schedule = offloaded(spread(devices, microbatches, chunks), costs)
    return dataclasses.replace(schedule, name="PipeOffload")


def spread(devices: int, microbatches: int, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B in which each microbatch repeats what the one before it did, evenly later.

    It takes any number of microbatches. Devices do their tasks in the order of the times that these
    have by the pattern; these times respect what waits for what, so that no order gets stuck.
    """
    if chunks < 1:
        raise ScheduleError(f"a device holds at least one chunk, not {chunks}")
    there, back = _step(devices, chunks), _step(2 * devices, chunks)
    turn = there * (chunks - 1) + 3 * (devices - 1) + 1  # the first BW on the first device
    orders = []
    for d in range(devices):
        times = [
            (3 * chunks * m + at, task)
            for m in range(microbatches)
            for c in range(chunks)
            for at, task in (
                (there * c + d, Task("F", m, c)),
                (turn - 2 * d + back * (chunks - 1 - c), Task("BW", m, c)),
            )
        ]
        orders.append(tuple(task for _, task in sorted(times)))
    way = straight(devices, chunks)
    return Schedule("spread 1F1B", (way,), (0,) * microbatches, tuple(orders))


def _step(least: int, chunks: int) -> int:
    """Time between a chunk and the next: such that the chunks of a device never meet."""
    thirds = -(-least // 3)
    while math.gcd(thirds, chunks) > 1:
        thirds += 1
    return 3 * thirds


def offloaded(schedule: Schedule, costs: StageCosts, most: float = 1.0) -> Schedule:
    """The schedule with transfers that lower the peak of each device as far as its link keeps up.

    most: the part of a device's pieces that may be offloaded. No compute task begins later than
    without transfers.
    """
    if not costs.transfer:
        return schedule
    alone = simulate(dataclasses.replace(schedule, transfers=()), costs)
    links = [_Link(alone, d) for d in range(schedule.devices)]
    return dataclasses.replace(schedule, transfers=tuple(link.transfers(most) for link in links))


class _Stay(NamedTuple):
    """Activations of a device, from the end of F to the start of B; and a transfer one way.

    first, last: which of the device's tasks these are.
    """

    made: float
    needed: float
    takes: float
    first: int
    last: int


class _Link:
    """The host link of one device, beside compute tasks whose times are settled."""

    def __init__(self, timeline: Timeline, device: int) -> None:
        self.device, self.costs = device, timeline.costs
        self.rows = [row for row in timeline.rows if row.device == device]
        self.starts = [row.start for row in self.rows]
        line = timeline.memory[device]
        before = (0.0, *(held for _, held in line))
        self.changes = [(t, held - last) for (t, held), last in zip(line, before, strict=False)]
        self.pieces = {
            (r.microbatch, r.chunk): timeline.schedule.piece(device, r.task) for r in self.rows
        }
        first = {(r.microbatch, r.chunk): i for i, r in enumerate(self.rows) if r.kind == "F"}
        self.stays = []
        for last, row in enumerate(self.rows):
            if row.kind in ("B", "BW"):
                name = row.microbatch, row.chunk
                takes, f = timeline.costs.transfer[self.pieces[name]], first[name]
                self.stays.append(_Stay(self.rows[f].end, row.start, takes, f, last))

    def transfers(self, most: float) -> tuple[Transfer, ...]:
        """What the link does: pieces are chosen one by one, while that lowers the peak."""
        chosen, plan = list[_Stay](), list[Row]()
        by_need = sorted(self.stays, key=lambda s: -s.last)
        while len(chosen) + 1 <= most * len(self.stays):
            found = self._next(chosen, plan, by_need)
            if found is None:
                break
            stay, plan = found
            chosen.append(stay)
            by_need.remove(stay)
        last = {(self.rows[s.last].microbatch, self.rows[s.last].chunk): s.last for s in chosen}
        return tuple(
            Transfer(r.task, self._beside(r.start, last[r.microbatch, r.chunk]).task)
            if r.kind == "R"
            else Transfer(r.task)
            for r in plan
        )

    def _next(
        self, chosen: list[_Stay], plan: list[Row], by_need: list[_Stay]
    ) -> tuple[_Stay, list[Row]] | None:
        """The piece needed last of those that lower the first peak, and the plan with it."""
        times, held = self._held(plan)
        peak = held.max()
        when = float(times[np.argmax(held >= peak * (1 - _NEAR))])
        for stay in by_need:
            if stay.made + stay.takes <= when < stay.needed - stay.takes:
                trial = self._plan([*chosen, stay])
                if trial is not None and self._lowers(trial, when, peak):
                    return stay, trial
        return None

    def _lowers(self, trial: list[Row], when: float, peak: float) -> bool:
        """Whether less than the peak is held at a time, and nowhere more."""
        times, held = self._held(trial)
        then = held[np.searchsorted(times, when, side="right") - 1]
        return bool(then < peak * (1 - _NEAR) and held.max() <= peak * (1 + _NEAR))

    def _held(self, plan: list[Row]) -> tuple[Numbers, Numbers]:
        """What is held from which times on; of changes at one time, the last tells it."""
        size = self.costs.activation
        changes = [
            (r.start, size[k]) if r.kind == "R" else (r.end, -size[k])
            for r in plan
            for k in [self.pieces[r.microbatch, r.chunk]]
        ]
        both = np.array([*self.changes, *changes])
        both = both[np.lexsort((both[:, 1], both[:, 0]))]
        return both[:, 0], np.cumsum(both[:, 1])

    def _plan(self, stays: Sequence[_Stay]) -> list[Row] | None:
        """When the link does what; None where it can not bring all back in time.

        Offloads begin as soon as they can, but for reloads that would come too late. Reloads begin
        as late as they can, but for offloads that would have to wait.
        """
        out = deque(sorted(stays, key=lambda s: s.first))
        back = sorted(stays, key=lambda s: s.last)
        now, plan = 0.0, list[Row]()
        for stay, latest in zip(back, _latest(back), strict=True):
            while out and (
                out[0].first <= stay.first  # its own offload, or one before that
                or (out[0].first < stay.last and max(now, out[0].made) + out[0].takes <= latest)
            ):
                sent = out.popleft()
                plan.append(self._row("O", max(now, sent.made), sent))
                now = plan[-1].end
            if now > latest * (1 + _NEAR):
                return None
            wish = min(latest, out[0].made - stay.takes) if out else latest
            plan.append(self._row("R", max(now, self._beside(wish, stay.last).start), stay))
            now = plan[-1].end
        return plan

    def _row(self, kind: str, start: float, stay: _Stay) -> Row:
        row = self.rows[stay.first]
        return Row(self.device, start, start + stay.takes, kind, row.microbatch, row.chunk)

    def _beside(self, time: float, last: int) -> Row:
        """The last compute task that begins no later than at a time, and before that one."""
        return self.rows[max(0, min(bisect.bisect_right(self.starts, time), last) - 1)]


def _latest(back: Sequence[_Stay]) -> list[float]:
    """When reloads in this order must begin at the latest."""
    out, bound = [], math.inf
    for stay in reversed(back):
        bound = min(bound, stay.needed) - stay.takes
        out.append(bound)
    return out[::-1]
