"""What does a compiled program do?  Its collectives, compute time, step time and memory.

The schedule is replayed: one line of compute, one of communication. Instructions take the cycles
that XLA:TPU estimates for them; a collective takes the seconds of `cost_models.collectives`, as
XLA estimates none. One that is started and awaited later runs beside the compute in between; one
that is fused with compute runs beside that. A loop runs as often as it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from autoshard.hlo import Computation, Frame, Instruction, Module, nbytes, read
from autoshard.hlo_groups import Groups, axes_of, groups
from autoshard.hlo_trips import Scalars, trip_count
from autoshard.sources import line_of
from cost_models.cluster import Cluster
from cost_models.collectives import Collective, seconds, sent_bytes
from cost_models.topology import ALONE, AxisLink, join

KINDS: Mapping[str, Collective] = {
    "all-gather": "all_gather",
    "all-reduce": "all_reduce",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "permute",
    "collective-broadcast": "broadcast",
}

_STARTS = frozenset({*(f"{name}-start" for name in KINDS), "async-start"})
_BESIDE = frozenset({"copy-start", "slice-start"})  # moves between memories, awaited later


@dataclass(frozen=True, slots=True)
class Found:
    """One collective of a compiled program.

    nbytes: of the larger of its local operand and local result. size: devices of a group. axes: of
    the mesh, None where a group is no whole axes of it. trips: how often a step runs it. seconds:
    of all trips. source: the user's line. hidden: whether it runs beside compute.
    """

    kind: Collective
    name: str
    nbytes: int
    size: int
    axes: tuple[int, ...] | None
    trips: float
    seconds: float
    source: str
    op_name: str
    hidden: bool

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step."""
        return self.trips * sent_bytes(self.kind, self.nbytes, self.size)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device. peak: all that is held at the fullest moment."""

    arguments: int
    results: int
    aliased: int
    temporaries: int
    code: int
    peak: int


@dataclass(frozen=True, slots=True)
class Profile:
    """What a compiled program costs on one device.

    compute: seconds by XLA's own cycles, None where it estimates none. step: seconds of the
    replayed schedule. unknown_trips: loops whose trips can not be read, counted once.
    """

    collectives: tuple[Found, ...]
    compute: float | None
    comm: float
    step: float | None
    memory: Memory | None
    unknown_trips: int

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step."""
        return sum(c.sent for c in self.collectives)


def profile(compiled: Any, cluster: Cluster, sizes: Sequence[int]) -> Profile:
    """What a `jax.stages.Compiled` does on a mesh of these sizes laid on a cluster."""
    text = compiled.runtime_executable().hlo_modules()[0].to_string()
    return replace(profile_of(read(text), cluster, sizes), memory=memory(compiled))


def profile_of(module: Module, cluster: Cluster, sizes: Sequence[int]) -> Profile:
    """What a module does on a mesh of these sizes laid on a cluster; its memory is left out."""
    replayed = _Replay(module, cluster, tuple(sizes))
    whole = replayed.run(replayed.scalars(module.entry.name))
    timed = replayed.clock is not None
    return Profile(
        collectives=tuple(whole.collectives),
        compute=whole.compute if timed else None,
        comm=sum(c.seconds for c in whole.collectives),
        step=whole.end if timed else None,
        memory=None,
        unknown_trips=replayed.unknown,
    )


def memory(compiled: Any) -> Memory | None:
    """What `memory_analysis` says; None where this compiler says nothing."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    # Not every compiler says when it holds most; then all temporaries count as held at once.
    peak = getattr(found, "peak_memory_in_bytes", 0) or held + found.temp_size_in_bytes
    return Memory(
        arguments=found.argument_size_in_bytes,
        results=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        peak=max(peak, held),
    )


def fits(compiled: Profile | None, limit: float) -> bool:
    """Whether a compiled program's memory is within a limit; None is one that does not fit."""
    return compiled is not None and compiled.memory is not None and compiled.memory.peak <= limit


@dataclass(slots=True)
class _Line:
    """One run of a computation: when it ends, and when the links are free again."""

    end: float
    compute: float
    free: float
    collectives: list[Found]


