from __future__ import annotations

import re
from pathlib import Path

import pytest

from cost_models.cluster import cluster
from cost_models.cluster_file import CATALOGUE, ClusterFileError, names, read

MINE = """
name = "mine"
platform = "gpu"
shape = [2, 4]
[chip]
name = "T"
hbm_total_GB = 16
hbm_usable_GiB = 12
hbm_bandwidth_GBps = 300
vector_GFLOPs = 8100
[chip.peak_TFLOPs]
float16 = 65
float32 = 8.1
[[network]]
name = "Ethernet"
kind = "switch"
bandwidth_MBps = 1250
latency_us = 30
[[network]]
name = "PCIe"
kind = "switch"
max_size = 4
bandwidth_GBps = 12
efficiency = 0.5
latency_ns = 5000
"""


def write(folder: Path, text: str = MINE) -> Path:
    file = folder / "mine.toml"
    file.write_text(text)
    return file


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = write(tmp_path)
    c = cluster(str(file))
    assert str(c) == "mine:2x4"
    assert (c.chip.hbm_total_bytes, c.memory_limit) == (16 * 10**9, 12 * 2**30)
    assert c.chip.vector_flops == 8.1e12
    assert c.chip.peak_flops == {"float16": 65e12, "float32": 8.1e12}
    assert [level.bandwidth for level in c.network] == [1.25e9, 12e9]
    assert [level.latency for level in c.network] == pytest.approx([30e-6, 5e-6])
    assert cluster(f"{file}:3x2").devices == 6
    assert cluster(f"{file}:8").shape == (2, 4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hbm_total_GB = 16", "", "[chip]: no hbm_total"),
        ("hbm_total_GB = 16", "hbm_total = 16", "say the unit in the key: GB, GiB, MiB"),
        ("hbm_total_GB = 16", "hbm_total_GBps = 16", "say the unit in the key: GB, GiB, MiB"),
        ("hbm_total_GB = 16", "hbm_total_GB = '16'", "hbm_total_GB is '16', not a number above"),
        ("hbm_total_GB = 16", "hbm_total_GB = nan", "is nan, not a number above zero"),
        ("hbm_total_GB = 16", "hbm_total_GB = 0", "is 0, not a number above zero"),
        (
            "hbm_total_GB = 16",
            "hbm_totl_GB = 16",
            "unknown key 'hbm_totl_GB'; known are name, peak",
        ),
        ("float16 = 65", "float16 = true", "peak_TFLOPs.float16 is True, not a number above zero"),
        ("float16 = 65\nfloat32 = 8.1", "", "not a table of FLOP/s per dtype"),
        ("efficiency = 0.5", "efficiency = 50", "is 50, not a share above 0 and at most 1"),
        ("max_size = 4", "max_size = 4.5", "is 4.5, not a whole number"),
        ("max_size = 4", "max_size = -4", "is -4, not a whole number"),
        (
            'kind = "switch"',
            'kind = "bus"',
            "[[network]] 1: kind is 'bus', not switch, torus, direct or links",
        ),
        ("max_size = 4", "max_size = 4\nlinks = [[0, 1], [1, 0]]", "kind links, and no other, has"),
        ("max_size = 4", "max_size = 4\nlinks = [[0, 1], [1]]", "not a square table of whole"),
        ('platform = "gpu"', 'platform = "npu"', "platform is 'npu', not cpu, gpu or tpu"),
        ("shape = [2, 4]", "shape = '2x4'", "shape is '2x4', not a list such as [2, 8]"),
        ("[[network]]", "[[net]]", "unknown key 'net'"),
        ("shape = [2, 4]", "shape = [2, 4", "is no TOML"),
        (
            "shape = [2, 4]",
            "shape = [2, 4]\ncompiler = {cuda_compute_capability = 'sm_90'}",
            "[compiler]: cuda_compute_capability is 'sm_90', not such as '9.0'",
        ),
    ],
)
def test_a_wrong_file_says_where_and_what(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MINE
    file = write(tmp_path, MINE.replace(old, new))
    with pytest.raises(ClusterFileError) as e:
        cluster(str(file))
    assert message in str(e.value)
    assert "mine.toml" in str(e.value)


@pytest.mark.parametrize("name", names())
def test_every_number_of_the_catalogue_names_its_source(name: str) -> None:
    text = (CATALOGUE / f"{name}.toml").read_text()
    defined = set(re.findall(r"^#   \[(\w+)\] ", text, re.MULTILINE))
    numbers = [line for line in text.splitlines() if re.match(r"\w+ *= *[\[\d.-]*\d", line)]
    assert len(numbers) >= 12
    for line in numbers:
        comment = line.partition("#")[2].strip()
        assert len(comment) >= 5, f"{name}.toml: no source beside {line!r}"
        assert set(re.findall(r"\[([a-z]+)\]", comment)) <= defined, line
        # A source is a place on the web, one of the file's own tags, or a plain admission.
        said = (
            r"[a-z]\.(com|org|io|dev|edu|net)|\[\w+\]|nvidia-smi|assumption|above|half|README|as of"
        )
        assert re.search(said, comment), f"{name}.toml: no source in {line!r}"


@pytest.mark.parametrize("name", names())
def test_every_file_of_the_catalogue_reads(name: str) -> None:
    data = read(CATALOGUE / f"{name}.toml")
    assert data["name"] == name
    assert data["device_kinds"]


def test_no_alias_or_device_kind_is_given_twice() -> None:
    files = [read(CATALOGUE / f"{name}.toml") for name in names()]
    for key in ("aliases", "device_kinds"):
        given = [a for f in files for a in f[key]] + (list(names()) if key == "aliases" else [])
        assert len(given) == len(set(given))
