"""Which devices does XLA compile for when there are none?  A cluster's compile-only topology.

XLA's compilers for TPU and GPU run on any Linux machine. The TPU's comes with the libtpu wheel; the
GPU's with two wheels, no driver and no CUDA toolkit:

    pip install "autoshard[verify-tpu]"
    pip install --no-deps "jax-cuda12-plugin==$JAX" "jax-cuda12-pjrt==$JAX"      # JAX=0.10.2

What they are told of a chip stands in its cluster file, under [compiler].
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
from jax.experimental import topologies

from cost_models.cluster import Cluster

# Keys of [compiler] that are not handed on as they are.
_TPU_OWN = ("topology", "clock_rate_ghz")
_GPU_OWN = ("device_description_str", "cuda_compute_capability")


class NoCompiler(RuntimeError):
    """A cluster that can not be compiled for here: what to install or to change."""


def target_devices(cluster: Cluster) -> list[Any]:
    """Devices of a cluster that need not exist, to compile for; raises NoCompiler."""
    if cluster.platform == "cpu":
        return _virtual(cluster)
    needed = "topology" if cluster.platform == "tpu" else "cuda_compute_capability"
    if needed not in cluster.compiler:
        raise NoCompiler(
            f"{cluster.name} has no {needed} in a [compiler] table of its cluster file, so that "
            "XLA can not be told what to compile for; of a TPU or NVIDIA GPU, copy a like chip's"
        )
    return list(_topology(cluster.platform, *_asked(cluster)).devices)


def _virtual(cluster: Cluster) -> list[Any]:
    here = jax.devices("cpu")
    if len(here) < cluster.devices:
        raise NoCompiler(
            f"{cluster} has {cluster.devices} devices, and jax has started with {len(here)}; set "
            f"jax.config.update('jax_num_cpu_devices', {cluster.devices}) before jax starts"
        )
    return here[: cluster.devices]


def _asked(cluster: Cluster) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The topology's name and options, as jax's compile-only clients take them."""
    if cluster.platform == "tpu":
        at = next(k for k, level in enumerate(cluster.network) if level.kind == "torus")
        slices, torus = cluster.extents[:at], cluster.extents[at]
        name = f"{cluster.compiler['topology']}:{'x'.join(map(str, torus))}"
        options: dict[str, Any] = {k: v for k, v in cluster.compiler.items() if k not in _TPU_OWN}
        if slices:
            options["num_slices"] = slices[0][0]
        if any(size % 2 for size in torus[:2]):  # libtpu takes hosts of 2 x 2 chips otherwise
            options["chips_per_host_bounds"] = (*(math.gcd(size, 2) for size in torus[:2]), 1)
        return name, tuple(options.items())
    nodes, per_node = (1, *cluster.shape)[-2:]
    name = f"1x{nodes}x{per_node}"  # slices x hosts x GPUs of a host
    return name, (("target_config", gpu_target(cluster.compiler)), ("topology", name))


def gpu_target(compiler: Mapping[str, str | float]) -> str:
    """The text of XLA's `GpuTargetConfigProto` (xla/stream_executor/device_description.proto)."""
    major, _, minor = str(compiler["cuda_compute_capability"]).partition(".")
    feature = "ACCELERATED_FEATURES" if minor.endswith("a") else "NONE"
    capability = f"major: {major} minor: {minor.rstrip('a')} feature_extension: {feature}"
    fields = [f"{k}: {v}" for k, v in compiler.items() if k not in _GPU_OWN]
    return "\n".join(
        [
            "gpu_device_info {",
            *fields,
            f"cuda_compute_capability {{ {capability} }}",
            "}",
            'platform_name: "CUDA"',
            # cuDNN as in XLA's own tables: xla/backends/gpu/target_config/specs/a100_sxm_40.txtpb
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            f'device_description_str: "{compiler["device_description_str"]}"',
        ]
    )


@lru_cache(maxsize=16)
def _topology(platform: str, name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    wheel = _missing(platform)
    if wheel:
        raise NoCompiler(f"there is no compiler for {platform.upper()} here: {wheel}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks Google's cloud where it runs
    client = "tpu" if platform == "tpu" else "cuda"
    try:
        return topologies.get_topology_desc(name, client, **dict(options))
    except Exception as e:  # of many kinds, by version
        if "lockfile" in str(e) or "already in use" in str(e):
            raise NoCompiler(
                "another process is using libtpu, which lets in one at a time: wait for it to end, "
                "or set ALLOW_MULTIPLE_LIBTPU_LOAD=true where no TPU is at work"
            ) from e
        raise NoCompiler(
            f"the {platform.upper()} compiler here does not know the topology {name}: {_first(e)}"
        ) from e


def _missing(platform: str) -> str:
    """What to install to compile for this platform; empty where it is there."""
    if platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            return 'pip install "autoshard[verify-tpu]"'
        return ""
    version = jax.__version__
    line = f"pip install --no-deps jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
    try:
        found = {importlib.metadata.version(f"jax-cuda12-{part}") for part in ("plugin", "pjrt")}
    except importlib.metadata.PackageNotFoundError:
        return line
    if found != {version}:
        return f"the plugin is of version {', '.join(sorted(found))} and jax of {version}: {line}"
    return ""


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
