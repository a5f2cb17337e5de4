from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cost_models.cluster import (
    Cluster,
    ClusterError,
    UnknownCluster,
    by_device_kind,
    cluster,
    names,
)
from cost_models.units import GiB

SPECS = [
    "cpu:8", "a100:2x8", "a100-40gb:8", "h100:2x8", "h200:4", "tpu-v4:4x4x4", "tpu-v5e:4x4",
    "tpu-v5e:2x16x16", "tpu-v5p:2x2x1", "tpu-v6e:16x16", "tpu-v3:4x4", "tpu-v7:2x4x4x4",
    "mi300x:2x8", "gb200:2x72",
]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "text", "devices"),
    [
        ("cpu:8", "cpu:8", 8),
        ("cpu", "cpu:8", 8),
        ("h100:8", "h100:1x8", 8),
        ("h100:4", "h100:1x4", 4),
        ("h100:16", "h100:2x8", 16),
        ("H100:2X4", "h100:2x4", 8),
        (" a100-80gb:1x8 ", "a100:1x8", 8),
        ("v5e:4x4", "tpu-v5e:4x4", 16),
        ("v5litepod:2x2", "tpu-v5e:2x2", 4),
        ("tpu-v5e:2x4x4", "tpu-v5e:2x4x4", 32),
        ("v4:4x4x4", "tpu-v4:4x4x4", 64),
        ("v3:4x4", "tpu-v3:4x4", 32),  # chips are counted, and jax sees two devices on each
        ("v3:2x4x4", "tpu-v3:2x4x4", 64),
        ("ironwood:4x4x4", "tpu-v7:4x4x4", 128),
        ("gb200:72", "gb200:1x72", 72),
        ("mi300x:16", "mi300x:2x8", 16),
    ],
)
def test_specs(spec: str, text: str, devices: int) -> None:
    c = cluster(spec)
    assert (str(c), c.devices) == (text, devices)
    assert cluster(text) == c


def test_one_slice_has_one_level_and_two_have_two() -> None:
    assert [level.name for level in cluster("v5e:4x4").network] == ["ICI"]
    assert [level.name for level in cluster("v5e:2x4x4").network] == ["DCN", "ICI"]
    assert cluster("v5e:2x4x4").extents == ((2,), (4, 4))
    assert cluster("v3:4x4").extents == ((4, 4), (2,))
    assert cluster("v3:2x4x4").extents == ((2,), (4, 4), (2,))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h100:12", "h100:12: NVLink 4 joins 8 devices and 12 is no multiple of 8"),
        ("h100:1x16", "h100:1x16: NVLink 4 joins at most 8 devices, not 16"),
        ("h100:2x2x8", "write it as h100:8 or h100:2x8"),
        ("h100:0x8", "sizes must be whole numbers above zero"),
        ("h100:eight", "cannot read 'eight' in 'h100:eight' as a shape"),
        ("h100:", "cannot read '' in 'h100:' as a shape"),
        ("h100", "h100: say how many devices, as h100:8 or h100:2x8"),
        ("v5e:16", "write it as tpu-v5e:4x4"),
        ("v5e:32x8", "tpu-v5e:32x8: a dim of ICI has at most 16 devices"),
        ("v4:4x4", "write it as tpu-v4:4x4x4"),
        ("v4:32x32x32", "ICI joins at most 4096 devices, not 32768"),
        ("cpu:2x4", "write it as cpu:8"),
        ("v3:4", "write it as tpu-v3:4x4 (2 torus dims) or 2x4x4 (two slices)"),
        ("v3:64x8", "a dim of ICI has at most 32 devices"),
        ("gb200:80", "NVLink 5 joins 72 devices and 80 is no multiple of 72"),
        ("", "is written as text such as h100:2x8"),
        ("my.toml:4x4", "cannot read the cluster file my.toml"),
    ],
)
def test_bad_shapes(spec: str, message: str) -> None:
    with pytest.raises(ClusterError) as e:
        cluster(spec)
    assert message in str(e.value)


def test_an_unknown_name_gets_the_near_ones_and_what_to_do() -> None:
    with pytest.raises(UnknownCluster) as e:
        cluster("h1000:2x8")
    text = str(e.value)
    assert "no cluster is called 'h1000'. Near it: h100" in text
    assert "tpu-v5e" in text
    assert "my_cluster.toml:2x8" in text
    with pytest.raises(UnknownCluster, match=r"Near it: tpu-v5p, "):
        cluster("v5p2:2x2x1")
    with pytest.raises(UnknownCluster, match=r"'zzzz'\. The catalogue has"):
        cluster("zzzz:8")
    with pytest.raises(UnknownCluster, match=r"Near it: tpu-v7, tpu-v6e\."):
        cluster("v7e:2x2")


ways: list[Callable[[Cluster], object]] = [
    lambda c: pickle.loads(pickle.dumps(c)),
    lambda c: Cluster.from_dict(c.to_dict()),
    lambda c: Cluster.from_dict(json.loads(json.dumps(c.to_dict()))),
    lambda c: cluster(str(c)),
]


@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("spec", SPECS)
def test_round_trips(spec: str, way: Callable[[Cluster], object]) -> None:
    c = cluster(spec)
    assert way(c) == c
    assert hash(way(c)) == hash(c)


@pytest.mark.parametrize("data", [{}, {"name": "x"}, {**cluster("cpu:8").to_dict(), "chip": {}}])
def test_foreign_data_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(ClusterError, match="describe no cluster"):
        Cluster.from_dict(data)


