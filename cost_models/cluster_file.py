"""What does a cluster file say?  TOML with the unit in each key, read into SI units.

A file describes one kind of chip and how such chips are wired; how many there are is said where it
is used (`h100:2x8`), or by `shape = [2, 8]` in the file. `cost_models/clusters/*.toml` are the
catalogue. The keys:

    name, platform ("cpu", "gpu", "tpu"), aliases, device_kinds (as `jax.Device.device_kind`), shape
    [chip]              name, hbm_total_GiB, hbm_usable_GiB, hbm_bandwidth_GBps, hbm_efficiency,
                        vector_TFLOPs, matrix_efficiency, kernel_latency_us, and
                        host_bandwidth_GBps (to the host's memory, one direction), cores (of a
                        GPU: see `cost_models.tiles`); all of one device, which is half a chip where
                        jax sees two devices on it
    [chip.peak_TFLOPs]  bfloat16, float32, int8, ...: of the matrix unit, dense
    [chip.fitted]       where a compiler's estimates were fitted: see `cost_models.fitted`.
                        stream_GBps, start_us, element_ps, narrow_ps, alone_ps,
                        product_start_us, product_element_ps, product_narrow_ps,
                        product_narrow_near, product_softmax_ps, product_computed,
                        product_sum_stream_GBps, turned_stream_GBps, tile_folded_us,
                        tile_turned_us, filled_inside_MiB, unit, vmem_MiB, handed_on,
                        quotients_kept (0, 1 or 2), gather_inside_us, conv_efficiency, and the
                        tables efficiency (per dtype, bfloat16 among them) and moves_ps (per kind
                        of move)
    [[network]]         once per level, the outermost first: name, kind ("switch", "torus" or
                        "direct": a wire from each device to each other, or "links": a table,
                        links, of how many links each device has to each other), bandwidth_GBps
                        (one direction; of a device on a switch, of one link otherwise), efficiency,
                        latency_us (a step), startup_us (a collective), max_size, dims (0: always
                        full, not written in a shape); of a torus: wrap_at, wrap_multiple; where
                        NCCL runs: wire ("nvlink", "pcie" or "network"), ll_bandwidth_GBps (its LL
                        protocol's most), in_switch_GBps (of an array that the switch adds up),
                        filling_us (until a ring is full)
    [compiler]          what XLA's compiler is told of this chip when it compiles without one; by
                        XLA's own names, see `autoshard.targets`. clock_rate_ghz turns its cycles
                        into seconds

Other units work too (`hbm_total_GB`, `peak_GFLOPs`). An unknown key, a missing one or a number
without its unit is an error.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cost_models.fitted import MOVES

_KINDS = ("switch", "torus", "direct", "links")
CATALOGUE = Path(__file__).parent / "clusters"

# What a unit counts in, and how much of it.
_UNITS: dict[str, tuple[str, float]] = {
    "GB": ("bytes", 1e9), "GiB": ("bytes", 2.0**30), "MiB": ("bytes", 2.0**20),
    "GBps": ("bytes/s", 1e9), "MBps": ("bytes/s", 1e6),
    "TFLOPs": ("FLOP/s", 1e12), "GFLOPs": ("FLOP/s", 1e9),
    "us": ("seconds", 1e-6), "ns": ("seconds", 1e-9), "ms": ("seconds", 1e-3),
    "ps": ("seconds", 1e-12),
}  # fmt: skip

# Field -> what it holds, and what stands in for it when the file leaves it out (... must be there).
_FILE: dict[str, tuple[str, Any]] = {
    "name": ("text", ...), "platform": ("platform", ...), "chip": ("table", ...),
    "network": ("tables", ...), "aliases": ("texts", []), "device_kinds": ("texts", []),
    "shape": ("sizes", []), "compiler": ("plain values", {}),
}  # fmt: skip
_CHIP: dict[str, tuple[str, Any]] = {
    "name": ("text", ...), "peak": ("FLOP/s per dtype", ...), "vector": ("FLOP/s", ...),
    "hbm_total": ("bytes", ...), "hbm_usable": ("bytes", ...), "hbm_bandwidth": ("bytes/s", ...),
    "hbm_efficiency": ("share", 1.0), "matrix_efficiency": ("share", 1.0),
    "kernel_latency": ("seconds", 0.0), "host_bandwidth": ("bytes/s", 0.0),
    "cores": ("whole", 0), "fitted": ("table", None),
}  # fmt: skip
_FITTED: dict[str, tuple[str, Any]] = {
    "stream": ("bytes/s", ...), "start": ("seconds", ...), "element": ("seconds", ...),
    "narrow": ("seconds", ...), "alone": ("seconds", ...), "product_start": ("seconds", ...),
    "product_element": ("seconds", ...), "product_narrow": ("seconds", ...),
    "product_narrow_near": ("number", 1.0),
    "product_softmax": ("seconds", 0.0), "product_computed": ("number", 0.0),
    "product_sum_stream": ("bytes/s", 0.0), "turned_stream": ("bytes/s", 0.0),
    "tile_folded": ("seconds", 0.0), "tile_turned": ("seconds", 0.0),
    "filled_inside": ("bytes", 0.0),
    "unit": ("whole", ...), "vmem": ("bytes", ...), "handed_on": ("number", 0.0),
    "quotients_kept": ("whole", 0),
    "gather_inside": ("seconds", 0.0), "conv_efficiency": ("share", ...),
    "efficiency": ("share per dtype", ...), "moves": ("seconds per move", {}),
}  # fmt: skip
_LEVEL: dict[str, tuple[str, Any]] = {
    "name": ("text", ...), "kind": ("kind", ...), "bandwidth": ("bytes/s", ...),
    "latency": ("seconds", ...), "startup": ("seconds", 0.0), "efficiency": ("share", 1.0),
    "max_size": ("whole", 0), "dims": ("whole", 1), "wrap_at": ("whole", 0),
    "wrap_multiple": ("whole", 0), "wire": ("wire", ""), "ll_bandwidth": ("bytes/s", 0.0),
    "in_switch": ("bytes/s", 0.0), "filling": ("seconds", 0.0),
    "links": ("links", ()),
}  # fmt: skip


class ClusterError(ValueError):
    """A cluster that cannot be: a shape its wires do not allow, or data that describe none."""


class ClusterFileError(ClusterError):
    """A cluster file that cannot be read: where it is wrong and which keys it may have."""


def read(path: Path) -> dict[str, Any]:
    """The file as plain data in bytes, seconds, bytes/s and FLOP/s; raises ClusterFileError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ClusterFileError(f"cannot read the cluster file {path}: {e.strerror or e}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ClusterFileError(f"the cluster file {path} is no TOML: {e}") from e
    out = _table(data, _FILE, str(path))
    out["chip"] = _table(out["chip"], _CHIP, f"{path} [chip]")
    if out["chip"]["fitted"] is not None:
        out["chip"]["fitted"] = _fitted(out["chip"]["fitted"], f"{path} [chip.fitted]")
    out["network"] = [
        _level(level, f"{path} [[network]] {k + 1}") for k, level in enumerate(out["network"])
    ]
    capability = out["compiler"].get("cuda_compute_capability", "0.0")
    if not re.fullmatch(r"\d+\.\d+a?", str(capability)):
        raise ClusterFileError(
            f"{path} [compiler]: cuda_compute_capability is {capability!r}, not such as '9.0' or "
            "'9.0a'"
        )
    return out


def names() -> tuple[str, ...]:
    """Names of the clusters in the catalogue, sorted."""
    return tuple(sorted(file.stem for file in CATALOGUE.glob("*.toml")))


def catalogue_file(name: str) -> Path | None:
    """The catalogue's file for this name or alias (`v5e` for `tpu-v5e`), or None."""
    wanted = name.strip().lower()
    known = wanted if wanted in names() else aliases().get(wanted)
    return CATALOGUE / f"{known}.toml" if known else None


def aliases() -> dict[str, str]:
    """The catalogue's other names for its clusters, and what each stands for."""
    return {a: name for name in names() for a in read(CATALOGUE / f"{name}.toml")["aliases"]}


def by_device_kind(kind: str) -> str | None:
    """The catalogue's name for a `jax.Device.device_kind`, or None."""
    for name in names():
        if kind in read(CATALOGUE / f"{name}.toml")["device_kinds"]:
            return name
    return None


def _level(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One [[network]] table; raises ClusterFileError."""
    out = _table(data, _LEVEL, where)
    rows = out["max_size"] if out["kind"] == "links" else 0
    if len(out["links"]) != rows or (out["kind"] == "links" and not rows):
        raise ClusterFileError(
            f"{where}: kind links, and no other, has links: max_size rows of them"
        )
    return out


def _fitted(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The [chip.fitted] table, whole; raises ClusterFileError."""
    out = _table(data, _FITTED, where)
    if out["unit"] < 1:
        raise ClusterFileError(f"{where}: unit is 0, not the side of a matrix unit")
    if "bfloat16" not in out["efficiency"]:
        raise ClusterFileError(f"{where}: efficiency has no bfloat16, which the others follow")
    unknown = [kind for kind in out["moves"] if kind not in MOVES]
    if unknown:
        raise ClusterFileError(f"{where}: moves has {unknown[0]!r}; known are {', '.join(MOVES)}")
    return out


def _table(
    data: Mapping[str, Any], fields: Mapping[str, tuple[str, Any]], where: str
) -> dict[str, Any]:
    """The table's values by field name, units applied, left-out fields filled in."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        field, unit = _split(key, fields)
        if field not in fields:
            raise ClusterFileError(f"{where}: unknown key {key!r}; known are {', '.join(fields)}")
        out[field] = _checked(value, fields[field][0], unit, f"{where}: {key}")
    missing = [f for f, (_, default) in fields.items() if default is ... and f not in out]
    if missing:
        raise ClusterFileError(f"{where}: no {' and no '.join(missing)}")
    return {f: out.get(f, default) for f, (_, default) in fields.items()}


def _split(key: str, fields: Mapping[str, Any]) -> tuple[str, str]:
    """`hbm_bandwidth_GBps` -> ("hbm_bandwidth", "GBps"); ("hbm_bandwidth", "") without a unit."""
    found = re.fullmatch(r"(.+)_([A-Za-z]+)", key)
    return (found[1], found[2]) if found and key not in fields else (key, "")


def _checked(value: Any, holds: str, unit: str, where: str) -> Any:
    """The value as its field holds it, in SI units; raises ClusterFileError."""
    each, _, of = holds.partition(" per ")
    if of:
        if not isinstance(value, dict) or not value:
            raise ClusterFileError(f"{where} is {value!r}, not a table of {holds}")
        return {k: _checked(v, each, unit, f"{where}.{k}") for k, v in value.items()}
    units = [u for u, (kind, _) in _UNITS.items() if kind == holds]
    if units:
        if unit not in units:
            raise ClusterFileError(f"{where}: say the unit in the key: {', '.join(units)}")
        if not _is_number(value) or not (value > 0 or (value == 0 and holds == "seconds")):
            raise ClusterFileError(f"{where} is {value!r}, not a number above zero")
        return value * _UNITS[unit][1]
    fits, wanted = _PLAIN[holds]
    if unit or not fits(value):
        raise ClusterFileError(f"{where} is {value!r}, not {wanted}")
    return value


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _is_list(x: Any, of: type) -> bool:
    return isinstance(x, list) and all(isinstance(e, of) and not isinstance(e, bool) for e in x)


def _is_square(x: Any) -> bool:
    return isinstance(x, list) and all(_is_list(row, int) and len(row) == len(x) for row in x)


def _is_plain_table(x: Any) -> bool:
    return isinstance(x, dict) and all(_is_number(v) or isinstance(v, str) for v in x.values())


# What a field without a unit holds -> whether a value is that, and how to say it.
_PLAIN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda x: isinstance(x, str), "text"),
    "texts": (lambda x: _is_list(x, str), "a list of texts"),
    "platform": (lambda x: x in ("cpu", "gpu", "tpu"), "cpu, gpu or tpu"),
    "kind": (lambda x: x in _KINDS, "switch, torus, direct or links"),
    "links": (lambda x: _is_square(x), "a square table of whole numbers"),
    "wire": (lambda x: x in ("nvlink", "pcie", "network"), "nvlink, pcie or network"),
    "table": (lambda x: isinstance(x, dict), "a table"),
    "plain values": (_is_plain_table, "a table of texts and numbers"),
    "tables": (lambda x: _is_list(x, dict) and bool(x), "one or more [[network]] tables"),
    "sizes": (lambda x: _is_list(x, int) and all(n > 0 for n in x), "a list such as [2, 8]"),
    "whole": (lambda x: _is_list([x], int) and x >= 0, "a whole number"),
    "number": (lambda x: _is_number(x) and x >= 0, "a number of 0 or more"),
    "share": (lambda x: _is_number(x) and 0 < x <= 1, "a share above 0 and at most 1"),
}
