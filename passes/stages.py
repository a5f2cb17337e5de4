"""Which device of a pipeline does what?  `stages_of(loop, backward, count) -> Stages`.

The loop over microbatches is cut into stages. Its forward equations are cut in program order, where
little crosses, into runs that take about as much: FLOPs, or seconds where these are known. What a
gradient added follows the forward part backwards: an equation of it lies in the stage whose weights
and activations it takes, never in a later one than the cotangents that it takes come from, so that
these go down the stages only.

In each stage the equations are (Qi et al., arXiv 2401.10241, section 2):

  F  forward
  B  backward, and needed by a stage before
  W  backward, and needed by none: the gradients of the stage's weights

which reachability tells, for any function. The first stage has nobody before: all of it is B.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from passes.ir.graph import Op
from passes.time_axis import WHOLE
from passes.time_loop import Path, TimeLoop, unit_path

_NEAR = 0.3  # of a stage's FLOPs: as far from its even share as a cut may lie


class NoStages(ValueError):
    """A function that can not be cut into so many stages; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Per equation of the loop, by its path: its stage, and its kind of task, "F", "B" or "W".

    flops: per stage those of each kind.
    """

    count: int
    stage: Mapping[Path, int]
    kind: Mapping[Path, str]
    flops: tuple[Mapping[str, float], ...]

    def joined(self) -> Stages:
        """The same stages with all that is backward in B."""
        kind = {path: "B" if k == "W" else k for path, k in self.kind.items()}
        flops = [{"F": f["F"], "B": f["B"] + f["W"], "W": 0.0} for f in self.flops]
        return Stages(self.count, self.stage, kind, tuple(flops))


@dataclass(frozen=True, slots=True)
class _Unit:
    path: Path
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    flops: float
    weight: float
    cheap: bool  # XLA computes it inside its readers


def stages_of(
    loop: TimeLoop,
    backward: Collection[Path],
    count: int,
    weights: Sequence[float] | None = None,
) -> Stages:
    """The stages of a loop. backward: paths of equations that a gradient added.

    weights: how much each operation takes, by which stages are made even; its FLOPs by default.
    Raises NoStages where there are fewer equations than stages.
    """
    units = _units(loop, weights)
    forward, back = _both_halves(units, backward)
    stage = _cut(loop, forward, back, count)
    placed = {v.id for v in loop.graph.values if v.type.size > 1 and v.kind != "literal"}
    _follow(forward, back, stage, count, placed)
    kind = dict.fromkeys((u.path for u in forward), "F") | _kinds(back, stage)
    flops = [dict.fromkeys("FBW", 0.0) for _ in range(count)]
    for u in units:
        flops[stage[u.path]][kind[u.path]] += u.flops
    return Stages(count, stage, kind, tuple(flops))


def _both_halves(
    units: Sequence[_Unit], backward: Collection[Path]
) -> tuple[list[_Unit], list[_Unit]]:
    """Forward and backward equations.

    What is made of a gradient is backward, too: the norm of one sample's gradient, or a penalty of
    it and the gradient of that.
    """
    forward, back = list[_Unit](), list[_Unit]()
    gradients: set[int] = set()
    for u in units:
        if u.path in backward or not gradients.isdisjoint(u.inputs):
            back.append(u)
            gradients.update(u.outputs)
        else:
            forward.append(u)
    return forward, back


def _units(loop: TimeLoop, weights: Sequence[float] | None) -> list[_Unit]:
    """The equations of the loop, calls inlined."""
    graph, by_path = loop.graph, dict[Path, list[Op]]()
    for op in graph.ops:
        path = unit_path(op)
        if loop.phases[path] == "loop":
            by_path.setdefault(path, []).append(op)
    out = []
    for path, ops in by_path.items():
        made = {v for op in ops for v in op.outputs}
        inputs = tuple(dict.fromkeys(v for op in ops for v in op.inputs if v not in made))
        flops = sum(op.rule.flops * graph.trips(op.region) for op in ops)
        weight = flops if weights is None else sum(weights[op.id] for op in ops)
        cheap = all(op.rule.fuses for op in ops)
        out.append(_Unit(path, inputs, tuple(made), flops, weight, cheap))
    return out


def _cut(
    loop: TimeLoop, forward: Sequence[_Unit], back: Sequence[_Unit], count: int
) -> dict[Path, int]:
    """Forward equations in runs of about as many FLOPs, cut where the fewest bytes cross.

    Not where something crosses that is computed again: all of that part would be, on one side.
    """
    if len(forward) < count:
        raise NoStages(
            f"{loop.graph.name} has {len(forward)} forward operations in its loop: too few for "
            f"{count} stages"
        )
    done = list(itertools.accumulate(u.weight for u in forward))
    values, free = loop.graph.values, _anywhere(loop, forward)
    crossing = _crossing(forward, {v.id: v.type.nbytes * (v.id not in free) for v in values})
    kept = {v for u in back for v in u.inputs} | free
    again = _crossing(forward, {v.id: int(v.id not in kept) for v in values})
    cuts = [0]
    for k in range(1, count):
        before = done[cuts[-1] - 1] if cuts[-1] else 0.0
        share = (done[-1] - before) / (count - k + 1)  # of what is left
        far = [abs(x - before - share) for x in done]
        free_to_cut = range(cuts[-1] + 1, len(forward) - (count - k) + 1)
        near = [i for i in free_to_cut if far[i - 1] <= _NEAR * share]
        near = near or [min(free_to_cut, key=lambda i: far[i - 1])]
        cuts.append(min(near, key=lambda i: (again[i], crossing[i], far[i - 1], i)))
    bounds = [*cuts, len(forward)]
    return {u.path: s for s in range(count) for u in forward[bounds[s] : bounds[s + 1]]}


def _anywhere(loop: TimeLoop, forward: Sequence[_Unit]) -> set[int]:
    """Values in which nothing of the batch is, and that cost little: each stage makes its own."""
    outside = {v.id for v in loop.graph.values if loop.views[v.id] is WHOLE}
    free: set[int] = set()
    for u in forward:
        if u.cheap and all(v in free or v in outside for v in u.inputs):
            free.update(u.outputs)
    return free


def _crossing(forward: Sequence[_Unit], weight: Mapping[int, int]) -> list[int]:
    """The weight of what crosses from the first i forward equations to the rest, for each i."""
    made = {v: i for i, u in enumerate(forward) for v in u.outputs}
    change = [0] * (len(forward) + 1)
    last = {v: i for i, u in enumerate(forward) for v in u.inputs if v in made}
    for v, i in last.items():
        change[made[v] + 1] += weight[v]
        change[i + 1] -= weight[v]
    return list(itertools.accumulate(change))


def _follow(
    forward: Sequence[_Unit],
    back: Sequence[_Unit],
    stage: dict[Path, int],
    count: int,
    placed: Collection[int],
) -> None:
    """Backward equations go where what they take lies, and never up. placed: arrays."""
    homes: dict[int, set[int]] = {}
    for u in forward:
        for v in (*u.inputs, *u.outputs):
            homes.setdefault(v, set()).add(stage[u.path])
    made: dict[int, int] = {}
    for u in back:
        top = min((made[v] for v in u.inputs if v in made), default=count - 1)
        known = [homes[v] for v in u.inputs if v in homes and v in placed and v not in made]
        below = [{h for h in at if h <= top} for at in known if min(at) <= top]
        # Where all of it lies, of masks and the like that lie everywhere; else where the last does.
        both = set.intersection(*below) if below else {top}
        stage[u.path] = max(both or set.union(*below))
        made.update(dict.fromkeys(u.outputs, stage[u.path]))


def _kinds(back: Sequence[_Unit], stage: Mapping[Path, int]) -> dict[Path, str]:
    """B where a stage before needs it, W where none does."""
    wanted: set[int] = set()  # values that reach a stage before the one they are made in
    readers: dict[int, set[int]] = {}
    kind = {}
    for u in reversed(back):
        own = stage[u.path]
        needed = any(v in wanted or any(s < own for s in readers.get(v, ())) for v in u.outputs)
        kind[u.path] = "B" if needed or own == 0 else "W"
        for v in u.inputs:
            readers.setdefault(v, set()).add(own)
            if needed:
                wanted.add(v)
    return kind
