"""How does a function run over time axes?  Cut into a loop for each, and traced again.

`in_steps_of(fn, traced, axis)` makes the function that runs in steps (`autoshard.time_loop`), over
the batch that is found (`passes.batch`) or over the dims that hints name (`passes.dims_loop`).
`sized(axes, ask)` tries sizes for those that are "auto": 1, 2, 4, ... until more are no gain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax

from autoshard.jit_options import dynamic_leaves
from autoshard.state import state_pairs
from autoshard.time_loop import in_steps
from autoshard.trace import Traced
from passes.batch import find_batch
from passes.dims_loop import Seeds, dims_loop, dims_text, seeds_of
from passes.ir.plan import TimeAxis
from passes.microbatch_loop import NoTimeLoop, coupled, microbatch_loop
from passes.search import NoFeasiblePlan, Progress
from passes.time_loop import TimeLoop

P = TypeVar("P")

AUTO = 0  # the size of a time axis that is to be found
MOSTLY = 0.9  # of the FLOPs: with less in the loop, what keeps the rest out is worth a note


BATCH = TimeAxis("micro", AUTO)  # over the batch that is found


@dataclass(frozen=True, slots=True)
class Begun:
    """A time axis, and where its split begins. seeds: ways to begin; of the batch there is one."""

    axis: TimeAxis
    seeds: tuple[Seeds, ...]


def begun(traced: Traced, axis: TimeAxis) -> Begun:
    """Where the split of an axis begins in a function, before any loop is made of it.

    Raises NoTimeLoop for a size that does not divide a hinted dim.
    """
    if axis.dims:
        return Begun(axis, seeds_of(traced.graph, axis, [i for i, _ in state_pairs(traced)]))
    places = {v: place for place, v in enumerate(traced.graph.inputs)}
    return Begun(axis, ({places[v]: 0 for v in batch_of(traced)},))


def in_steps_of(
    fn: Callable[..., Any], traced: Traced, begun: Begun, options: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """A function that does what fn does in steps, and what is to be said about it.

    traced: of fn, or of what the loops of other time axes made of it. options: those of `jax.jit`.
    Raises NoTimeLoop.
    """
    loop = loop_over(traced, begun)
    run = in_steps(traced, loop)

    @functools.wraps(fn)
    def cut(*args: Any, **kwargs: Any) -> Any:
        flat = dynamic_leaves(fn, options, args, kwargs)
        return jax.tree.unflatten(traced.out_tree, run(*flat))

    return cut, _notes(begun.axis, loop)


def loop_over(traced: Traced, begun: Begun) -> TimeLoop:
    """The loop over an axis. Raises NoTimeLoop."""
    axis, graph = begun.axis, traced.graph
    if axis.dims:
        return dims_loop(graph, axis, begun.seeds, traced.deciders)
    batch = [graph.inputs[place] for place in begun.seeds[0]]
    return microbatch_loop(graph, batch, axis.size, traced.deciders)


def _notes(axis: TimeAxis, loop: TimeLoop) -> tuple[str, ...]:
    """What the loop runs over, how much of the function, and what keeps the rest out."""
    graph = loop.graph
    places = {v: place for place, v in enumerate(graph.inputs)}
    over = dims_text(graph, [(places[v], split.dim) for v, split in loop.seeds.items()])
    what = f"{over}" if axis.dims else f"the batch, {over}"
    notes = [
        f"{axis.name}={axis.size} runs over {what}: {loop.share:.0%} of the FLOPs run in steps"
    ]
    if loop.couplings and loop.share < MOSTLY:
        notes.append(f"the rest waits for all of them: {first_coupled(axis, loop)}")
    if loop.ahead:
        notes.append(last_ahead(axis, loop))
    return tuple(notes)


def kept_out(axis: TimeAxis, loop: TimeLoop) -> str:
    """What keeps part of a function out of the loop, where something does."""
    return first_coupled(axis, loop) if loop.couplings else last_ahead(axis, loop)


def first_coupled(axis: TimeAxis, loop: TimeLoop) -> str:
    """Where parts of what the axis runs over need the whole, first."""
    return coupled(
        loop, loop.couplings[0], dims_text(loop.graph, axis.dims) if axis.dims else "the batch"
    )


def last_ahead(axis: TimeAxis, loop: TimeLoop) -> str:
    """What is computed ahead, for those that need all of it."""
    op = loop.graph.ops[loop.ahead[-1]]
    whole = "as a whole" if axis.dims else "of the whole batch"
    return f"{op.name} at {op.source} is computed ahead, {whole}"


def batch_of(traced: Traced) -> tuple[int, ...]:
    """The inputs whose leading dim is the batch."""
    return find_batch(traced.graph, [i for i, _ in state_pairs(traced)])


def batch_sizes(traced: Traced) -> tuple[int, ...]:
    """How long the batch is, in each of the inputs that have it."""
    return tuple(traced.graph.values[v].shape[0] for v in batch_of(traced))


def lengths(traced: Traced, axis: TimeAxis) -> tuple[int, ...]:
    """How long that is which an axis runs over, in each input of which it is known."""
    if not axis.dims:
        return batch_sizes(traced)
    graph = traced.graph
    return tuple(graph.values[graph.inputs[place]].shape[d] for place, d in axis.dims)


def sized(
    axes: tuple[TimeAxis, ...],
    ask: Callable[[tuple[TimeAxis, ...]], P],
    seconds: Callable[[P], float],
    traced: Traced,
    progress: Progress | None,
) -> P:
    """The plan for these axes, each that is AUTO with the size that makes it the fastest."""
    k = next((k for k, axis in enumerate(axes) if axis.size == AUTO), None)
    if k is None:
        return ask(axes)

    def in_parts(count: int) -> P:
        if progress is not None:
            progress(f"{axes[k].name}={count}")
        known = (*axes[:k], replace(axes[k], size=count), *axes[k + 1 :])
        return sized(known, ask, seconds, traced, progress)

    return fastest(in_parts, seconds, lengths(traced, axes[k]))


def fastest(in_parts: Callable[[int], P], seconds: Callable[[P], float], sizes: Sequence[int]) -> P:
    """The fastest plan of those in 1, 2, 4, ... parts, until more of them are no gain.

    in_parts: the plan for so many; it may raise NoFeasiblePlan or NoTimeLoop. sizes: what the
    number of parts has to divide; none where there is only the whole.
    """
    best: P | None = None
    refused: NoFeasiblePlan | NoTimeLoop | None = None
    count = 1
    while count == 1 or (sizes and all(n % count == 0 for n in sizes)):
        try:
            found = in_parts(count)
        except NoFeasiblePlan as error:
            refused = error
        except NoTimeLoop as error:
            refused = refused or error
            break
        else:
            if best is not None and seconds(found) >= seconds(best):
                break
            best = found
        count *= 2
    if best is None:
        assert refused is not None, "one part is tried first"
        raise refused
    return best
