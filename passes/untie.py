"""From layers that are alike to each layer by itself: `carried_over(alike, choice, free)`.

A problem in which what plays one role has one sharding (`passes.repeats`) is as large as a few
layers, however many there are. Its best choice is one of the problem in which every layer decides
for itself, too: at the same cost, with the same memory at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

from passes.answer import op_strategies, value_axes
from passes.priced import Priced


def carried_over(alike: Priced, choice: Sequence[int], free: Priced) -> list[int]:
    """A choice for the free problem that splits everything as this one of the other does.

    Both are of the same program on the same mesh.
    """
    values, strategies = value_axes(alike, choice), op_strategies(alike, choice)
    through = {
        (copy, free.graph.ops[o].inputs[k]): alike.copies[o, k]
        for (o, k), copy in free.copies.items()
        if (o, k) in alike.copies
    }
    out = []
    for node, meaning in enumerate(free.meanings):
        wanted: tuple[int, ...]
        if meaning.kind == "group":
            group = free.decisions.groups[meaning.index]
            v, mapping = next(iter(group.members.items()))
            wanted = tuple(mapping[e] if e >= 0 else e for e in values[v])
        elif meaning.kind == "op":
            wanted = strategies[meaning.index]
        elif meaning.kind == "copy":
            copy = through.get((node, meaning.index), -1)
            alone = values[meaning.index]  # each reader gets its own
            wanted = alike.meanings[copy].choices[choice[copy]] if copy >= 0 else alone
        else:
            wanted = meaning.choices[0]
        out.append(meaning.choices.index(wanted))
    return out
