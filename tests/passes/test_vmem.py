"""What lies in VMEM takes no HBM: never more than fits, never what is large or waits long."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

import autoshard
from passes.lent import Span
from passes.vmem import in_vmem

MIB = 2**20
SPANS = st.lists(
    st.tuples(st.integers(0, 99), st.integers(1, 200), st.integers(0, 30)).map(
        lambda t: Span(t[0], min(100, t[0] + t[1]), float(t[2]))
    )
)


@given(SPANS)
def test_no_more_than_fits_and_only_what_is_small_or_soon_read(spans: list[Span]) -> None:
    found = in_vmem(spans, 100, 64.0)
    assert found.min() >= 0
    for step in range(100):
        there = [s for s in spans if s.begin <= step < s.end]
        assert found[step] <= sum(s.nbytes for s in there)
        at_once = [s for s in there if s.end - s.begin <= 4]
        assert found[step] <= (0.6 if at_once else 3 / 8) * 64
        if all(s.nbytes >= 8 for s in there) and not at_once:
            assert found[step] == 0


def test_what_is_large_lies_there_only_for_the_next_few_kernels() -> None:
    logits = [Span(0, 3, 32.0), Span(3, 20, 32.0)]
    assert list(in_vmem(logits, 6, 64.0)) == [32, 32, 32, 0, 0, 0]
    assert in_vmem([Span(0, 3, 33.0)], 3, 64.0).max() == 0  # more than half
    both = [Span(0, 3, 20.0), Span(0, 3, 20.0)]
    assert in_vmem(both, 3, 64.0).max() == 20  # no room for two


def peak(rows: int, cluster: str) -> float:
    """Memory of one device for a chain of products of [rows, 1024] values in one that returns."""

    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(4):
            x = jnp.cumsum(x @ w, axis=1)
        return jnp.sum(x, axis=1)

    x, w = (jax.ShapeDtypeStruct((n, 1024), jnp.float32) for n in (rows, 1024))
    mesh = {"data": autoshard.cluster(cluster).devices}
    hints = {"x": ("data", None), "w": (None, None)}
    plan = autoshard.plan(chain, x, w, cluster=cluster, mesh=mesh, hints=hints)
    return plan.cost.peak_memory


def test_results_between_products_take_hbm_only_where_they_are_large() -> None:
    weight, small, large = 4 * MIB, 1024, 32768  # rows on one device, of 4 KiB each
    assert peak(4 * small, "tpu-v5e:2x2") == weight + small * 4096 + small * 4
    assert peak(4 * large, "tpu-v5e:2x2") >= weight + 2 * large * 4096
    assert peak(4 * small, "h100:4") >= weight + 2 * small * 4096
