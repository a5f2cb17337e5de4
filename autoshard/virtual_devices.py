"""How does one machine look like eight devices?  By telling jax before it looks for devices.

`prepare("cpu:8")` must come before anything that starts a backend.
"""

from __future__ import annotations

import os
import re
from typing import Any

import jax

from autoshard.mesh import DevicesError
from cost_models.cluster import Cluster, cluster

_FLAG = r"--xla_force_host_platform_device_count=\S+"


def prepare(spec: str | None) -> Cluster:
    """See to it that jax has the devices of a cluster (None: the cluster of those it has).

    Raises DevicesError when it can not have them.
    """
    if spec is None:
        from autoshard.devices import cluster_here

        return cluster_here()
    hardware = cluster(spec)
    if hardware.platform == "cpu":
        _ask_for(hardware.devices)
    found = jax.devices()
    if found[0].platform != hardware.platform or len(found) < hardware.devices:
        raise DevicesError(
            f"{hardware} has {hardware.devices} {hardware.platform} devices, and here are "
            f"{len(found)} of kind {found[0].platform}; to compare numbers on this machine's "
            f"processor, run it on cpu:{hardware.devices}"
        )
    return hardware


def prepare_compiler(spec: str | None) -> Cluster:
    """See to it that jax can compile for a cluster, on this machine's processor.

    Of a TPU's or a GPU's cluster only the compiler is used, and jax is kept from looking for one.
    """
    if spec is None:
        return prepare(None)
    hardware = cluster(spec)
    if hardware.platform == "cpu":
        return prepare(spec)
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    return hardware


def first_devices(count: int | None) -> list[Any]:
    """So many of the devices jax has, virtual ones on a CPU (None: all); raises DevicesError."""
    if count is not None:
        _ask_for(count, only_cpu=False)
    found: list[Any] = jax.devices()
    if count is not None and len(found) < count:
        raise DevicesError(
            f"here are {len(found)} devices of kind {found[0].platform}, not {count}; for virtual "
            "ones of this machine's processor set JAX_PLATFORMS=cpu"
        )
    return found[:count]


def _ask_for(count: int, only_cpu: bool = True) -> None:
    """Tell jax to make so many CPU devices; it listens only before its first look at devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if re.search(_FLAG, flags):
        # The older way to say it, which jax does not accept beside the newer one.
        os.environ["XLA_FLAGS"] = re.sub(_FLAG, "", flags).strip()
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        os.environ["XLA_FLAGS"] = flags  # too late; whether there are enough is seen later
    else:
        if only_cpu:
            jax.config.update("jax_platforms", "cpu")
