"""From a traced function to its stages: scans in pieces, microbatches, weights' gradients apart.

Each of these is a function that does the same, traced again; then the loop over microbatches is cut
into stages (`passes.stages`), which `autoshard.controller` runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from autoshard.jit_options import dynamic_leaves
from autoshard.scan_apart import weights_apart
from autoshard.scan_pieces import in_pieces
from autoshard.time_axes import BATCH, begun, loop_over
from autoshard.trace import Traced, trace
from passes.ir.graph import Graph
from passes.ir.plan import TimeAxis
from passes.stages import Stages, stages_of
from passes.time_loop import TimeLoop

Weigh = Callable[[Graph], Sequence[float]]


def flops_of(graph: Graph) -> Sequence[float]:
    """FLOPs of each operation."""
    return [op.rule.flops * graph.trips(op.region) for op in graph.ops]


@dataclass(frozen=True)
class Staged:
    """A function whose loop over microbatches is cut into stages. traced: as it is run."""

    traced: Traced
    loop: TimeLoop
    stages: Stages


def pieced(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    count: int,
    weigh: Weigh = flops_of,
    traced: Traced | None = None,
) -> Traced:
    """A function with its scans over layers in so many pieces. Arguments as of `in_stages`.

    traced: the function as it is, where that is known.
    """
    traced = traced or trace(fn, *args, **options, **kwargs)
    run = in_pieces(traced, count, weigh(traced.graph))
    return trace(_as(fn, options, traced, run), *args, **options, **kwargs)


def in_stages(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    microbatches: int,
    over: TimeAxis = BATCH,
    count: int,
    apart: bool = True,
    weigh: Weigh = flops_of,
    given: Traced | None = None,
) -> Staged:
    """A function in so many stages and microbatches. options: those of `jax.jit`.

    over: what the microbatches are of, whatever its size. apart: whether the gradients of weights
    are tasks of their own; else all that is backward is B. weigh: how much each operation of a
    graph takes, by which stages are made even. given: what `pieced` gives, where that is known.
    Raises NoTimeLoop and NoStages.
    """

    def loop_of(traced: Traced) -> TimeLoop:
        return loop_over(traced, begun(traced, replace(over, size=microbatches)))

    traced = given or pieced(fn, args, kwargs, options, count=count, weigh=weigh)
    if apart:
        run = weights_apart(traced, loop_of(traced))
        traced = trace(_as(fn, options, traced, run), *args, **options, **kwargs)
    loop = loop_of(traced)
    stages = stages_of(loop, traced.backward, count, weigh(loop.graph))
    return Staged(traced, loop, stages if apart else stages.joined())


def _as(
    fn: Callable[..., Any],
    options: Mapping[str, Any],
    traced: Traced,
    run: Callable[..., list[Any]],
) -> Callable[..., Any]:
    """A function with the arguments and results of fn, that computes them otherwise."""

    @functools.wraps(fn)
    def changed(*args: Any, **kwargs: Any) -> Any:
        flat = dynamic_leaves(fn, options, args, kwargs)
        return jax.tree.unflatten(traced.out_tree, run(*flat))

    return changed