def test_changed_data_are_refused() -> None:
    data = cluster("tpu-v5e:4x4").to_dict()
    with pytest.raises(ClusterError, match="write it as"):
        Cluster.from_dict({**data, "shape": [4, 4, 4]})
    with pytest.raises(ClusterError, match="sizes must be whole numbers"):
        Cluster.from_dict({**data, "shape": ["4", "4"]})


def test_the_catalogue_has_the_promised_clusters() -> None:
    wanted = {
        "cpu", "v100", "a100", "a100-40gb", "a800", "h100", "h100-pcie", "h200", "b200", "gb200",
        "mi250x", "mi300x", "tpu-v2", "tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-v7",
    }  # fmt: skip
    assert wanted <= set(names())


# What the vendors' data sheets say, by another way of writing it than the files'.
@pytest.mark.parametrize(
    ("spec", "bf16", "hbm_bandwidth", "link"),
    [
        ("a100:8", 312e12, 2.039e12, 600e9 / 2),  # NVLink counted both ways by NVIDIA
        ("h100:8", 989e12, 3.35e12, 900e9 / 2),
        ("h200:8", 989e12, 4.8e12, 900e9 / 2),
        ("tpu-v4:2x2x1", 275e12, 1.2e12, 90e9 / 2),  # scaling book: both ways of a link
        ("tpu-v5e:2x2", 197e12, 819e9, 90e9 / 2),
        ("tpu-v5p:2x2x1", 459e12, 2.765e12, 180e9 / 2),
        ("tpu-v6e:2x2", 918e12, 1.638e12, 180e9 / 2),
        ("a800:8", 312e12, 2.039e12, 400e9 / 2),
        ("b200:8", 2250e12, 7.672e12, 1800e9 / 2),
        ("gb200:72", 2500e12, 7.928e12, 1800e9 / 2),
        ("mi300x:8", 1307e12, 5.3e12, 128e9 / 2),
    ],
)
def test_data_sheets(spec: str, bf16: float, hbm_bandwidth: float, link: float) -> None:
    c = cluster(spec)
    assert c.chip.peak_flops["bfloat16"] == bf16
    assert c.chip.hbm_bandwidth == hbm_bandwidth
    assert c.network[-1].bandwidth == link


@pytest.mark.parametrize(
    ("spec", "gib"),
    # From XLA's own message, "... exceeds available HBM (15.75G)"; GPUs: JAX's default 75 %.
    [("v4:2x2x1", 30.75), ("v5e:2x2", 15.75), ("v5p:2x2x1", 95.74), ("v6e:2x2", 31.25),
     ("a100:8", 0.75 * 80), ("h100:8", 0.75 * 81559 / 1024), ("h200:8", 0.75 * 143155 / 1024)],
)  # fmt: skip
def test_memory_a_program_may_use(spec: str, gib: float) -> None:
    assert cluster(spec).memory_limit == pytest.approx(gib * GiB, rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "bf16", "hbm_bandwidth", "gib"),  # of a chip: two devices
    [
        ("v2:2x2", 46e12, 700e9, 16),
        ("v3:2x2", 123e12, 900e9, 32),
        ("v7:2x2x1", 2307e12, 7.38e12, 192),
    ],
)
def test_a_chip_of_two_cores(spec: str, bf16: float, hbm_bandwidth: float, gib: float) -> None:
    c = cluster(spec)
    assert c.devices == 8
    assert 2 * c.chip.peak_flops["bfloat16"] == pytest.approx(bf16, rel=0.005)
    assert 2 * c.chip.hbm_bandwidth == hbm_bandwidth
    assert 2 * c.chip.hbm_total_bytes == gib * GiB
    assert c.network[-1].name == "chip"


def test_a_level_that_is_always_full_says_how_many_it_joins() -> None:
    data = cluster("v3:2x2").to_dict()
    data["network"][-1]["max_size"] = 0
    with pytest.raises(ClusterError, match="chip has no dims, so it is always full: give"):
        Cluster.from_dict(data)


def test_every_chip_is_plausible() -> None:
    for name in names():
        spec = {"tpu": f"{name}:1x1", "gpu": f"{name}:8", "cpu": name}
        kind = "tpu" if name.startswith("tpu") else "cpu" if name == "cpu" else "gpu"
        three = name in ("tpu-v4", "tpu-v5p", "tpu-v7")
        c = cluster(spec[kind] + ("x1" if three else ""))
        chip = c.chip
        assert c.platform == kind
        assert 0 < chip.hbm_bytes <= chip.hbm_total_bytes
        assert {"bfloat16", "float32"} <= set(chip.peak_flops)
        assert chip.vector_flops < max(chip.peak_flops.values())
        assert 0 < chip.host_bandwidth < chip.hbm_bandwidth or kind == "cpu"
        # Communication is never free: a link is slower than the memory behind it.
        assert all(level.bandwidth < chip.hbm_bandwidth for level in c.network)


def test_devices_are_recognised() -> None:
    assert by_device_kind("TPU v5 lite") == "tpu-v5e"
    assert by_device_kind("TPU v5") == "tpu-v5p"
    assert by_device_kind("cpu") == "cpu"
    assert by_device_kind("NVIDIA GeForce 256") is None


def test_importing_is_light() -> None:
    code = (
        "import sys, time; t = time.process_time(); import cost_models.cluster,"
        "cost_models.collectives, cost_models.roofline;"
        "print(time.process_time() - t, *sys.modules)"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(out[0]) < 0.3
    assert not {"jax", "networkx", "ortools", "numpy"} & set(out[1:])
