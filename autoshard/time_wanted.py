"""Which time axes does a user ask for?  `time_wanted(time_axes, microbatches, blockwise)`.

A time axis has a name and a size, as an axis of a mesh has, and runs over the steps of a loop. The
first one is the outermost loop. `block` is the axis over huge values (`autoshard.blockwise`), along
dims that are found; any other runs over the dims that hints name, or over the batch that is found.

Two options are short for one axis: `microbatches=8` is `time_axes={"micro": 8}`, and `blockwise=4`
is `time_axes={"block": 4}`.

>>> time_wanted(None, 8, None) == time_wanted({"micro": 8}, None, None)
True
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from autoshard.time_axes import AUTO, BATCH
from passes.block_counts import NO_BLOCKS, Blocks
from passes.hints import HintError
from passes.ir.graph import Graph, Hint
from passes.ir.plan import TimeAxis
from passes.time_hints import BLOCK, dims_over_time

MICRO = BATCH.name
Size = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class TimeWanted:
    """axes: name and size of all but the one over huge values. blocks: of huge values."""

    axes: tuple[tuple[str, Size], ...]
    blocks: Blocks | Literal["auto"]

    @property
    def names(self) -> tuple[str, ...]:
        """What hints may not mean as axes of a mesh."""
        return (*[name for name, _ in self.axes], *[BLOCK] * (self.blocks != NO_BLOCKS))


def time_wanted(time_axes: object, microbatches: object, blockwise: object) -> TimeWanted:
    """What was asked for. Raises ValueError and TypeError."""
    sizes = {} if time_axes is None else _sizes(time_axes)
    for option, name, given in (
        ("microbatches", MICRO, microbatches),
        ("blockwise", BLOCK, blockwise),
    ):
        if given is None:
            continue
        if time_axes is not None:
            raise ValueError(
                f"{option}={given!r} is short for time_axes={{{name!r}: {given!r}}}, and time_axes "
                f"is given, too: leave {option} out, and write time_axes="
                f"{ {name: given, **sizes} }"
            )
        sizes[name] = _size(option + " is", given)
    block = sizes.pop(BLOCK, None)
    blocks: Blocks | Literal["auto"] = NO_BLOCKS
    if block is not None:
        blocks = "auto" if block == "auto" else Blocks(count=block)
    return TimeWanted(tuple(sizes.items()), blocks)


def _sizes(time_axes: object) -> dict[str, Size]:
    if not isinstance(time_axes, Mapping):
        raise TypeError(f"time_axes is a mapping such as {{'micro': 8}}, not {time_axes!r}")
    for name in time_axes:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a time axis has a name, a text such as 'micro', not {name!r}")
    return {name: _size(f"time axis {name!r} has", size) for name, size in time_axes.items()}


def _size(subject: str, given: object) -> Size:
    """A size; subject: the beginning of the sentence that refuses it."""
    if isinstance(given, str) and given == "auto":
        return "auto"
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < 1:
        size = "a size, " if subject.endswith("has") else ""
        raise ValueError(f"{subject} {size}a whole number from 1 on, or 'auto', not {given!r}")
    return int(given)


def check_names(wanted: TimeWanted, mesh: Collection[str]) -> None:
    """ValueError for a time axis that is an axis of the mesh, too."""
    for name in wanted.names:
        if name in mesh:
            raise ValueError(
                f"{name!r} is an axis of the mesh and a time axis: an axis runs over devices or "
                "over the steps of a loop; give one of them another name"
            )


def axes_over(graph: Graph, hints: Sequence[Hint], wanted: TimeWanted) -> tuple[TimeAxis, ...]:
    """The time axes, each with what hints say that it runs over.

    Raises HintError where that is not to be known.
    """
    dims = dims_over_time(graph, hints, wanted.names)
    out = []
    for name, size in wanted.axes:
        if not dims[name] and name != MICRO and len(wanted.axes) > 1:
            raise HintError(
                f"no hint says what time axis {name!r} runs over: name it for a dim of an argument,"
                f" as in hints={{'x': P(None, {name!r})}}; only {MICRO!r}, or a time axis that is "
                "alone, runs over the batch without"
            )
        out.append(TimeAxis(name, AUTO if size == "auto" else size, dims[name]))
    return tuple(out)


def of_pipeline(wanted: TimeWanted, hints: Sequence[Hint], graph: Graph) -> TimeAxis:
    """The axis of a pipeline's microbatches, of the size AUTO where nobody asks for a number.

    Raises ValueError and HintError for time axes that a pipeline can not have.
    """
    if wanted.blocks != NO_BLOCKS:
        raise ValueError("blockwise does not go with stages: give one of them")
    if len(wanted.axes) > 1:
        names = " and ".join(repr(name) for name, _ in wanted.axes)
        raise ValueError(f"a pipeline has one time axis, its microbatches, not {names}")
    return next(iter(axes_over(graph, hints, wanted)), BATCH)
