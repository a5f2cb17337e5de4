"""How is a function planned in microbatches?  Cut over time, traced again; and how many are best?

`autoshard.time_loop` makes the function that runs in steps, `passes.time_loop` finds what can.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax

from autoshard.jit_options import dynamic_leaves
from autoshard.state import state_pairs
from autoshard.time_loop import in_steps
from autoshard.trace import Traced
from passes.batch import find_batch
from passes.microbatch_loop import NoTimeLoop, coupled, microbatch_loop
from passes.search import NoFeasiblePlan, Progress

P = TypeVar("P")

_MOSTLY = 0.9  # of the FLOPs: with less in the loop, what keeps the rest out is worth a note


def checked(microbatches: object) -> int | Literal["auto"]:
    """The number of microbatches that was asked for: "auto", or at least one."""
    if microbatches is None or microbatches == "auto":
        return 1 if microbatches is None else "auto"
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(
            f"microbatches is a whole number from 1 on, or 'auto', not {microbatches!r}"
        )
    return microbatches


def in_microbatches(
    fn: Callable[..., Any], traced: Traced, count: int, options: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """A function that does what fn does in so many steps, and what is to be said about it.

    traced: of fn. options: those of `jax.jit`. Raises NoTimeLoop.
    """
    loop = microbatch_loop(traced.graph, batch_of(traced), count, traced.deciders)
    run = in_steps(traced, loop)

    @functools.wraps(fn)
    def cut(*args: Any, **kwargs: Any) -> Any:
        flat = dynamic_leaves(fn, options, args, kwargs)
        return jax.tree.unflatten(traced.out_tree, run(*flat))

    graph = loop.graph
    names = ", ".join(graph.values[v].name for v in loop.seeds)
    notes = [f"{count} microbatches of {names}: {loop.share:.0%} of the FLOPs run in steps"]
    if loop.couplings and loop.share < _MOSTLY:
        notes.append(f"the rest waits for all of them: {coupled(loop, loop.couplings[0])}")
    if loop.ahead:
        op = graph.ops[loop.ahead[-1]]
        notes.append(f"{op.name} at {op.source} is computed ahead, of the whole batch")
    return cut, tuple(notes)


def batch_of(traced: Traced) -> tuple[int, ...]:
    """The inputs whose leading dim is the batch."""
    return find_batch(traced.graph, [i for i, _ in state_pairs(traced)])


def batch_sizes(traced: Traced) -> tuple[int, ...]:
    """How long the batch is, in each of the inputs that have it."""
    return tuple(traced.graph.values[v].shape[0] for v in batch_of(traced))


def fastest(
    in_parts: Callable[[int], P],
    seconds: Callable[[P], float],
    sizes: Sequence[int],
    progress: Progress | None,
) -> P:
    """The fastest plan of those with 1, 2, 4, ... microbatches, until more of them are no gain.

    in_parts: the plan for so many; it may raise NoFeasiblePlan or NoTimeLoop. sizes: of the batch.
    """
    tell = progress or (lambda _: None)
    best: P | None = None
    refused: NoFeasiblePlan | NoTimeLoop | None = None
    count = 1
    while count == 1 or (sizes and all(n % count == 0 for n in sizes)):
        tell(f"{count} microbatch{'es' * (count > 1)}")
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
        assert refused is not None, "one microbatch is tried first"
        raise refused
    return best
