"""Fit the constants of `cost_models.product` and `cost_models.vector` to XLA:TPU's own cycles.

    make fit ARGS="--chips v5e,v5p,v6e"            # fit to tests/data/tpu_cycles.csv
    make fit ARGS="--chips v6e --compile"          # first compile what the table lacks: an hour

The table has one row per case, and per chip the estimated cycles of the instructions that the case
compiled to, with a plus between them. Three in four cases are fitted; the rest tell the error. The
constants are written into the cluster files, under [chip.fitted].
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from compute_case import Case
from compute_cases import ahead, build, cases
from compute_predictions import predicted
from scipy.optimize import least_squares

from cost_models.cluster import Chip, cluster
from cost_models.cluster_file import CATALOGUE
from cost_models.fitted import Fitted

TABLE = Path(__file__).resolve().parent.parent / "data" / "tpu_cycles.csv"
SPECS = {"v3": "v3:1x1", "v4": "v4:1x1x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}

# What no fit finds:
# * the matrix unit's side, and the memory on a core of the chip (SHEET);
# * seconds per element of a product whose kernel goes on to a softmax: 3.86, 7.24 and 3.38 cycles
#   for 1024, of scores of 16 x 16 x 256 x 256 that stay in VMEM;
# * how much longer a product takes that computes both operands. Alone, with a float32 weight and a
#   sum as the other operand, it is 0.7, 0.5 and 1.0 for 2048 contracted, half of that for 8192. In
#   programs many an operand lies in VMEM, and it costs nothing: shares of about 0.3, all and 0.6 of
#   these are nearest to the steps of tests/accuracy;
# * up to which share of VMEM copies and sums stay there, and whether kernels hand on results: of
#   what compiled steps make, v5e and v6e keep most, v5p hardly anything. Compute of
#   tests/accuracy is nearest so: on v5p 8 % off on average, 11 with a fifth;
# * whether the weights of an attention are kept, narrowed: they are in steps for v5p;
# * whether tables are laid anew when a step begins: as compiled steps of DLRM have it, mostly;
# * how much longer kernels take for a gather inside: with four kinds of weights of GPT-2 small
#   split, not whole, 96 gathers take 13 us each on v5e and v5p, nothing on v6e. (On v5e in BERT,
#   ViT and a mixture of experts: 3.5, 32 and 246 us);
# * what a product's bfloat16 result costs that stays in VMEM: on v5e as much per element as one
#   that goes to HBM, on v6e nothing. 8192 x 1024 x 256 with all three there take 84,111 cycles on
#   v5e, 34,080 with a float32 result; on v6e 12,288 and 11,280, to HBM 63,937. (A chain on elements
#   costs as much more on v6e wherever its bfloat16 result goes);
# * the bandwidth of a product's kernel that also reduces, as it is counted on v6e: without limit.
#   What the memory can move is taken;
# * the bandwidth of copies from rows to columns: 168,520 cycles on v6e for 4096 x 2048 of float32,
#   337,040 for twice as many; half of it where one side lies in VMEM;
# * a tile whose rows are added up: 437,152 cycles on v5e, 210,400 on v5p and 346,656 on v6e for
#   16384 tiles of four rows of float32 (505,376, 235,360 and 350,752 for tiles of eight);
# * a tile whose rows are laid along the lanes: 788,992 cycles on v5e, 466,144 to 486,640 on v5p and
#   560,000 on v6e for 65536 tiles of two, four or eight rows of 8 to 64 columns;
# * up to which size of a table the kernel that adds rows to it fills it with zeros: 256 to 2048
#   rows of 128 float32 are added so to tables of 14.6 MiB on v5e and v5p and of 29.3 on v6e; not
#   to those of 19.5 on v5e, 24.4 on v5p and 31.3 on v6e (nor to one of 29.3 with rows of 512).
# (jax 0.10.2, libtpu 0.0.42.1)
SHEET = "docs.jax.dev/en/latest/pallas/tpu/hardware.html"
FIXED: dict[str, dict[str, Any]] = {
    "v5e": {
        "unit": 128,
        "vmem": 128 * 2**20,
        "product_softmax": 2.51e-12,
        "product_narrow_near": 1.0,
        "product_computed": 0.2,
        "product_sum_stream": 0.0,
        "turned_stream": 0.0,
        "tile_folded": 17.8e-9,
        "tile_turned": 8.03e-9,
        "filled_inside": 15 * 2**20,
        "handed_on": 0.2,
        "quotients_kept": 0,
        "gather_inside": 13e-6,
    },
    "v5p": {
        "unit": 128,
        "vmem": 64 * 2**20,
        "product_softmax": 4.04e-12,
        "product_narrow_near": 1.0,
        "product_computed": 0.5,
        "product_sum_stream": 0.0,
        "turned_stream": 0.0,
        "tile_folded": 7.34e-9,
        "tile_turned": 4.13e-9,
        "filled_inside": 15 * 2**20,
        "handed_on": 0.0,
        "quotients_kept": 1,
        "gather_inside": 13e-6,
    },
    "v6e": {
        "unit": 256,
        "vmem": 128 * 2**20,
        "product_softmax": 1.89e-12,
        "product_narrow_near": 0.0,
        "product_computed": 0.6,
        "product_sum_stream": cluster(SPECS["v6e"]).chip.hbm_bandwidth,
        "turned_stream": 697e9,
        "tile_folded": 12.1e-9,
        "tile_turned": 4.88e-9,
        "filled_inside": 30 * 2**20,
        "handed_on": 0.2,
        "quotients_kept": 2,
        "gather_inside": 0.0,
    },
}

Rows = dict[Case, dict[str, str]]


# --- the table


def read_table(path: Path = TABLE) -> Rows:
    """Per case the cycles on each chip, `303760+copy2064` where it became two instructions."""
    out: Rows = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            sizes = tuple(map(int, row.pop("sizes").split("x")))
            case = Case(row.pop("kind"), row.pop("op"), sizes, tuple(row.pop("dtypes").split(">")))
            out[case] = {chip: cycles for chip, cycles in row.items() if cycles}
    return out


def write_table(rows: Rows, path: Path = TABLE) -> None:
    """As `read_table` reads it, in the order of `cases`."""
    chips = sorted({chip for found in rows.values() for chip in found})
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["kind", "op", "sizes", "dtypes", *chips])
        for c in cases():
            found = rows.get(c, {})
            if found:
                sizes, dtypes = "x".join(map(str, c.sizes)), ">".join(c.dtypes)
                out.writerow([c.kind, c.op, sizes, dtypes, *(found.get(x, "") for x in chips)])


def cycles(case: Case, found: str) -> int:
    """Of all instructions, but for the copies that the layout of a parameter costs."""
    each = [n for n in found.split("+") if case.kind == "move" or not n.startswith("copy")]
    return sum(int(n.removeprefix("copy")) for n in each)


# --- the compiler


def compile_missing(rows: Rows, chip: str) -> None:
    """Compile the cases that the table lacks for a chip, and keep the table as it grows."""
    import jax

    from autoshard.hlo import read
    from autoshard.targets import target_devices

    chip_of = cluster(SPECS[chip]).chip
    ridge = chip_of.peak_flops["bfloat16"] / chip_of.hbm_bandwidth
    device = jax.sharding.SingleDeviceSharding(target_devices(cluster(SPECS[chip]))[0])
    for k, case in enumerate(cases()):
        if chip in rows.get(case, {}):
            continue
        begin = time.perf_counter()
        fn, args = build(case)
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) for a in args]
        options = {} if ahead(case, ridge) else {"xla_msa_enable": "false"}
        compiled = jax.jit(fn).lower(*placed).compile(compiler_options=options)
        module = read(compiled.runtime_executable().hlo_modules()[0].to_string())
        counted = [
            f"{'copy' * (i.opcode == 'copy')}{i.cycles}"
            for i in module.entry.instructions
            if i.cycles
        ]
        rows.setdefault(case, {})[chip] = "+".join(counted)
        print(f"{chip} {k} {case}: {time.perf_counter() - begin:.1f} s", flush=True)
        if k % 20 == 0:
            write_table(rows)
    write_table(rows)


# --- the fit

# Constant -> where the search starts.
_FIRST = {
    "start": 1.2e-6,
    "element": 1e-12,
    "narrow": 5e-12,
    "alone": 8e-12,
    "product_start": 3e-6,
    "product_element": 5e-13,
    "product_narrow": 5e-12,
    "conv_efficiency": 0.8,
}


def fit(chip: Chip, clock: float, rows: Mapping[Case, int], fixed: Mapping[str, Any]) -> Fitted:
    """The constants that come closest to these cycles, in the logarithm of seconds."""
    start = Fitted(
        stream=chip.hbm_bandwidth * 0.8,
        efficiency={"bfloat16": 0.95, "float32": 0.93},
        moves={},
        **_FIRST,
        **fixed,
    )
    vector = {c: n for c, n in rows.items() if c.kind in ("map", "reduce")}
    start = _fit(chip, start, clock, vector, ("stream", "start", "element", "narrow"))
    of_products = ("product_start", "product_element", "product_narrow", "bfloat16", "float32")
    products = {c: n for c, n in rows.items() if c.kind == "product"}
    before = start.efficiency
    start = _fit(chip, start, clock, products, of_products)
    if start.efficiency["float32"] == before["float32"]:  # no case waits for its arithmetic
        same = start.efficiency["bfloat16"]
        start = replace(start, efficiency={"bfloat16": same, "float32": same})
    alone = {c: n for c, n in rows.items() if c.kind == "alone"}
    if alone:
        start = _fit(chip, start, clock, alone, ("alone",))
    convolutions = {c: n for c, n in rows.items() if c.kind == "conv"}
    if convolutions:
        start = _fit(chip, start, clock, convolutions, ("conv_efficiency",))
    for kind, name in (("cumulative", "cumsum"), ("concatenate", "concatenate")):
        of = {c: n for c, n in rows.items() if c.op.split()[0] == name}
        if of:
            start = replace(start, moves={**start.moves, kind: 5e-12})
            start = _fit(chip, start, clock, of, (kind,))
    return start


def _fit(
    chip: Chip, at: Fitted, clock: float, rows: Mapping[Case, int], names: Sequence[str]
) -> Fitted:
    """Search these constants, each in units of where it starts; none below 0, no share above 1."""
    tables = {**at.efficiency, **at.moves}
    first = [tables[n] if n in tables else getattr(at, n) for n in names]

    def moved(x: Any) -> Fitted:
        values = dict(zip(names, (a * b for a, b in zip(x, first, strict=True)), strict=True))
        efficiency = {k: values.pop(k, old) for k, old in at.efficiency.items()}
        moves = {k: values.pop(k, old) for k, old in at.moves.items()}
        return replace(at, efficiency=efficiency, moves=moves, **values)

    def residuals(x: Any) -> list[float]:
        with_them = replace(chip, fitted=moved(x))
        return [float(np.log(predicted(with_them, c) * clock / n)) for c, n in rows.items()]

    shares = {"conv_efficiency", *at.efficiency}
    most = [1 / x if n in shares else 20.0 for n, x in zip(names, first, strict=True)]
    found = least_squares(
        residuals, np.ones(len(names)), bounds=(0, most), loss="soft_l1", f_scale=0.05
    )
    return moved(found.x)


# --- what it is worth


def errors(chip: Chip, clock: float, rows: Mapping[Case, int]) -> dict[Case, float]:
    """Per case predicted over compiled, less one."""
    return {c: predicted(chip, c) * clock / n - 1 for c, n in rows.items()}


def summary(found: Mapping[Case, float]) -> str:
    """A line per kind: median and 90th percentile of the error, fitted and held out."""
    lines = [f"{'':16}{'fitted':>22}{'held out':>26}"]
    kinds = {c: c.op.split()[0] if c.kind == "move" else c.kind for c in found}
    for kind in dict.fromkeys(kinds.values()):
        line = f"{kind:16}"
        for held in (False, True):
            of = [abs(e) for c, e in found.items() if kinds[c] == kind and c.held_out == held]
            if of:
                line += f"{np.median(of):10.1%}{np.quantile(of, 0.9):10.1%} ({len(of):3})"
            else:
                line += " " * 26
        lines.append(line)
    return "\n".join(lines)


def worth(found: Mapping[Case, float]) -> str:
    """Median and 90th percentile of the held-out errors of what steps of transformers do most."""
    said = []
    for kind in ("product", "map", "reduce", "chain"):
        of = [abs(e) for c, e in found.items() if c.kind == kind and c.held_out]
        said.append(f"{kind} {np.median(of):.0%}, {np.quantile(of, 0.9):.0%}")
    return f"Held-out error, median and 90th percentile: {'; '.join(said)}"


# --- the cluster files


_GIVEN = (
    "product_narrow_near",
    "product_softmax",
    "product_computed",
    "product_sum_stream",
    "turned_stream",
    "tile_folded",
    "tile_turned",
    "filled_inside",
    "handed_on",
    "quotients_kept",
    "gather_inside",
)


def table(f: Fitted, worth: str) -> str:
    """The [chip.fitted] tables as a cluster file holds them. worth: what the errors are."""
    ps = 1e12
    lines = [
        f"stream_GBps = {f.stream / 1e9:.4g}",
        f"start_us = {f.start * 1e6:.3g}",
        f"element_ps = {f.element * ps:.3g}",
        f"narrow_ps = {f.narrow * ps:.3g}",
        f"alone_ps = {f.alone * ps:.3g}",
        f"product_start_us = {f.product_start * 1e6:.3g}",
        f"product_element_ps = {f.product_element * ps:.3g}",
        f"product_narrow_ps = {f.product_narrow * ps:.3g}",
        *([f"product_narrow_near = {f.product_narrow_near:.3g}"] * (f.product_narrow_near < 1)),
        f"product_softmax_ps = {f.product_softmax * ps:.3g}",
        f"product_computed = {f.product_computed:.3g}",
        *(
            [f"product_sum_stream_GBps = {f.product_sum_stream / 1e9:.4g}"]
            * (f.product_sum_stream > 0)
        ),
        *([f"turned_stream_GBps = {f.turned_stream / 1e9:.4g}"] * (f.turned_stream > 0)),
        *([f"tile_folded_us = {f.tile_folded * 1e6:.3g}"] * (f.tile_folded > 0)),
        *([f"tile_turned_us = {f.tile_turned * 1e6:.3g}"] * (f.tile_turned > 0)),
        *([f"filled_inside_MiB = {f.filled_inside / 2**20:.4g}"] * (f.filled_inside > 0)),
        f"unit = {f.unit}",
        f"vmem_MiB = {f.vmem / 2**20:.4g}",
        *([f"handed_on = {f.handed_on:.3g}"] * (f.handed_on > 0)),
        *([f"quotients_kept = {f.quotients_kept}"] * (f.quotients_kept > 0)),
        *([f"gather_inside_us = {f.gather_inside * 1e6:.3g}"] * (f.gather_inside > 0)),
        f"conv_efficiency = {f.conv_efficiency:.3g}",
        "",
        "[chip.fitted.efficiency]",
        *(f"{dtype} = {share:.3g}" for dtype, share in f.efficiency.items()),
    ]
    if f.moves:
        lines += ["", "[chip.fitted.moves_ps]"]
        lines += [f"{kind} = {each * ps:.3g}" for kind, each in f.moves.items()]
    said = []
    for line in lines:
        source = SHEET if line.startswith(("unit", "vmem")) else "[fit]"
        if line.startswith(_GIVEN):
            source = "[fit] FIXED of tests/accuracy/fit_compute.py"
        said.append(f"{line}  # {source}" if "=" in line else line)
    return "\n".join([f"# {worth}", "[chip.fitted]", *said]) + "\n\n"


def write_cluster(name: str, f: Fitted, worth: str) -> None:
    """Put the tables into the chip's cluster file, before its network, and say whence they are."""
    path = CATALOGUE / f"tpu-{name}.toml"
    text = path.read_text()
    text = re.sub(r"(# .*\n)\[chip\.fitted\]\n(?:.*\n)*?(?=\[\[network\]\])", "", text)
    text = re.sub(r"#   \[fit\] (?:.*\n)(?:#    .*\n)*", "", text)
    text = text.replace("[[network]]", table(f, worth) + "[[network]]", 1)
    jax, libtpu = (importlib.metadata.version(p) for p in ("jax", "libtpu"))
    head = (
        f"#   [fit]     `make fit`, {datetime.date.today()}: from XLA:TPU's `estimated_cycles`,\n"
        f"#             tests/data/tpu_cycles.csv; jax {jax}, libtpu {libtpu}\n"
    )
    path.write_text(text.replace('\nname = "', f'{head}\nname = "', 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chips", default="v5e,v5p,v6e")
    parser.add_argument("--compile", action="store_true", help="compile what the table lacks")
    parser.add_argument("--look", action="store_true", help="leave the cluster files alone")
    parser.add_argument("--worst", type=int, default=0, help="cases to print")
    args = parser.parse_args()
    rows = read_table() if TABLE.exists() else {}
    for name in args.chips.split(","):
        if args.compile:
            compile_missing(rows, name)
        whole = cluster(SPECS[name])
        clock = float(whole.compiler["clock_rate_ghz"]) * 1e9
        known = {c: cycles(c, found[name]) for c, found in rows.items() if found.get(name)}
        learnt = fit(
            whole.chip, clock, {c: n for c, n in known.items() if not c.held_out}, FIXED[name]
        )
        print(name, asdict(learnt))
        found = errors(replace(whole.chip, fitted=learnt), clock, known)
        print(summary(found))
        if not args.look:
            write_cluster(name, learnt, worth(found))
        for c in sorted(found, key=lambda c: -abs(found[c]))[: args.worst]:
            print(f"  {found[c]:+.0%} {known[c]} {c} {rows[c][name]}")


if __name__ == "__main__":
    main()
