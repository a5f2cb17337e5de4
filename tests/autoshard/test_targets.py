"""What are XLA's compile-only clients asked for?  (That they answer needs libtpu: not run here.)"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autoshard import targets
from cost_models.cluster import cluster


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("v5e:4x4", "v5e:4x4", {}),
        ("v3:4x4", "v3:4x4", {}),  # chips, as libtpu counts them: it answers with 32 devices
        ("v2:1x1", "v2:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
        ("v7:2x2x1", "tpu7x:2x2x1", {}),
        ("v7:2x4x4x4", "tpu7x:4x4x4", {"num_slices": 2}),
        ("v4:2x2x1", "v4:2x2x1", {"chip_config_name": "megacore"}),
    ],
)
def test_the_topology_of_a_tpu(
    spec: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def topology(*args: Any) -> Any:
        asked.append(args)
        return SimpleNamespace(devices=())

    monkeypatch.setattr(targets, "_topology", topology)
    assert targets.target_devices(cluster(spec)) == []
    ((platform, topology_name, given),) = asked
    assert (platform, topology_name, dict(given)) == ("tpu", name, options)


@pytest.mark.parametrize("name", ["v100", "a800", "h100-pcie", "b200", "gb200"])
def test_the_compiler_is_told_of_every_nvidia_gpu(name: str) -> None:
    text = targets.gpu_target(cluster(f"{name}:8").compiler)
    assert "core_count: " in text
    assert "cuda_compute_capability { major: " in text


def test_there_is_no_compiler_for_amd_gpus_alone() -> None:
    with pytest.raises(targets.NoCompiler, match="mi300x has no cuda_compute_capability"):
        targets.target_devices(cluster("mi300x:8"))
