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
    own_rows,
    pipeline,
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


def test_megatrons_rows_are_of_the_published_runs() -> None:
    """Their devices, and the layers of each chunk where the scripts say them."""
    for row in read(DATA, "megatron_table1"):
        run = pipeline(row)
        assert (run.devices, run.groups) == (int(row["gpus"]), int(row["DP_derived"]))
        count = run.samples // (run.groups * run.batch)
        assert count == int(row["num_microbatches_derived"])
        layers = row["layers_per_virtual_stage(from_script)"]
        if layers:
            assert run.model.layers == int(layers) * run.stages * run.chunks


@pytest.mark.slow
def test_megatrons_pipelines() -> None:
    """Without pipelines, with 1F1B and interleaved; the larger models take longest to cut."""
    rows = list(megatron_rows(only=("1.7B", "7.5B", "39B", "76B", "310B")))
    assert len(rows) == 5
    assert off(list(rows)) <= 0.08
    assert all(row.peak * 2**30 < 80e9 for row in rows)


@pytest.mark.slow
def test_a_planners_own_choice_is_as_fast_as_megatrons() -> None:
    (row,) = own_rows(only=("1.7B",))
    assert row.predicted <= row.published


def test_the_programs_of_the_sweep_have_the_published_parameters() -> None:
    for row in read(DATA, "mosaicml_fsdp_sweep_a100_40gb"):
        run = fsdp_run(row)
        shapes = jax.tree.leaves(run.model.parameters("float32"))
        assert sum(prod(s.shape) for s in shapes) == int(row["NumParams"])
        assert run.batch * run.count * run.devices == int(row["GlobalBatchSize"])


@pytest.mark.slow
def test_korthikantis_iterations() -> None:
    assert off(list(iteration_rows())) <= 0.05


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
