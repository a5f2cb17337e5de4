"""How is a function planned whose backward half computes again what would not fit?

`passes.remat` finds the parts and chooses, `autoshard.layers_again` writes the function anew.
The new function does the same, and is planned like any other: in microbatches, in blocks, in the
stages of a pipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import jax

from autoshard.flat import flat
from autoshard.jit_options import check_arguments, dynamic_leaves
from autoshard.layers_again import layers_again
from autoshard.parallelized import Parallelized
from autoshard.trace import Traced, trace
from cost_models.cluster import Cluster
from passes.ir.plan import PlanError
from passes.op_seconds import op_seconds
from passes.remat import fewest, note_of, nothing_again, regions_of, worth_of
from passes.remat_region import RematRegion
from passes.search import NoFeasiblePlan, Progress
from passes.through_scans import Chain, ThroughScans

P = TypeVar("P")
Remat = Literal["none", "full", "auto"]


def checked(remat: object) -> Remat:
    """What was asked for; "none" for None."""
    if remat is None:
        return "none"
    if remat not in ("none", "full", "auto"):
        raise ValueError(f"remat is 'none', 'full' or 'auto', not {remat!r}")
    return remat


@dataclass(frozen=True)
class Rematable:
    """A function, flat, and the parts of it that can be computed again."""

    fn: Callable[..., Any]
    options: Mapping[str, Any]
    out_tree: Any
    traced: Traced
    regions: tuple[RematRegion, ...]

    def with_again(self, chosen: Sequence[int]) -> Callable[..., Any]:
        """The function that computes these parts again: of the same kind as the given one."""
        if not chosen:
            return self.fn
        inner = self.fn.fn if isinstance(self.fn, Parallelized) else self.fn
        run = _again(self.traced, [self.regions[k] for k in chosen])

        @functools.wraps(inner)
        def again(*args: Any, **kwargs: Any) -> Any:
            leaves = dynamic_leaves(inner, self.options, args, kwargs)
            return jax.tree.unflatten(self.out_tree, run(*leaves))

        return self.fn.of(again) if isinstance(self.fn, Parallelized) else again


def rematable(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Rematable:
    """A function and what of it can be computed again. options: those of `jax.jit`."""
    inner = fn
    if isinstance(fn, Parallelized):
        options, inner = {**fn.options, **options}, fn.fn
    check_arguments(inner, args, kwargs, options)
    traced = trace(inner, *args, **options, **kwargs)
    now = trace(flat(traced, kept=True), *_shapes(traced))
    now = replace(now, graph=replace(now.graph, name=traced.graph.name))
    regions = regions_of(now.graph, now.deciders, now.backward)
    return Rematable(fn, options, traced.out_tree, now, regions)


def computing_again(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    numbers: Sequence[int],
) -> Callable[..., Any]:
    """A function as a plan has it that computes these parts again. Raises PlanError."""
    if not numbers:
        return fn
    found = rematable(fn, args, kwargs, {})
    if max(numbers) >= len(found.regions):
        raise PlanError(
            f"this plan was made for another function: it computes part {max(numbers)} again, and "
            f"{found.traced.graph.name} has {len(found.regions)} such parts. Plan again for it."
        )
    return found.with_again(numbers)


def _again(traced: Traced, regions: Sequence[RematRegion]) -> Callable[..., list[Any]]:
    """The flat function that computes these again."""
    chains: dict[Any, tuple[Chain, ...]] = {}
    for region in regions:
        if region.chain is not None:
            chains[region.reader] = (*chains.get(region.reader, ()), region.chain)
    layers = [region.layer for region in regions if region.layer is not None]
    return layers_again(traced, layers, ThroughScans(chains, ()))


def rematerialized(
    found: Rematable,
    remat: Literal["full", "auto"],
    plan: Callable[[Callable[..., Any]], P],
    fits: Callable[[P], bool],
    cluster: Cluster,
    progress: Progress | None,
    by_parts: bool = True,
) -> tuple[P, tuple[int, ...], str]:
    """The plan of the function that computes again all of it, or as little as fits; which parts
    these are; and a note.

    plan: of a function; it may raise NoFeasiblePlan. by_parts: whether "auto" may take some of
    them; else it is none or all, where a plan takes long.
    """
    tell = progress or (lambda _: None)
    if not found.regions:
        return plan(found.fn), (), nothing_again(found.traced.graph.name)
    worth = worth_of(found.traced.graph, found.regions, cluster)
    order = worth.cheapest_first()

    def of_first(count: int) -> tuple[P, tuple[int, ...]]:
        tell(f"{count} of {len(order)} parts computed again")
        chosen = tuple(sorted(order[:count]))
        return plan(found.with_again(chosen)), chosen

    def if_fits(count: int) -> tuple[P, tuple[int, ...]] | None:
        try:
            made = of_first(count)
        except NoFeasiblePlan:
            return None
        return made if fits(made[0]) else None

    best = if_fits(0) if remat == "auto" else None
    if best is None:
        best = _all(of_first, len(order))
        if remat == "auto" and by_parts:
            best = fewest(if_fits, len(order), best)
    made, chosen = best
    seconds = _longer(found, chosen, cluster) / cluster.devices if chosen else 0.0
    return made, chosen, note_of(worth, chosen, seconds)


def _all(of_first: Callable[[int], P], count: int) -> P:
    try:
        return of_first(count)
    except NoFeasiblePlan as error:
        more = f"that although all {count} parts of it that can be are computed again"
        raise NoFeasiblePlan(f"{error}; {more}") from None


def _longer(found: Rematable, chosen: Sequence[int], cluster: Cluster) -> float:
    """Seconds that a step takes more on one device."""
    run = _again(found.traced, [found.regions[k] for k in chosen])
    again = trace(run, *_shapes(found.traced))
    both = (op_seconds(t.graph, cluster) for t in (again, found.traced))
    return sum(next(both)) - sum(next(both))


def _shapes(traced: Traced) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=bool(getattr(a, "weak_type", False)))
        for a in traced.in_avals
    ]
