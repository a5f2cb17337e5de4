"""How is a function planned in blocks?  Made flat, cut around its huge values, and traced again.

`passes.regions` finds what can run in blocks, `autoshard.block_loops` makes the loops. Scans over
layers first make again what they would take from one another (`autoshard.through_scans`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from autoshard.barriers import let_by
from autoshard.block_loops import in_loops
from autoshard.flat import flat
from autoshard.jit_options import dynamic_leaves
from autoshard.own_rows import own_rows
from autoshard.slices import of_operands
from autoshard.through_scans import through_scans
from autoshard.trace import Traced, trace
from cost_models.cluster import Cluster
from passes.barriers import held_back
from passes.block_counts import Blocks, NoBlocks, counts_of, largest, notes_of, nothing_to_cut
from passes.block_loops import block_loops, gaining
from passes.bodies import bodies
from passes.regions import Refused, Region, find_regions
from passes.search import NoFeasiblePlan, Progress
from passes.through_scans import made_again

P = TypeVar("P")

_DEPTH = 12  # scans within scans and barriers, each of which hands on what lies further outside
_SHARES = (64, 256, 1024)  # of a device's memory: a block's part of a huge value, one after another


@dataclass(frozen=True)
class _Flat:
    """A flat function, where it is huge, and lines of what its scans make again."""

    traced: Traced
    regions: tuple[Region, ...]
    refused: tuple[Refused, ...]
    again: tuple[str, ...]


def in_blocks(
    fn: Callable[..., Any], traced: Traced, blocks: Blocks, options: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """A function that does what fn does in blocks, and what is to be said about it.

    traced: of fn. options: those of `jax.jit`. Raises NoBlocks.
    """
    found = _flat(traced, blocks.nbytes)
    graph = found.traced.graph
    if blocks.count and not found.regions:
        raise NoBlocks(nothing_to_cut(graph, traced.graph.name, found.refused))
    counts = counts_of(graph, found.regions, blocks)
    cut = block_loops(graph, found.regions, counts)
    if blocks.count and not cut:
        raise NoBlocks(nothing_to_cut(graph, traced.graph.name, ()))
    run = in_loops(found.traced, cut)

    @functools.wraps(fn)
    def blocked(*args: Any, **kwargs: Any) -> Any:
        leaves = dynamic_leaves(fn, options, args, kwargs)
        return jax.tree.unflatten(traced.out_tree, run(*leaves))

    return blocked, notes_of(graph, found.regions, counts, cut, found.again)


def _flat(traced: Traced, nbytes: int) -> _Flat:
    """The function flat, its scans making huge values by themselves."""
    now = _again(traced, flat(traced))
    for changed in (own_rows, of_operands):
        now = _again(now, changed(now))
    sources: dict[str, None] = {}
    for _ in range(_DEPTH):
        inside = bodies(now.graph, now.deciders)
        held = held_back(now.graph, inside, nbytes)
        if held:
            now = _again(now, let_by(now, held))
            continue
        again = made_again(now.graph, inside, nbytes)
        if not again.chains:
            break
        sources.update(dict.fromkeys(again.sources))
        now = _again(now, through_scans(now, again))
    regions, refused = find_regions(now.graph, bodies(now.graph, now.deciders))
    return _Flat(now, gaining(now.graph, regions), refused, tuple(sources))


def _again(traced: Traced, run: Callable[..., Any]) -> Traced:
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=bool(getattr(a, "weak_type", False)))
        for a in traced.in_avals
    ]
    return trace(run, *shapes)


def first_that_fits(
    in_blocks_of: Callable[[Blocks], P],
    peak: Callable[[P], float],
    traced: Traced,
    cluster: Cluster,
    limit: float | None,
    progress: Progress | None,
) -> P:
    """The first plan that fits, of those without blocks, with large ones, and with ever smaller.

    in_blocks_of: the plan for such blocks; it may raise NoFeasiblePlan. peak: bytes that a plan
    takes on a device, which for an expert's may be too many. limit: bytes per device.
    """
    tell = progress or (lambda _: None)
    limit = cluster.memory_limit if limit is None else limit
    room, most = limit * cluster.devices, largest_of(traced)
    refused: NoFeasiblePlan | None = None
    last: P | None = None
    for share in (0, *_SHARES):
        blocks = Blocks(nbytes=max(1, int(room / share))) if share else Blocks()
        if most > room if not blocks else most <= blocks.nbytes:
            continue  # not even one of its values fits, or there is nothing to cut
        tell(f"blocks of 1/{share} of the memory" if blocks else "without blocks")
        try:
            last = in_blocks_of(blocks)
        except NoFeasiblePlan as error:
            refused = error
        else:
            if peak(last) <= limit:
                return last
    if last is None:
        assert refused is not None, "either it can be without blocks, or there is something to cut"
        raise refused
    return last


def largest_of(traced: Traced) -> int:
    """Bytes of the largest value that could be cut into blocks; 0 where there is none."""
    found = _flat(traced, 0)
    return max((largest(found.traced.graph, r) for r in found.regions), default=0)


def that_may_help(error: NoFeasiblePlan, traced: Traced) -> NoFeasiblePlan:
    """An error about memory, with a word on blocks where there is something to cut."""
    if not largest_of(traced):
        return error
    return NoFeasiblePlan(f"{error}. Huge values can be made in blocks: blockwise='auto'")
