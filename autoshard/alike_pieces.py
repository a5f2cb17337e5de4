"""Which pieces of a cut function are alike?  `form_of(cut, piece)`: equal for pieces that are.

A model of equal layers gives equal pieces but for the first and the last, and one price does for
all. The form of a piece is what its tasks and updates compute, from what: equations by name, the
rules of their operations and the types of their results, places numbered as they come, with the
types and views of what comes from outside. What no rule tells of an equation's parameters, such as
where a slice begins, is left out, as a plan's signature leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from autoshard.cut_program import CutProgram
from autoshard.time_loop import Equation
from passes.time_axis import Split


def form_of(cut: CutProgram, piece: int, named: bool) -> tuple[Any, ...]:
    """The form of a piece. named: whether the names of arguments count, for hints."""
    return tuple(_Form(cut, piece, named).parts())


class _Form:
    def __init__(self, cut: CutProgram, piece: int, named: bool) -> None:
        self.cut, self.piece, self.named = cut, piece, named
        self.program = cut.made.program
        self.numbers: dict[int, int] = {}

    def parts(self) -> Iterator[Any]:
        """Hashable parts, one after the other."""
        made = self.cut.made
        for task in made.of(self.piece):
            yield task.kind
            yield from self.equations(task.equations)
            sent = {p for t in made.tasks.values() if t.stage != self.piece for p in t.ins}
            yield tuple((self.number(p), p in sent) for p in task.outs)
            yield tuple(map(self.number, task.sums))
        for group in self.cut.groups:
            if group.stage == self.piece:
                yield from self.equations(group.equations)
                yield tuple(map(self.number, group.outs))

    def equations(self, found: Sequence[Equation]) -> Iterator[Any]:
        """Names, rules, and numbers of what goes in and comes out."""
        for e in found:
            name = e.eqn.primitive.name if e.eqn is not None else ""
            rules = self.cut.rules.get(e.path, ()) if name else ()
            ins = tuple(self.number(p) if isinstance(p, int) else str(p) for p in e.ins)
            yield name, rules, ins, tuple(map(self.number, e.outs))

    def number(self, p: int) -> Any:
        """The number of a place; where it is met for the first time, with what it is."""
        if p in self.numbers:
            return self.numbers[p]
        self.numbers[p] = len(self.numbers)
        aval, view = self.program.avals[p], self.program.views[p]
        argument = p in self.cut.names
        kept = self.cut.state.get(p) is not None
        name = self.cut.names.get(p, "") if self.named else ""
        seen = view if isinstance(view, Split) else str(view)
        return self.numbers[p], str(aval), seen, argument, kept, p in self.cut.donated, name
