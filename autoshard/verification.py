"""Is a prediction true?  The plan is compiled for its real target, without hardware, and compared.

Bytes, seconds and memory are compared, never names of collectives: XLA turns a reduce-scatter into
an all-reduce and a slice, or into a ring of permutes, when it likes. A collective is foreseen when
the plan has as many bytes to send along its axes, on its line of the user's code or on another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax

from autoshard.ask_compiler import ask_compiler
from autoshard.compiled import Found, Profile, fits
from cost_models.cluster import Cluster
from cost_models.collectives import Collective, sent_bytes
from passes.ir.plan import Cost, Plan

# The plan's bytes and XLA's differ by padding, and by a sum that XLA makes in another type.
_NEARLY = 0.02


@dataclass(frozen=True, slots=True)
class Seen:
    """A collective of the compiled program, and how many of its bytes the plan foresaw.

    here: those that the plan sends on the same line; elsewhere: those of other lines.
    """

    found: Found
    axes: tuple[str, ...]
    here: float
    elsewhere: float

    @property
    def surprise(self) -> float:
        """Bytes that no line of the plan accounts for, per device and step."""
        left = self.found.sent - self.here - self.elsewhere
        return left if left > _NEARLY * self.found.sent else 0.0


@dataclass(frozen=True, slots=True)
class Verification:
    """A plan's prediction beside what its compiled program does.

    compiled: None where the compiler found that the program does not fit; needed: the bytes it said
    it wanted then. unseen: by line, bytes per device and step that the plan sends and XLA does not.
    added: options that the compiler had to be given beside `options`.
    """

    name: str
    cluster: str
    mesh: tuple[tuple[str, int], ...]
    memory_limit: float
    predicted: Cost
    compiled: Profile | None
    needed: float
    seen: tuple[Seen, ...]
    unseen: tuple[tuple[str, float], ...]
    options: Mapping[str, Any]
    added: Mapping[str, str]
    solver: str = ""
    others: tuple[Verification, ...] = ()

    @property
    def judged(self) -> float:
        """Seconds of a step by the compiled program; infinite where it does not fit.

        Compute is predicted where the compiler estimates none.
        """
        if self.compiled is None or not self.fits:
            return math.inf
        if self.compiled.step is not None:
            return self.compiled.step
        return self.predicted.compute_time + self.compiled.comm

    @property
    def fits(self) -> bool:
        """Whether the compiled program fits into the devices' memory."""
        return fits(self.compiled, self.memory_limit)

    def __str__(self) -> str:
        from autoshard.report_compiled import report

        return report(self)


def verify(
    plan: Plan,
    lower: Callable[[Sequence[Any]], jax.stages.Lowered],
    devices: Sequence[Any],
    options: Mapping[str, Any],
) -> Verification:
    """Compile a plan for these devices and compare. lower: makes its program for them.

    Raises CompilerRefused where the compiler finds fault with more than the program's memory.
    """
    cluster = Cluster.from_dict(plan.cluster)
    found = ask_compiler(lower(devices), cluster, plan.mesh_axes.sizes, options, plan.name)
    seen, unseen = match(plan, found.compiled.collectives if found.compiled else ())
    return Verification(
        name=plan.name,
        cluster=str(cluster),
        mesh=plan.mesh,
        memory_limit=plan.memory_limit,
        predicted=plan.cost,
        compiled=found.compiled,
        needed=found.needed,
        seen=seen,
        unseen=unseen,
        options=dict(options),
        added=found.added,
        solver=plan.solver,
    )


def match(
    plan: Plan, found: Sequence[Found]
) -> tuple[tuple[Seen, ...], tuple[tuple[str, float], ...]]:
    """Each collective with the bytes that the plan foresaw; by line, those it foresaw in vain."""
    sizes = dict(plan.mesh)
    left: dict[tuple[str, tuple[str, ...]], float] = {}
    for op in plan.ops:
        for move in op.collectives:
            size = math.prod(sizes[axis] for axis in move.axes)
            key = move.source, tuple(sorted(move.axes))
            kind = cast(Collective, move.kind)
            sent = sent_bytes(kind, move.nbytes, size) * move.trips
            left[key] = left.get(key, 0.0) + sent
    order = sorted(found, key=lambda f: -f.sent)
    here: dict[int, float] = {}
    for f in order:
        here[id(f)] = _take(left, f.sent, [(f.source, _axes(f, plan))])
    seen = []
    for f in order:
        axes = _axes(f, plan)
        wanted = f.sent - here[id(f)]
        along = [key for key in sorted(left) if not axes or set(key[1]) <= set(axes)]
        elsewhere = _take(left, wanted, along) if wanted > _NEARLY * f.sent else 0.0
        seen.append(Seen(f, axes, here[id(f)], elsewhere))
    lines: dict[str, float] = {}
    for (source, _), sent in left.items():
        if sent > 0:
            lines[source] = lines.get(source, 0.0) + sent
    return tuple(seen), tuple(sorted(lines.items(), key=lambda item: (-item[1], item[0])))


def _axes(f: Found, plan: Plan) -> tuple[str, ...]:
    return tuple(sorted(plan.mesh[a][0] for a in f.axes)) if f.axes is not None else ()


def _take(
    left: dict[tuple[str, tuple[str, ...]], float],
    wanted: float,
    keys: Sequence[tuple[str, tuple[str, ...]]],
) -> float:
    """Take what is wanted from what is left under these keys; how much there was."""
    taken = 0.0
    for key in keys:
        part = min(wanted - taken, left.get(key, 0.0))
        if part > 0:
            left[key] -= part
            taken += part
    return taken
