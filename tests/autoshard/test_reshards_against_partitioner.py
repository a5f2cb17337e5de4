"""XLA's partitioner makes the moves that a reshard was priced with.

A value is brought from one sharding to another as the lowering does it, through the shardings of
`passes.reshard.path`; what a device sends is read from the compiled program, byte for byte.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding

from autoshard.mesh import named_sharding
from passes.ir.mesh import Mesh as PlannedMesh
from passes.ir.sharding import BROADCAST, PARTIAL
from passes.reshard import path, reshard_sent, steps

pytestmark = pytest.mark.usefixtures("in_a_hurry")

SHAPE = (16, 16, 16)
X = np.arange(math.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
MESHES = [(2, 2, 2), (4, 2), (2, 4), (8,)]

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\((.*)"
)
SENT = {
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-gather": lambda size, n: size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "collective-permute": lambda size, n: size,
}


def group_size(line: str, devices: int) -> int:
    """How many devices take part: `{{0,1},{2,3}}`, `[4,2]<=[8]` or `mesh['a'=4,'b'=2] {'b'}`."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{('.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in parts)
    return devices


def sent(text: str, devices: int) -> float:
    """Bytes that a device sends in a compiled program of f32 arrays."""
    total = 0.0
    for line in text.splitlines():
        if found := COLLECTIVE.search(line):
            shapes = re.findall(r"f32\[([\d,]*)\]", found[1])
            size = sum(4 * math.prod(map(int, s.split(","))) for s in shapes)
            total += SENT[found[2]](size, group_size(line, devices))
    return total


def planned(sizes: Sequence[int]) -> tuple[PlannedMesh, Mesh]:
    names = ("data", "model", "seq")[: len(sizes)]
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    types = (AxisType.Auto,) * len(sizes)
    return PlannedMesh(names, tuple(sizes)), Mesh(devices, names, axis_types=types)


def resharded(
    source: tuple[int, ...], ways: Sequence[tuple[int, ...]], sizes: tuple[int, ...]
) -> tuple[Any, Any]:
    """(compiled program, what it makes of X) of asking for these shardings in turn."""
    mesh, devices = planned(sizes)

    def sharding(axes: tuple[int, ...]) -> NamedSharding:
        return named_sharding(axes, len(SHAPE), mesh, devices)

    def change(x: Any) -> Any:
        for axes in ways:
            x = jax.lax.with_sharding_constraint(x, sharding(axes))
        return x

    ends = sharding(source), sharding(ways[-1])
    compiled = jax.jit(change, in_shardings=ends[0], out_shardings=ends[1]).lower(X).compile()
    return compiled, compiled(jax.device_put(X, ends[0]))


@st.composite
def changes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    sizes = draw(st.sampled_from(MESHES))
    axes = st.tuples(*(st.sampled_from((BROADCAST, 0, 1, 2)) for _ in sizes))
    return draw(axes), draw(axes), sizes


@settings(deadline=None, max_examples=60)
@given(changes())
def test_a_reshard_sends_what_it_was_priced_with(
    change: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    source, target, sizes = change
    assume(source != target)
    moves = steps(source, target, sizes)
    assert moves is not None
    compiled, out = resharded(source, path(source, target, sizes), sizes)
    assert np.array_equal(out, X)
    predicted = reshard_sent(moves, X.nbytes, sizes)
    assert sent(compiled.as_text(), math.prod(sizes)) == pytest.approx(predicted), moves


def test_asked_for_at_once_more_is_sent() -> None:
    """Why the lowering asks step by step: two all-to-alls become a gather of the whole value."""
    source, target, sizes = (0, 1, 2), (0, 0, 0), (2, 2, 2)
    at_once, _ = resharded(source, [target], sizes)
    in_turn, _ = resharded(source, path(source, target, sizes), sizes)
    assert sent(at_once.as_text(), 8) >= 2 * sent(in_turn.as_text(), 8)


@pytest.mark.parametrize("sizes", [(2, 2), (4, 2), (2, 2, 2)])
def test_no_order_of_the_moves_sends_less(sizes: tuple[int, ...]) -> None:
    """Against all orders, each a chain of changes along one axis."""
    options = (BROADCAST, 0, 1)
    for source in itertools.product((*options, PARTIAL), repeat=len(sizes)):
        for target in itertools.product(options, repeat=len(sizes)):
            moves = steps(source, target, sizes)
            assert moves is not None
            moving = [a for a, (f, t) in enumerate(zip(source, target, strict=True)) if f != t]
            sums = [a for a in moving if source[a] == PARTIAL]
            for order in itertools.permutations(set(moving) - set(sums)):
                state, total = source, 0.0
                for axis in (*sums, *order):
                    after = (*state[:axis], target[axis], *state[axis + 1 :])
                    single = steps(state, after, sizes)
                    assert single is not None
                    parts = [n for e, n in zip(state, sizes, strict=True) if e >= 0]
                    assert not single or single[0].before == 1 / math.prod(parts)
                    total += reshard_sent(single, 1.0, sizes)
                    state = after
                assert reshard_sent(moves, 1.0, sizes) <= total + 1e-12, (source, target)
