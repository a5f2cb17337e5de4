"""How does a measured cluster read?  As a cluster file, each number beside how it was found."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autoshard.columns import columns
from cost_models import cluster_file
from cost_models.cluster import Level
from cost_models.collectives import COLLECTIVES
from cost_models.fit import predicted
from cost_models.units import format_bytes, format_seconds

# A measured program: a dtype with rows and size of a product, "stream" with bytes, an elementwise
# function with elements, "kernels" with their count, a collective with bytes and group.
Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured, of one device while all are busy.

    products: FLOP/s per dtype; vector: FLOP/s; memory: bytes/s read and written; kernel: seconds of
    one small operation. wires: fitted to so many collectives, and off by the factor `wires_off` on
    average. memory_bytes: of a device, and who says so. rounds: each time is the median of so many.
    seconds: of a step of each program.
    """

    products: Mapping[str, float]
    vector: float
    memory: float
    kernel: float
    wires: Level
    wires_off: float
    collectives: int
    memory_bytes: int
    memory_source: str
    rounds: int
    seconds: Mapping[Key, float]


def cluster_text(name: str, devices: Sequence[Any], found: Figures, day: datetime.date) -> str:
    """The cluster file, as `cost_models.cluster_file` reads it."""
    first, count = devices[0], len(devices)
    platform = first.platform if first.platform in ("cpu", "tpu") else "gpu"
    how = f"measured {day}, jax {jax.__version__}, {count} devices, median of {found.rounds}"
    fitted = f"{how}, fitted to {found.collectives} collectives"
    gib = f"{found.memory_bytes / 2**30:.4g}"
    chip = [
        ("hbm_total_GiB", gib, found.memory_source),
        ("hbm_usable_GiB", gib, found.memory_source),
        ("hbm_bandwidth_GBps", _number(found.memory / 1e9), f"{how}: x + 1, all devices at once"),
        ("vector_GFLOPs", _number(found.vector / 1e9), f"{how}: exp and tanh, all devices at once"),
        ("kernel_latency_us", _number(found.kernel * 1e6), f"{how}: small operations in a row"),
    ]
    peaks = [
        (dtype, _number(rate / 1e9), f"{how}: products, all devices at once")
        for dtype, rate in found.products.items()
    ]
    network = [
        ("bandwidth_GBps", _number(found.wires.bandwidth / 1e9), fitted),
        ("latency_us", _number(found.wires.latency * 1e6), fitted),
        ("startup_us", _number(found.wires.startup * 1e6), fitted),
    ]
    return "\n".join(
        [
            f"# {count} devices of kind {first.device_kind}, measured by autoshard calibrate.",
            "# Efficiencies are left at 1: the figures are what programs reach, not what a data",
            f"# sheet promises. The wires as fitted are off by {found.wires_off:.2f}x on average.",
            "",
            f"name = {json.dumps(name)}",
            f'platform = "{platform}"',
            f"device_kinds = [{json.dumps(first.device_kind)}]",
            f"shape = [{count}]  # {how}",
            "",
            "[chip]",
            f"name = {json.dumps(first.device_kind)}",
            *_lines(chip),
            "",
            "[chip.peak_GFLOPs]",
            *_lines(peaks),
            "",
            "[[network]]",
            'name = "as measured"',
            'kind = "switch"',
            *_lines(network),
            *_compiler(first.device_kind),
            "",
            "# What was measured: seconds of one step on all devices at once.",
            *_details(found),
            "",
        ]
    )


def _lines(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    cells = [(f"{key} = {number}", f"# {source}") for key, number, source in rows]
    return [line.rstrip() for line in columns(cells, "ll", most=200)]


def _number(x: float) -> str:
    """Four digits, as TOML reads them."""
    return f"{x:.4g}"


def _compiler(kind: str) -> list[str]:
    """What XLA is told of a chip that the catalogue knows, for `verify`."""
    name = cluster_file.by_device_kind(kind)
    file = name and cluster_file.catalogue_file(name)
    told = cluster_file.read(file)["compiler"] if file else {}
    if not told:
        return []
    lines = [
        f"{key} = {json.dumps(value)}  # as of the catalogue's {name}.toml"
        for key, value in told.items()
    ]
    return ["", "[compiler]", *lines]


def _details(found: Figures) -> list[str]:
    """Every time, as comments, and what the fitted wires say of it."""
    rows = []
    for (what, *sizes), took in found.seconds.items():
        fitted = ""
        if what in COLLECTIVES:
            said = predicted(found.wires, what, sizes[0], sizes[1])
            fitted = f"fitted {format_seconds(said)}"
        rows.append((_words(what, sizes), format_seconds(took), fitted))
    return columns(rows, "lrr", "#   ")


def _words(what: str, sizes: Sequence[int]) -> str:
    if what in COLLECTIVES:
        return f"{what} of {format_bytes(sizes[0])} over {sizes[1]}"
    if what == "stream":
        return f"x + 1 of {format_bytes(sizes[0])}"
    if what == "kernels":
        return f"{sizes[0]} small operation{'s' if sizes[0] > 1 else ''}"
    if len(sizes) == 2:
        return f"{what} product of {sizes[0]} x {sizes[1]} x {sizes[1]}"
    return f"{what} of {sizes[0]} elements"
