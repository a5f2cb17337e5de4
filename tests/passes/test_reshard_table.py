"""The table of reshard costs says what single reshards cost, however it groups them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.cluster import cluster
from cost_models.topology import lay
from passes.reshard import reshard_seconds, steps
from passes.reshard_table import PICO, ReshardTable
from passes.solve.problem import INFINITY

CLUSTER = cluster("h100:2x8")
MESHES = [(16,), (4, 4), (2, 4, 2), (2, 2, 2, 2)]


@settings(max_examples=60, deadline=None)
@given(
    st.data(), st.sampled_from(MESHES), st.sampled_from([3e3, 5e7]), st.sampled_from([1.0, 12.0])
)
def test_a_matrix_holds_what_each_change_costs(
    data: st.DataObject, sizes: tuple[int, ...], nbytes: float, trips: float
) -> None:
    links = lay(CLUSTER, sizes)
    table = ReshardTable(sizes, links)
    shardings = st.lists(
        st.tuples(*[st.integers(-2, 3)] * len(sizes)), min_size=1, max_size=6, unique=True
    )
    for _ in range(2):  # the second time some sequences are known, and new ones come
        source, target = (tuple(data.draw(shardings)) for _ in range(2))
        matrix = table.matrix(source, target, nbytes, trips, nbytes)
        for i, f in enumerate(source):
            for j, t in enumerate(target):
                moves = steps(f, t, sizes)
                if moves is None:
                    assert matrix[i, j] == INFINITY
                else:
                    wanted = reshard_seconds(moves, nbytes, links) * PICO
                    assert matrix[i, j] == pytest.approx(wanted * trips, abs=trips)


def test_many_axes_are_told_apart_too() -> None:
    """With eight axes a pair of shardings is more than a machine number can name."""
    sizes = (2,) * 8
    links = lay(cluster("h100:32x8"), sizes)
    random = np.random.default_rng(0)
    axes = tuple({tuple(row) for row in random.integers(-1, 7, (40, 8)).tolist()})
    matrix = ReshardTable(sizes, links).matrix(axes, axes, 1e6, 1.0, 1e6)
    for i, f in enumerate(axes[:8]):
        for j, t in enumerate(axes):
            moves = steps(f, t, sizes)
            assert moves is not None
            wanted = reshard_seconds(moves, 1e6, links) * PICO
            assert matrix[i, j] == pytest.approx(wanted, abs=1)
