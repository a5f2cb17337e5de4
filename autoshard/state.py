"""Which results take the place of which arguments at the next step?

A train step returns new parameters shaped like the old ones. Where a result, or a part of it, has
the structure and types of an argument, both get one sharding, so that no step has to reshard its
own state. A lone array counts only when it is donated: `y = f(x)` is not a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from autoshard.trace import Traced


def state_pairs(traced: Traced) -> tuple[tuple[int, int], ...]:
    """(input value, output value) pairs of the traced function."""
    graph = traced.graph
    args = jax.tree.unflatten(traced.in_tree, range(len(graph.inputs)))[0]
    results = jax.tree.unflatten(traced.out_tree, range(len(graph.outputs)))
    free = _subtrees(results, 3)
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for candidate in _subtrees(args, 3)[1:]:
        leaves = jax.tree.leaves(candidate)
        if len(leaves) < 2 or any(k in {i for i, _ in pairs} for k in leaves):
            continue
        for result in free:
            outs = jax.tree.leaves(result)
            if taken.isdisjoint(outs) and _alike(traced, candidate, result):
                pairs += zip(leaves, outs, strict=True)
                taken.update(outs)
                break
    pairs += _donated(traced, {i for i, _ in pairs}, taken)
    return tuple((graph.inputs[i], graph.outputs[o]) for i, o in sorted(pairs))


def _subtrees(tree: Any, depth: int) -> list[Any]:
    """The tree and the parts of it, larger ones first, to a depth."""
    out, level = [tree], [tree]
    for _ in range(depth):
        below: list[Any] = []
        for t in level:
            if not jax.tree_util.all_leaves([t]):
                below += _children(t)
        out += below
        level = below
    return out


def _children(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)


def _alike(traced: Traced, argument: Any, result: Any) -> bool:
    structures: list[Any] = [jax.tree.structure(t) for t in (argument, result)]
    if structures[0] != structures[1]:
        return False
    graph = traced.graph
    return all(
        graph.values[graph.inputs[i]].type == graph.values[graph.outputs[o]].type
        for i, o in zip(jax.tree.leaves(argument), jax.tree.leaves(result), strict=True)
    )


def _donated(traced: Traced, paired: set[int], taken: set[int]) -> list[tuple[int, int]]:
    """Donated arguments that no structure paired take the first result of their type, as in jax."""
    graph = traced.graph
    left = [o for o in range(len(graph.outputs)) if o not in taken]
    out = []
    for i, given in enumerate(traced.donated):
        if not given or i in paired:
            continue
        type = graph.values[graph.inputs[i]].type
        found = next((o for o in left if graph.values[graph.outputs[o]].type == type), None)
        if found is not None:
            left.remove(found)
            out.append((i, found))
    return out


__all__: Sequence[str] = ["state_pairs"]
