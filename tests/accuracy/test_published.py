"""Published step times are met: what `make tables` prints in full, here where it is quick."""

from __future__ import annotations

import csv
import itertools
from math import isnan, prod
from pathlib import Path
from statistics import mean

import jax
import pytest
from published_tables import (
    DATA,
    MemoryRow,
    Row,
    alpa_rows,
    fsdp_rows,
    fsdp_run,
    iteration_rows,
    layer_rows,
    megatron_rows,
    rank_correlation,
    read,
)


def off(rows: list[Row]) -> float:
    """The mean error, all of it printed (`pytest -s`)."""
    for row in rows:
        print(f"{row.name:45} {row.published:9.3f} {row.predicted:9.3f} {row.error:+.1%}")
    return mean(abs(row.error) for row in rows)


def test_korthikantis_layers() -> None:
    rows = list(layer_rows())
    assert len(rows) == 15
    assert off(rows) <= 0.10
    # Which way of training is quicker than which, forward and backward together.
    both = [row for row in rows if row.name.endswith("both")]
    assert rank_correlation(both) == pytest.approx(1)


def test_megatrons_rows_without_pipelines() -> None:
    rows = list(megatron_rows())
    assert [row.name for row in rows] == ["1.7B", "3.6B", "7.5B", "18B"]
    assert off(rows) <= 0.10


def test_the_programs_of_the_sweep_have_the_published_parameters() -> None:
    for row in read(DATA, "mosaicml_fsdp_sweep_a100_40gb"):
        run = fsdp_run(row)
        shapes = jax.tree.leaves(run.model.parameters("float32"))
        assert sum(prod(s.shape) for s in shapes) == int(row["NumParams"])
        assert run.batch * run.count * run.data == int(row["GlobalBatchSize"])


@pytest.mark.slow
def test_korthikantis_iterations() -> None:
    assert off(list(iteration_rows())) <= 0.10


@pytest.mark.slow
def test_some_rows_of_the_fsdp_sweep(tmp_path: Path) -> None:
    """All 78 take five minutes."""
    name = "mosaicml_fsdp_sweep_a100_40gb"
    rows = list(itertools.islice(read(DATA, name), 3, None, 13))
    with (tmp_path / f"{name}.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert off(list(fsdp_rows(tmp_path))) <= 0.12


@pytest.fixture(scope="module")
def alpa() -> list[MemoryRow]:
    return list(alpa_rows())


@pytest.mark.slow
def test_alpas_meshes_are_ranked(alpa: list[MemoryRow]) -> None:
    ran = [row for row in alpa if row.ran]
    assert off(list(ran)) <= 0.10
    assert rank_correlation(ran) >= 0.85


@pytest.mark.slow
@pytest.mark.xfail(
    reason="0.78: four of the nine are within 5 % of each other, and within 1 % by prediction",
    raises=AssertionError,
)
def test_the_meshes_of_alpas_own_plans_alone_are_ranked(alpa: list[MemoryRow]) -> None:
    assert rank_correlation([row for row in alpa if row.name.startswith("auto")]) >= 0.85


@pytest.mark.slow
def test_alpas_peak_memory_and_who_runs_out_of_it(alpa: list[MemoryRow]) -> None:
    assert sum(isnan(row.published) for row in alpa) == 5
    assert [row.name for row in alpa if row.fits != row.ran] == []
    errors = [abs(row.predicted_peak / row.published_peak - 1) for row in alpa if row.ran]
    assert mean(errors) <= 0.15