class _Replay:
    def __init__(self, module: Module, cluster: Cluster, sizes: tuple[int, ...]) -> None:
        self.module, self.cluster, self.sizes = module, cluster, sizes
        # Only XLA:TPU estimates cycles.
        rate = cluster.compiler.get("clock_rate_ghz") if cluster.platform == "tpu" else None
        self.clock = None if rate is None else float(rate) * 1e9
        self.links: dict[Groups, AxisLink] = {}
        self.unknown = 0

    def run(self, scalars: Scalars, outside: Iterable[str] = ()) -> _Line:
        """Run a computation. outside: collectives that go on around it, begun by its caller."""
        home = scalars.home
        line = _Line(0.0, 0.0, 0.0, [])
        awaited = dict.fromkeys(outside, 0.0)  # per started collective, when it ends
        last = self.last_pieces(home)
        for k, i in enumerate(home.instructions):
            if i.opcode == "while":
                self.loop(i, scalars, line, awaited)
            elif i.opcode in ("call", "conditional"):
                self.branches(i, scalars, line)
            elif i.opcode in _STARTS:
                awaited[i.name] = self.start(home, i, line)
            elif i.opcode == "async-update":
                awaited[i.name] = awaited.get(i.operands[0], 0.0)
            elif i.opcode.endswith("-done"):
                line.end = max(line.end, awaited.get(i.operands[0], 0.0))
            elif i.opcode in KINDS:
                line.end = max(line.end, self.start(home, i, line))
            else:
                self.fused(i, line, awaited, [c for c, at in last.items() if at == k])
        return line

    def fused(
        self, i: Instruction, line: _Line, awaited: dict[str, float], ending: Sequence[str]
    ) -> None:
        """Compute, with the pieces of collectives that run beside it."""
        for channel, piece, inside in self.pieces(i):
            if channel not in awaited:
                awaited[channel] = self.begin(inside, piece, line, hidden=True)
        self.work(i, line)
        line.end = max([line.end, *(awaited[channel] for channel in ending)])

    def work(self, i: Instruction, line: _Line) -> None:
        taken = 0.0
        if self.clock is not None and i.opcode not in _BESIDE:
            taken = (i.cycles or 0) / self.clock
        line.end += taken
        line.compute += taken

    def loop(self, i: Instruction, scalars: Scalars, line: _Line, outside: Iterable[str]) -> None:
        """A loop; a collective begun before it and awaited after it may go on in its body."""
        trips = trip_count(i, scalars)
        self.unknown += trips is None
        body = self.run(self.scalars(i.called()["body"][0]), outside)
        self.add(body, 1 if trips is None else trips, line)

    def scalars(self, name: str) -> Scalars:
        return Scalars(self.module, self.module.computations[name], {})

    def branches(self, i: Instruction, scalars: Scalars, line: _Line) -> None:
        """A call, or the slowest branch of a conditional."""
        if i.opcode == "call":
            runs = [self.run(scalars.inside(i))]
        else:
            named = [name for names in i.called().values() for name in names]
            runs = [self.run(self.scalars(name)) for name in named]
        if runs:
            self.add(max(runs, key=lambda r: r.end), 1, line)

    def add(self, inner: _Line, trips: float, line: _Line) -> None:
        line.end = max(line.end, line.free if inner.collectives else 0.0) + trips * inner.end
        line.compute += trips * inner.compute
        line.collectives += [
            replace(c, trips=c.trips * trips, seconds=c.seconds * trips) for c in inner.collectives
        ]

    def start(self, home: Computation, i: Instruction, line: _Line) -> float:
        """Start a collective; the time at which it ends."""
        hidden = i.opcode.endswith("-start")
        if i.opcode != "async-start":
            return self.begin(home, i, line, hidden)
        end = line.end
        for name in i.called().get("calls", ()):
            inside = self.module.computations[name]
            for j in inside.instructions:
                if j.opcode in KINDS:
                    end = self.begin(inside, j, line, hidden=True)
        return end

    def begin(self, home: Computation, i: Instruction, line: _Line, hidden: bool) -> float:
        found = self.collective(home, i, hidden)
        if found.size > 1:
            line.collectives.append(found)
            line.free = max(line.end, line.free) + found.seconds
        return line.free if found.size > 1 else line.end

    def collective(self, home: Computation, i: Instruction, hidden: bool) -> Found:
        kind = KINDS[i.opcode.removesuffix("-start")]
        together = groups(i.attributes, self.module.partitions)
        size = max(map(len, together))
        operand = sum(nbytes(home.by_name[o].type) for o in i.operands if o in home.by_name)
        larger = operand * (size if kind == "all_gather" else 1)
        return Found(
            kind, i.name, larger, size, axes_of(together, self.sizes), 1,
            seconds(kind, larger, self.link(together)), self.source(home, i), i.op_name, hidden,
        )  # fmt: skip

    def source(self, home: Computation, i: Instruction, depth: int = 4) -> str:
        """The user's line; of a collective that XLA made of several, that of its first operand."""
        own = source_line(self.module.frames.get(i.frame, ()))
        if own or not depth:
            return own
        operands = (home.by_name[o] for o in i.operands if o in home.by_name)
        return next(filter(None, (self.source(home, o, depth - 1) for o in operands)), "")

    def link(self, together: Groups) -> AxisLink:
        """What these groups of devices can do together, by where the mesh lies."""
        if together not in self.links:
            axes = axes_of(together, self.sizes)
            if max(map(len, together)) == 1:
                self.links[together] = ALONE
            elif axes is not None:
                self.links[together] = join(self.cluster, self.sizes, axes)
            else:
                sizes, at = _refined(max(together, key=len), self.cluster.devices)
                self.links[together] = join(self.cluster, sizes, at)
        return self.links[together]

    def pieces(self, i: Instruction) -> list[tuple[str, Instruction, Computation]]:
        """Collectives inside a fusion, each with its channel: the same in every piece of it."""
        if i.opcode != "fusion":
            return []
        inside = self.module.computations[i.called()["calls"][0]]
        return [
            (j.attribute("channel_id") or j.name, j, inside)
            for j in inside.instructions
            if j.opcode in KINDS
        ]

    def last_pieces(self, home: Computation) -> dict[str, int]:
        """Per channel the place of the last fusion that has a piece of its collective."""
        return {
            channel: k for k, i in enumerate(home.instructions) for channel, _, _ in self.pieces(i)
        }


def _refined(group: Sequence[int], devices: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A mesh, and axes of it, along which a regular group of devices lies.

    An irregular one is taken to reach over all devices, which is never quicker.

    >>> _refined((0, 2, 4, 6), 16)
    ((2, 4, 2), (1,))
    """
    stride = group[1] - group[0]
    span = stride * len(group)
    regular = all(b - a == stride for a, b in pairwise(group))
    if regular and devices % span == 0:
        return (devices // span, len(group), stride), (1,)
    return (devices,), (0,)


def source_line(frames: Sequence[Frame]) -> str:
    """The user's own line, as `file.py:12 (function)`; empty where no frame is the user's."""
    return line_of([(f.file, f.line, f.function) for f in frames])
