"""The devices jax has are recognised, with the shape in which they are wired."""

from __future__ import annotations

from types import SimpleNamespace as Device

import jax
import pytest

import autoshard
from autoshard.devices import cluster_here


def tpus(kind: str, *extents: int, slices: int = 1) -> list[Device]:
    x, y, z = extents
    return [
        Device(platform="tpu", device_kind=kind, coords=(i, j, k), slice_index=s, process_index=0)
        for s in range(slices)
        for k in range(z)
        for j in range(y)
        for i in range(x)
    ]


def gpus(kind: str, nodes: int, each: int) -> list[Device]:
    return [
        Device(platform="gpu", device_kind=kind, process_index=n)
        for n in range(nodes)
        for _ in range(each)
    ]


@pytest.mark.parametrize(
    ("devices", "found"),
    [
        (tpus("TPU v5 lite", 4, 4, 1), "tpu-v5e:4x4"),
        (tpus("TPU v5 lite", 2, 4, 1, slices=2), "tpu-v5e:2x2x4"),
        (tpus("TPU v6 lite", 2, 2, 1), "tpu-v6e:2x2"),
        (tpus("TPU v4", 2, 2, 1), "tpu-v4:2x2x1"),
        (tpus("TPU v5", 4, 4, 4), "tpu-v5p:4x4x4"),
        (gpus("NVIDIA H100 80GB HBM3", 2, 8), "h100:2x8"),
        (gpus("NVIDIA A100-SXM4-40GB", 1, 4), "a100-40gb:1x4"),
        (
            [Device(platform="cpu", device_kind="cpu", process_index=n // 4) for n in range(8)],
            "cpu:8",
        ),
    ],
)
def test_devices_are_recognised(
    devices: list[Device], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert str(cluster_here()) == found


def test_unknown_hardware_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: gpus("NVIDIA L4", 1, 2))
    with pytest.raises(autoshard.UnknownCluster, match="2 devices of kind 'NVIDIA L4', which"):
        autoshard.plan(lambda x: x, 1.0)
