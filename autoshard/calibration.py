"""How fast are the devices that are here?  `calibrate()` measures them and describes a cluster.

Products, chains of elementwise functions, streams through memory and the collectives are timed on
all devices at once, and become the figures of a cluster file: mean rates for the chip, a fit over
many collectives for the wires. The wires are described as one switch, whatever they are; devices of
several processes are not measured.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from autoshard import atomic_file
from autoshard.calibration_file import cluster_text
from autoshard.calibration_suite import CalibrationError, measured
from autoshard.measure import Tell
from autoshard.mesh import checked_devices
from cost_models.cluster import Cluster, cluster


def calibrate(
    devices: Sequence[Any] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    quick: bool = False,
    progress: Tell | None = None,
) -> Cluster:
    """Measure these devices (None: those jax has), and describe them as a cluster.

    out: a file to write, which `autoshard.cluster("out.toml:8")` reads; one that exists already
    only with force. quick: some 20 seconds in place of minutes, and coarser. The cluster is named
    after the file. Nothing else should run on the machine meanwhile.

    Raises CalibrationError for less than two devices, for unlike ones, where jax runs in several
    processes, for a file that exists or can not be written, and where a machine is so busy that
    nothing can be measured; DevicesError for what is no device.
    """
    found = _checked(jax.devices() if devices is None else devices)
    file = None if out is None else check_file(Path(out).expanduser(), force)
    name = "measured" if file is None else file.stem
    figures = measured(found, quick, progress or (lambda _: None), *_memory(found))
    text = cluster_text(name, found, figures, datetime.date.today())
    return _read_back(text, file, len(found))


def check_file(file: Path, force: bool) -> Path:
    """The file, if it may be written; CalibrationError otherwise."""
    folder = file.absolute().parent
    if file.suffix != ".toml":
        raise CalibrationError(f"{file}: the name of a cluster file ends in .toml")
    if not folder.is_dir():
        raise CalibrationError(f"cannot write {file}: there is no folder {folder}")
    if file.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "it is a folder" if file.is_dir() else f"the folder {folder} is not writable"
        raise CalibrationError(f"cannot write {file}: {what}")
    if file.exists() and not force:
        raise CalibrationError(
            f"{file} exists: give another name, or force=True (--force) to replace it"
        )
    return file


def _checked(devices: Sequence[Any]) -> list[Any]:
    if jax.process_count() > 1:
        raise CalibrationError(
            f"jax runs in {jax.process_count()} processes here; calibrate in one, and give its "
            "file to all"
        )
    found = checked_devices(devices)
    if len(found) < 2:
        raise CalibrationError(
            f"what is between devices takes two of them to measure, and here is {len(found)}; on a "
            "CPU, 8 virtual ones come from jax.config.update('jax_num_cpu_devices', 8) before jax "
            "starts (--devices 8 on the command line)"
        )
    kinds = sorted({d.device_kind for d in found})
    if len(kinds) > 1:
        raise CalibrationError(f"a cluster has devices of one kind, not {' and '.join(kinds)}")
    return found


def _memory(devices: Sequence[Any]) -> tuple[int, str]:
    """Bytes one device has for a program, and who says so."""
    stats = devices[0].memory_stats()
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"]), "bytes_limit of jax.Device.memory_stats()"
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // len(devices), f"assumption: the machine's memory, shared by {len(devices)}"


def _read_back(text: str, file: Path | None, count: int) -> Cluster:
    """The cluster of the file's text, which is written first if a file is wanted."""
    if file is not None:
        atomic_file.write(file, text)
        return cluster(f"{file}:{count}")
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "measured.toml"
        inside.write_text(text, encoding="utf-8")
        return cluster(f"{inside}:{count}")
