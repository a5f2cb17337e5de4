"""What do tasks hand on to each other, where does it lie, and who is the last to need it?

A value that a task makes is sent at once to each stage that needs it, one time: from then on each
stage has its own, as the table has it, in which a stage holds what its backward tasks will need.
On a stage the tasks of a microbatch come in the order F, B, W, so that the last of them to need a
value is known beforehand. It is let go as that one is started; where a result of that task is like
it, and nobody else can see the memory, the result takes its memory over (donation).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoshard.stage_programs import StagePrograms, TaskProgram
from autoshard.step import local_shape

Key = tuple[int, str]  # stage and kind of a task
_ORDER = "FBW"


@dataclass(frozen=True)
class HandedOn:
    """homes: per place the task that makes it. users: per place the stages that need it.

    last: per task the places that it is the last to need on its stage.
    """

    homes: Mapping[int, Key]
    users: Mapping[int, tuple[int, ...]]
    last: Mapping[Key, tuple[int, ...]]


def handed_on(made: StagePrograms) -> HandedOn:
    """Who hands on what to whom."""
    homes = {p: key for key, task in made.tasks.items() for p in task.outs}
    kinds: dict[tuple[int, int], str] = {}
    for (stage, kind), task in made.tasks.items():
        for p in task.ins:
            kinds[p, stage] = max(kinds.get((p, stage), "F"), kind, key=_ORDER.index)
    users: dict[int, list[int]] = {p: [] for p in homes}
    for p, stage in sorted(kinds):
        users[p].append(stage)
    kept = {(p, homes[p][0]) for p in made.after if p in homes}
    last = {
        (stage, kind): tuple(
            p for p in task.ins if kinds[p, stage] == kind and (p, stage) not in kept
        )
        for (stage, kind), task in made.tasks.items()
    }
    return HandedOn(homes, {p: tuple(own) for p, own in users.items()}, last)


def donated(
    made: StagePrograms,
    task: TaskProgram,
    between: HandedOn,
    share: Callable[[int, int], bool],
    split: Callable[[int], Hashable] = lambda place: None,
) -> tuple[int, ...]:
    """Of what a task is the last to need: as many as its results can take the memory of.

    share: whether two stages lie on the same devices, where one array serves both. split: how the
    value of a place lies on the devices of a stage: memory is taken over by what lies alike.
    """

    def like(p: int) -> Hashable:
        program = made.program
        aval = program.avals[p]
        shape = local_shape(aval.shape, program.views[p], program.steps)
        return shape, aval.dtype, split(p)

    room = Counter(map(like, task.outs))
    out = []
    for p in between.last[task.stage, task.kind]:
        others = {between.homes[p][0], *between.users[p]} - {task.stage}
        if room[like(p)] and not any(share(task.stage, other) for other in others):
            room[like(p)] -= 1
            out.append(p)
    return tuple(out)


class Shelf:
    """The values of one step: by place, microbatch and stage."""

    def __init__(
        self, between: HandedOn, after: Sequence[int], send: Callable[[int, Any, int, int], Any]
    ) -> None:
        self.between, self.after, self.send = between, frozenset(after), send
        self.values: dict[tuple[int, int, int], Any] = {}

    def put(self, place: int, microbatch: int, stage: int, x: Any) -> None:
        """A value that a task has made, on its stage and on those that need it."""
        for user in self.between.users[place]:
            sent = x if user == stage else self.send(place, x, microbatch, user)
            self.values[place, microbatch, user] = sent
        if place in self.after:
            self.values[place, microbatch, stage] = x

    def take(self, task: TaskProgram, microbatch: int) -> dict[int, Any]:
        """What a task needs; what it is the last to need is let go."""
        stage, kind = task.stage, task.kind
        out = {p: self.values[p, microbatch, stage] for p in task.ins}
        for p in self.between.last[stage, kind]:
            del self.values[p, microbatch, stage]
        return out

    def activations(self, microbatch: int, stage: int) -> Iterator[tuple[int, int, int]]:
        """What forward tasks have made and the backward tasks of a stage still need."""
        waiting = {p for kind in "BW" for p in self.between.last.get((stage, kind), ())}
        for p in sorted(waiting):
            if self.between.homes[p][1] == "F" and (p, microbatch, stage) in self.values:
                yield p, microbatch, stage
