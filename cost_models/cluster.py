"""Which hardware is it?  `cluster("h100:2x8")`: the chip, how many, and how they are wired.

>>> c = cluster("tpu-v5e:4x4")
>>> str(c), c.devices, c.chip.name, c.network[-1].name
('tpu-v5e:4x4', 16, 'TPU v5e', 'ICI')
>>> cluster("h100:16").shape   # two nodes of eight: more than one NVLink domain holds
(2, 8)
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cost_models import cluster_file
from cost_models.cluster_file import ClusterError as ClusterError
from cost_models.fitted import Fitted

Platform = Literal["cpu", "gpu", "tpu"]


class UnknownCluster(ClusterError):
    """A name that neither the catalogue nor a file knows."""


@dataclass(frozen=True, slots=True)
class Chip:
    """One device.

    peak_flops: dense FLOP/s of the matrix unit per dtype. vector_flops: FLOP/s of everything else.
    hbm_bytes: memory one program may use, in bytes; hbm_total_bytes: all there is.
    hbm_bandwidth: bytes/s by the data sheet. matrix_efficiency, hbm_efficiency: the share of the
    peak that a large operation reaches. kernel_latency: seconds before a kernel does anything.
    host_bandwidth: bytes/s to and from the host's memory, each; 0 where nobody has said. cores: of
    a GPU, what works on a tile of a product at a time; 0 where tiles are not counted.
    fitted: constants of the finer models of `cost_models.product` and `cost_models.vector`.
    """

    name: str
    peak_flops: Mapping[str, float] = field(hash=False)
    vector_flops: float
    hbm_bytes: int
    hbm_total_bytes: int
    hbm_bandwidth: float
    hbm_efficiency: float = 1.0
    matrix_efficiency: float = 1.0
    kernel_latency: float = 0.0
    host_bandwidth: float = 0.0
    cores: int = 0
    fitted: Fitted | None = None


@dataclass(frozen=True, slots=True)
class Level:
    """One way in which devices, or groups of them, are joined.

    bandwidth: bytes/s in one direction, of one device on a switch, of one link on a torus, of one
    of the direct wires from each device to each other, or of one of the links that some devices
    have to some others: links[a][b] of them from device a to device b. efficiency: the share of it
    that a large collective reaches. latency: seconds of one step to a neighbour. startup: seconds
    once per collective. max_size: most devices or groups it joins, 0 for no limit. dims: how many
    sizes of a cluster's shape are its own; 0 for a level that always joins max_size devices, such
    as the cores of a chip. A torus dim is a ring where its size is wrap_at, and every dim is one
    where all sizes are multiples of wrap_multiple (0: never).

    wire: where NCCL runs the collectives, what it runs over: nvlink, pcie or network. ll_bandwidth:
    bytes/s that its LL protocol reaches at most, 0 for no limit. in_switch: bytes of an array that
    the switch itself adds up in a second, 0 where it can not. filling: seconds until a ring is
    full.
    """

    name: str
    kind: Literal["switch", "torus", "direct", "links"]
    bandwidth: float
    latency: float
    startup: float = 0.0
    efficiency: float = 1.0
    max_size: int = 0
    dims: int = 1
    wrap_at: int = 0
    wrap_multiple: int = 0
    wire: str = ""
    ll_bandwidth: float = 0.0
    in_switch: float = 0.0
    filling: float = 0.0
    links: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "links", tuple(map(tuple, self.links)))

    def rings(self, sizes: Sequence[int]) -> tuple[bool, ...]:
        """Per dim of a torus with these sizes whether its ends are joined."""
        every = bool(self.wrap_multiple) and all(s % self.wrap_multiple == 0 for s in sizes)
        return tuple(every or (s == self.wrap_at and s > 0) for s in sizes)


@dataclass(frozen=True, slots=True)
class Cluster:
    """So many chips, wired so. network and shape: the outermost level first, as in `h100:2x8`.

    A torus level has one entry of the shape for each of its dims, a level that is always full none:
    `tpu-v3:4x4` counts chips, and has twice as many devices. compiler: what XLA is told of the chip
    when it compiles without one.
    """

    name: str
    platform: Platform
    chip: Chip
    network: tuple[Level, ...]
    shape: tuple[int, ...]
    compiler: Mapping[str, str | float] = field(hash=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in self.shape):
            raise ClusterError(f"{self}: sizes must be whole numbers above zero")
        if not self.network:
            raise ClusterError(f"{self}: a cluster has at least one level of network")
        if len(self.shape) != sum(level.dims for level in self.network):
            raise ClusterError(f"{self}: write it as {_forms(self.name, self.network)}")
        for level, sizes in zip(self.network, self.extents, strict=True):
            _check_extent(self, level, sizes)

    @property
    def devices(self) -> int:
        """How many devices it has."""
        return math.prod(math.prod(sizes) for sizes in self.extents)

    @property
    def memory_limit(self) -> int:
        """Bytes one device has for a program: inputs, results, temporaries and code."""
        return self.chip.hbm_bytes

    @property
    def extents(self) -> tuple[tuple[int, ...], ...]:
        """How many devices or groups each level joins, per dim: the shape, cut by levels."""
        out, at = [], 0
        for level in self.network:
            out.append(self.shape[at : at + level.dims] if level.dims else (level.max_size,))
            at += level.dims
        return tuple(out)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {
            **asdict(self),
            "chip": {**asdict(self.chip), "peak_flops": dict(self.chip.peak_flops)},
            "compiler": dict(self.compiler),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Cluster:
        """The cluster that `to_dict` gave; raises ClusterError for other data."""
        try:
            return Cluster(
                name=str(data["name"]),
                platform=data["platform"],
                chip=_chip_of(data["chip"]),
                network=tuple(Level(**level) for level in data["network"]),
                shape=tuple(data["shape"]),
                compiler=dict(data.get("compiler", {})),
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise ClusterError(f"these data describe no cluster: {e!r}") from e

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"


def _chip_of(data: Mapping[str, Any]) -> Chip:
    fitted = data.get("fitted")
    return Chip(**{**data, "fitted": None if fitted is None else Fitted(**fitted)})


def cluster(spec: str) -> Cluster:
    """The cluster named by `h100:2x8`, `tpu-v5e:4x4`, `cpu:8` or `my_cluster.toml:4x4`.

    GPUs: nodes x GPUs per node, or one number for all of them. TPUs: the torus, a number of slices
    before it when there are several. Raises ClusterError.
    """
    name, sizes = _split_spec(spec)
    path = Path(name).expanduser() if name.endswith(".toml") else cluster_file.catalogue_file(name)
    if path is None:
        raise UnknownCluster(_unknown(name))
    data = cluster_file.read(path)
    levels = tuple(Level(**level) for level in data["network"])
    label = data["name"]
    shape = sizes or tuple(data["shape"])
    if not shape:
        raise ClusterError(f"{label}: say how many devices, as {_forms(label, levels)}")
    levels, shape = _fit(label, levels, shape)
    return Cluster(label, data["platform"], _chip(data["chip"]), levels, shape, data["compiler"])


def names() -> tuple[str, ...]:
    """Names of the clusters in the catalogue, sorted."""
    return cluster_file.names()


def by_device_kind(kind: str) -> str | None:
    """The catalogue's name for a `jax.Device.device_kind` such as `TPU v5 lite`, or None."""
    return cluster_file.by_device_kind(kind)


