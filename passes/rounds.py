"""Which mesh is searched when?  `search_all(setting, meshes, solver, tell) -> Searched`.

The meshes are dealt out to two hands (`passes.hands`). Each prices its own, and then they search
them in rounds, the most promising first: both know what the best of the rounds before costs, and
search no further than to see that they can not beat it. Whether a hand is a process of its own
changes nothing of what is searched, and of what is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from passes.baselines import BASELINES
from passes.entries import Progress, Setting
from passes.hands import Answer, Elsewhere, Given, Here, Promise, hand
from passes.ir.mesh import Mesh
from passes.meshes import natural_meshes
from passes.priced import Priced

_HANDS = 2


@dataclass(frozen=True, slots=True)
class Searched:
    """promises: of every mesh. answers: by mesh. left: meshes that an interrupt left out.

    priced: the problem of a mesh, by its number.
    """

    promises: tuple[Promise, ...]
    answers: Mapping[int, Answer]
    left: int
    priced: Callable[[int], Priced]

    @property
    def won(self) -> list[int]:
        """The meshes that have an answer, the best first."""
        found = [k for k, a in self.answers.items() if a.cost]
        return sorted(found, key=lambda k: (self.answers[k].seconds, k))

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        stopped = (a.solution.stopped == "interrupted" for a in self.answers.values())
        return self.left > 0 or any(stopped)


def search_all(setting: Setting, meshes: Sequence[Mesh], solver: str, tell: Progress) -> Searched:
    """Search every mesh that may win. solver: "ilp", or the baseline that is not searched.

    Ctrl-C ends it with what was found; raises KeyboardInterrupt before anything is searched.
    """
    dealt = [list(range(h, len(meshes), _HANDS)) for h in range(min(_HANDS, len(meshes)))]
    given = _given(meshes)
    hands = [hand(setting, [given[k] for k in own], solver, own[0] == 0) for own in dealt]
    try:
        promises = _promises(hands, dealt, meshes, tell)
        answers, left = _play(hands, dealt, promises, lambda k: tell(f"mesh {meshes[k]}"))
    finally:
        for h in hands:
            h.close()

    def priced(k: int) -> Priced:
        return hands[k % _HANDS].priced(k // _HANDS)

    return Searched(tuple(promises[k] for k in range(len(meshes))), answers, left, priced)


def _given(meshes: Sequence[Mesh]) -> list[Given]:
    """Each mesh with the baselines that an expert would use on it; hints alone go with any."""
    natural = {name: natural_meshes(name, meshes) for name in BASELINES}
    return [
        Given(m, ("propagate", *(name for name in BASELINES if m in natural[name]))) for m in meshes
    ]


def _promises(
    hands: Sequence[Here | Elsewhere],
    dealt: Sequence[Sequence[int]],
    meshes: Sequence[Mesh],
    tell: Progress,
) -> dict[int, Promise]:
    """What every mesh promises."""
    out: dict[int, Promise] = {}
    for h, own in zip(hands, dealt, strict=True):
        told = h.promises()
        for k in own:
            tell(f"pricing mesh {meshes[k]}")
            out[k] = next(told)
    return out


def _play(
    hands: Sequence[Here | Elsewhere],
    dealt: Sequence[Sequence[int]],
    promises: Mapping[int, Promise],
    tell: Callable[[int], None],
) -> tuple[dict[int, Answer], int]:
    """The rounds: all answers, and how many meshes an interrupt left out."""
    fit = [[k for k in own if not promises[k].unfit] for own in dealt]
    queues = [sorted(own, key=lambda k: promises[k].seconds) for own in fit]
    answers: dict[int, Answer] = {}
    best, interrupted = math.inf, False
    while any(queues) and not interrupted:
        playing = [(hands[h], queue.pop(0)) for h, queue in enumerate(queues) if queue]
        for h, k in playing:
            h.begin(k // _HANDS, best)
        for h, k in playing:
            if interrupted:
                h.interrupt()
            try:
                tell(k)
                answers[k] = h.answer()
            except KeyboardInterrupt:
                interrupted = True
                continue
            interrupted |= answers[k].solution.stopped == "interrupted"
            best = min(best, answers[k].seconds)
    return answers, sum(map(len, fit)) - len(answers)
