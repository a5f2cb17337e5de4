"""How long does each task take, and what does it hold?  `StageCosts`, per piece of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from passes.pipeline.schedule import ScheduleError


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Per piece: seconds of a microbatch's tasks, and what its activations take.

    forward, backward, weight: of F, B and W; a BW takes as long as B and W. send: from one device
    to the next. activation: held from the forward task to the end of B; kept: the part of it that W
    needs, too. transfer: seconds that the activations of a microbatch take over the host link, one
    way; none of any piece where nothing can be offloaded. Any unit of time, and any of memory.
    Raises ScheduleError for what is no cost.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    send: float
    activation: tuple[float, ...]
    kept: tuple[float, ...]
    transfer: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        every = [self.forward, self.backward, self.weight, self.activation, self.kept]
        every += [self.transfer] if self.transfer else []
        if len({len(each) for each in every}) != 1:
            raise ScheduleError("costs are needed of every piece, of each kind")
        if any(not (0 <= x < math.inf) for each in (*every, (self.send,)) for x in each):
            raise ScheduleError("costs are finite numbers, none below zero")
        if any(k > a for k, a in zip(self.kept, self.activation, strict=True)):
            raise ScheduleError("what W needs is a part of the activations")

    @property
    def pieces(self) -> int:
        """Of how many pieces these are the costs."""
        return len(self.forward)

    def seconds(self, kind: str, piece: int) -> float:
        """How long a task takes."""
        if kind == "F":
            return self.forward[piece]
        if kind == "B":
            return self.backward[piece]
        if kind == "W":
            return self.weight[piece]
        if kind in ("O", "R"):
            if not self.transfer:
                raise ScheduleError("what is offloaded needs a time for it: the costs say none")
            return self.transfer[piece]
        return self.backward[piece] + self.weight[piece]


def even(
    devices: int,
    pieces: int,
    forward: float,
    backward: float,
    weight: float,
    send: float = 0.0,
    kept: float = 1.0,
    transfer: float | None = None,
) -> StageCosts:
    """Equal pieces of stages that cost so much: times and activations of a device's share.

    The activations of one microbatch of one stage are the unit of memory. kept: the part of them
    that W needs. transfer: of these over the host link, one way; none where that is not possible.
    """
    share = devices / pieces
    f, b, w = (tuple([x * share] * pieces) for x in (forward, backward, weight))
    held, needed = tuple([share] * pieces), tuple([kept * share] * pieces)
    sent = () if transfer is None else tuple([transfer * share] * pieces)
    return StageCosts(f, b, w, send, held, needed, sent)