def _split_spec(spec: str) -> tuple[str, tuple[int, ...]]:
    """`h100:2x8` -> ("h100", (2, 8)); the sizes are () when there are none."""
    if not isinstance(spec, str) or not spec.strip():
        raise ClusterError(f"a cluster is written as text such as h100:2x8, not {spec!r}")
    name, colon, sizes = spec.strip().rpartition(":")
    if not colon or sizes.endswith(".toml"):
        return spec.strip(), ()
    if not re.fullmatch(r"[0-9]+([xX*][0-9]+)*", sizes):
        raise ClusterError(
            f"cannot read {sizes!r} in {spec!r} as a shape; write whole numbers with x between "
            "them, as in h100:2x8 or tpu-v5e:4x4"
        )
    return name, tuple(int(s) for s in re.split(r"[xX*]", sizes))


def _fit(
    name: str, levels: tuple[Level, ...], shape: tuple[int, ...]
) -> tuple[tuple[Level, ...], tuple[int, ...]]:
    """Levels in use and a full shape: one number is spread over nodes, one slice is left out."""
    inner, dims = _written(levels), sum(level.dims for level in levels)
    outer = dims - inner.dims  # outer levels are switches, one size each
    if inner.kind == "torus" and len(shape) == inner.dims:
        return levels[levels.index(inner) :], shape
    if inner.kind != "torus" and len(shape) == 1 and outer == 1:
        full = inner.max_size
        if full and shape[0] > full:
            if shape[0] % full:
                raise ClusterError(
                    f"{name}:{shape[0]}: {inner.name} joins {full} devices and {shape[0]} is no "
                    f"multiple of {full}; write nodes x devices per node, as {name}:2x{full}"
                )
            return levels, (shape[0] // full, full)
        return levels, (1, *shape)
    return levels, shape


def _written(levels: Sequence[Level]) -> Level:
    """The innermost level whose size is written in a shape."""
    return next(level for level in reversed(levels) if level.dims)


def _check_extent(whole: Cluster, level: Level, sizes: tuple[int, ...]) -> None:
    """Raise ClusterError when one level is larger than the hardware allows."""
    if not level.dims and (level.kind == "torus" or not level.max_size):
        raise ClusterError(
            f"{whole.name}: {level.name} has no dims, so it is always full: give it a max_size"
        )
    if level.kind == "links" and level != whole.network[-1]:
        raise ClusterError(f"{whole.name}: {level.name} joins groups; only devices have links")
    if level.max_size and math.prod(sizes) > level.max_size:
        raise ClusterError(
            f"{whole}: {level.name} joins at most {level.max_size} devices, not {math.prod(sizes)}"
        )
    if level.kind == "torus" and level.wrap_at and max(sizes) > level.wrap_at:
        raise ClusterError(f"{whole}: a dim of {level.name} has at most {level.wrap_at} devices")


def _forms(name: str, levels: tuple[Level, ...]) -> str:
    """How a shape of this cluster may be written, for messages."""
    inner = _written(levels)
    if inner.kind == "torus":
        dims = "x".join("4" * inner.dims)
        slices = f" or 2x{dims} (two slices)" if levels[0] != inner else ""
        return f"{name}:{dims} ({inner.dims} torus dims){slices}"
    most = inner.max_size or 8
    return f"{name}:{most}" + (
        f" or {name}:2x{most} (nodes x devices per node)" if len(levels) > 1 else ""
    )


def _unknown(name: str) -> str:
    """The message for a name nobody knows: near ones, all, and how to add one."""
    known = names()
    others = cluster_file.aliases()
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    close += [others[n] for n in difflib.get_close_matches(name.lower(), others, n=3, cutoff=0.6)]
    close += [k for k in known if name.lower() and name.lower() in k]
    near = f"Near it: {', '.join(list(dict.fromkeys(close))[:3])}. " if close else ""
    return (
        f"no cluster is called {name!r}. {near}The catalogue has {', '.join(known)}. To add one, "
        f"copy a file of {cluster_file.CATALOGUE}, change its numbers, and give its path: "
        "my_cluster.toml:2x8"
    )


def _chip(data: Mapping[str, Any]) -> Chip:
    """A cluster file's [chip] table as a Chip."""
    return Chip(
        name=data["name"],
        peak_flops=dict(data["peak"]),
        vector_flops=data["vector"],
        hbm_bytes=round(data["hbm_usable"]),
        hbm_total_bytes=round(data["hbm_total"]),
        hbm_bandwidth=data["hbm_bandwidth"],
        hbm_efficiency=data["hbm_efficiency"],
        matrix_efficiency=data["matrix_efficiency"],
        kernel_latency=data["kernel_latency"],
        host_bandwidth=data["host_bandwidth"],
        cores=data["cores"],
        fitted=None if data["fitted"] is None else Fitted(**data["fitted"]),
    )
