"""How near are predictions to what others have published?  Every row, and how far it is off.

    make tables                              most of them, some minutes
    make tables ARGS="megatron alpa"         some of them
    make tables ARGS="own"                   what the planner would do itself, some minutes more
    make tables ARGS="--data FOLDER"         the same tables with other rows
    make tables ARGS="--write docs/published_tables.md"

Each row is a program in plain jax, a cluster of the catalogue, and the published plan as mesh,
hints and annotations (`published_gpt`). What is compared is the step time of its plan.

Megatron's are pipelines, of one stage where there is none: `plan` cuts the step into stages and
microbatches, and gradients are summed over replicas once. FSDP gathers and scatters in every
microbatch: a step of n is a whole step with one of them, and n - 1 times what one microbatch takes
alone, gradients that are added to the ones before.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isnan, nan
from pathlib import Path
from statistics import mean
from typing import Any

import published_gpt as programs
from published_gpt import Gpt, Job
from scipy.stats import spearmanr

import autoshard
from autoshard.columns import columns

MARK = "<!-- written by make tables -->"
DATA = Path(__file__).parents[1] / "data" / "published"
NO_LIMIT = "1TiB"  # what is compared is time: a program that others ran fits
A100_MEMORY = "80GB"  # all of it: Megatron leaves none to a library's own share


@dataclass(frozen=True, slots=True)
class Row:
    """What was published of one run, and what is predicted for it; both in the table's unit."""

    name: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """0.1 where 10 % too much is predicted."""
        return self.predicted / self.published - 1

    @property
    def note(self) -> str:
        """What else there is to say."""
        return ""


@dataclass(frozen=True, slots=True)
class MemoryRow(Row):
    """The same with GiB of one device at the fullest moment. Who ran out of memory has no time."""

    published_peak: float = nan
    predicted_peak: float = nan
    limit: float = nan

    @property
    def ran(self) -> bool:
        """Whether it fitted, as published."""
        return not isnan(self.published)

    @property
    def fits(self) -> bool:
        """Whether it should, by the prediction."""
        return self.predicted_peak <= self.limit

    @property
    def note(self) -> str:
        """GiB, and the verdict."""
        was = f"{self.published_peak:.1f}" if self.ran else "out of memory"
        return f"{was:>13} {self.predicted_peak:.1f} {'fits' if self.fits else 'does not fit'}"


@dataclass(frozen=True, slots=True)
class PeakRow(Row):
    """The same with GiB predicted of one device at the fullest moment."""

    peak: float = nan

    @property
    def note(self) -> str:
        """GiB."""
        return f"{self.peak:.1f} GiB"


@dataclass(frozen=True, slots=True)
class OwnRow(PeakRow):
    """What is predicted for a published plan, and for another, and which one that is."""

    form: str = ""

    @property
    def note(self) -> str:
        """GiB and form."""
        return f"{self.peak:.1f} GiB, {self.form}"


def read(data: Path, name: str) -> list[dict[str, str]]:
    """The rows of a table; none where there is no such file."""
    file = data / f"{name}.csv"
    if not file.exists():
        return []
    lines = [x for x in file.read_text().splitlines() if not x.startswith("#")]
    return list(csv.DictReader(lines))


# Predictions


def cost_of(
    job: Job, cluster: str, data: int, model: int, donated: tuple[int, ...] = (), **options: Any
) -> Any:
    """What the published plan of a program is predicted to cost."""
    fn, args, hints = job
    mesh = {"data": data, "model": model}
    options.setdefault("memory_limit", NO_LIMIT)
    plan = autoshard.plan(
        fn, *args, cluster=cluster, mesh=mesh, hints=hints, donate_argnums=donated, **options
    )
    return plan.cost


@dataclass(frozen=True, slots=True)
class Run:
    """Training by FSDP: count microbatches of `batch` sequences on each of so many devices.

    chip: name in the catalogue.
    """

    model: Gpt
    chip: str
    devices: int
    batch: int
    count: int

    def step_seconds(self) -> float:
        """Of a whole step."""
        seconds = self._seconds(programs.train_step, 0)
        if self.count > 1:
            seconds += (self.count - 1) * self._seconds(programs.micro_step, 1)
        return seconds

    def _seconds(self, make: Callable[[Gpt, int], Job], donated: int) -> float:
        job, where = make(self.model, self.batch * self.devices), nodes(self.chip, self.devices)
        found = cost_of(job, where, self.devices, 1, (donated,), fused_attention=True)
        return float(found.step_time)


def nodes(chip: str, devices: int) -> str:
    """So many devices, eight on a node."""
    return f"{chip}:{max(1, devices // 8)}x{min(8, devices)}"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Training as Megatron ran it: stages, chunks of a stage, data parallel groups, and devices of
    a group; microbatches of `batch` sequences. 1F1B where a stage is one chunk, else interleaved.
    """

    model: Gpt
    stages: int
    chunks: int
    groups: int
    parts: int
    samples: int
    batch: int

    @property
    def devices(self) -> int:
        """All of them."""
        return self.stages * self.groups * self.parts

    def planned(self) -> autoshard.Plan:
        """The published plan. Each group held the whole optimizer state of its stage."""
        return self._plan(
            self.model,
            shared_update=False,
            stages=self.stages,
            mesh={"stage": self.stages, "data": self.groups, "model": self.parts},
            microbatches=self.samples // (self.groups * self.batch),
            schedule="interleaved 1F1B" if self.chunks > 1 else "1F1B",
            chunks=self.chunks,
        )

    def own_choice(self) -> autoshard.Plan:
        """What the planner does where nothing is told: the program has no annotations."""
        return self._plan(replace(self.model, plan="free"), stages="auto", hints={})

    def _plan(self, model: Gpt, **options: Any) -> autoshard.Plan:
        fn, args, hints = programs.train_step(model, self.samples)
        options = {"hints": hints, "memory_limit": A100_MEMORY} | options
        where = nodes("a100", self.devices)
        return autoshard.plan(fn, *args, cluster=where, donate_argnums=(0,), **options)


def pipeline(row: dict[str, str], **training: Any) -> Pipeline:
    """What a row of Megatron's tables tells."""
    names = ("layers", "hidden", "heads", "seq_len", "vocab")
    model = Gpt(*(int(row[n]) for n in names), dropout=0.1, **training)
    stages, parts, devices = int(row["PP"]), int(row["TP"]), int(row["gpus"])
    batch = int(row.get("micro_batch(from_script)") or row["micro_batch"])
    chunks = int(row.get("interleave_chunks_derived") or row["interleave_m"])
    groups = devices // (stages * parts)
    return Pipeline(model, stages, chunks, groups, parts, int(row["global_batch"]), batch)


# Korthikanti et al., arXiv 2205.05198, table 4: one layer of the 22B model on 8 A100 80GB


KORTHIKANTI = Gpt(48, 6144, 64, 2048, 51200, dropout=0.1)
LAYERS: dict[str, dict[str, Any]] = {
    "baseline no recompute (TP8)": {},
    "sequence parallelism": {"plan": "megatron+sp"},
    "full recompute": {"recompute": "full"},
    "selective recompute": {"recompute": "selective"},
    "selective + sequence": {"recompute": "selective", "plan": "megatron+sp"},
}


def layer_rows(data: Path = DATA) -> Iterator[Row]:
    """Forward and backward of a layer, in ms."""
    for row in read(data, "korthikanti_table4_layer_time_22B"):
        model = replace(KORTHIKANTI, **LAYERS[row["experiment"]])
        forward, both = (
            cost_of(make(model, 4), "a100:1x8", 1, 8).step_time * 1e3
            for make in (programs.layer_forward, programs.layer_both)
        )
        yield Row(f"{row['experiment']}: forward", float(row["forward_ms"]), forward)
        yield Row(f"{row['experiment']}: backward", float(row["backward_ms"]), both - forward)
        yield Row(f"{row['experiment']}: both", float(row["combined_ms"]), both)


def iteration_rows(data: Path = DATA, only: Sequence[str] = ()) -> Iterator[Row]:
    """Table 5's iterations, in s. only: of these models."""
    ways = {
        "iter_s_full_recompute": {"recompute": "full"},
        "iter_s_seqpar+selective": {"recompute": "selective", "plan": "megatron+sp"},
    }
    for row in read(data, "korthikanti_table5_iter_time"):
        for column, way in ways.items():
            if not only or row["model"] in only:
                cost = pipeline(row, **way).planned().cost
                name = f"{row['model']} {column.removeprefix('iter_s_')}"
                yield PeakRow(name, float(row[column]), cost.step_time, cost.peak_memory / 2**30)


# Narayanan et al., arXiv 2104.04473, table 1: A100 80GB, nodes of 8 with 8 HDR InfiniBand cards


def megatron_rows(data: Path = DATA, only: Sequence[str] = ()) -> Iterator[PeakRow]:
    """TFLOP/s of each GPU, all activations computed again. only: of these models."""
    for row in read(data, "megatron_table1"):
        if not only or row["script_case"] in only:
            run = pipeline(row, recompute="full")
            cost = run.planned().cost
            flops = 1e3 * float(row["FLOPs_per_iter_PFLOP_derived(eq_96BslhhX)"])
            published = float(row["achieved_TFLOPs_per_gpu"])
            found = flops / run.devices / cost.step_time
            yield PeakRow(row["script_case"], published, found, cost.peak_memory / 2**30)


def own_rows(data: Path = DATA, only: Sequence[str] = ()) -> Iterator[OwnRow]:
    """Seconds predicted for what was published, and for what the planner does by itself."""
    for row in read(data, "megatron_table1"):
        if not only or row["script_case"] in only:
            run = pipeline(row, recompute="full")
            own = run.own_choice()
            times = run.planned().cost.step_time, own.cost.step_time
            peak = own.cost.peak_memory / 2**30
            yield OwnRow(row["script_case"], *times, peak, form_of(own))


def form_of(plan: autoshard.Plan) -> str:
    """The form of a pipeline, in short, or of a plan without stages."""
    data: Any = plan.data
    mesh = " ".join(f"{n}={s}" for n, s in plan.mesh.items())
    if not hasattr(data, "table"):
        return f"{mesh}, no stages"
    chunks = f", {data.chunks} chunks" if data.chunks > 1 else ""
    return f"{mesh}, {data.microbatches} x {data.table.name}{chunks}"


# MosaicML's llm-foundry: FSDP on A100 40GB, nodes of 8 with 1600 Gb/s; its attention and its cross
# entropy (`loss_fn: fused_crossentropy`, the default of MPT) were fused kernels


# Layers, width and heads of MPT; NumParams of each row holds them to account.
MPT = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}


CHIPS = {"a100_40gb": "a100-40gb", "a100_80gb": "a100", "h100_80gb": "h100"}


def fsdp_rows(data: Path = DATA) -> Iterator[Row]:
    """Steps, in s, from tokens per second."""
    for row in read(data, "mosaicml_fsdp_sweep_a100_40gb"):
        run = fsdp_run(row)
        tokens = run.batch * run.count * run.model.sequence
        name = (
            f"{row['Model']} {run.model.sequence} x {run.batch} x {run.count}, {run.devices} GPUs"
        )
        yield Row(name, tokens / float(row["Throughput_(T/s/GPU)"]), run.step_seconds())


def fsdp_run(row: dict[str, str]) -> Run:
    """The run that a row of the sweep tells of."""
    recompute = "full" if row["Activation_Checkpointing"] == "True" else "none"
    sequence = int(row["SeqLen_(T)"])
    model = Gpt(
        *MPT[row["Model"]],
        sequence,
        50368,
        dtype="bfloat16",
        recompute=recompute,
        plan="fsdp",
        copied=False,
        fused_loss=True,
    )
    batch, count = int(row["MicroBatchSize"]), int(row["GradAccum"])
    chip = CHIPS[row["GPU"]]
    return Run(model, chip, int(row["#_GPUs"]), batch, count)


# Alpa (arXiv 2201.12023), figure 9: one AWS p3.16xlarge, 8 V100 16GB


# What its methods do on a mesh of data x model devices: reduce-scatter and all-gather in place of
# all-reduce (its prefer_reduce_scatter) is ZeRO-2.
# `heuristic` splits every parameter along its longest dim and leaves the rest to the search.
METHODS = {
    "alpa.auto_sharding": "zero2",
    "alpa.data_parallel": "megatron",
    "alpa.zero_2": "zero2",
    "alpa.zero_3": "fsdp",
    "alpa.heuristic": "longest",
}


def alpa_rows(data: Path = DATA) -> Iterator[MemoryRow]:
    """GPT by intra-operator plans; seconds and GiB."""
    limit = autoshard.cluster("v100:1x8").memory_limit / 2**30
    for row in read(data, "alpa_intra_fig9"):
        shape, mesh = (next(v for k, v in row.items() if k.startswith(c)) for c in ("spec", "logi"))
        if row["model_family"] != "gpt" or row["method"] not in METHODS or not mesh:
            continue
        batch, sequence, width, layers, heads, vocab = map(int, shape.split(";"))
        along, across = map(int, mesh.split("x"))
        plan = METHODS[row["method"]]
        model = Gpt(
            layers, width, heads, sequence, vocab, recompute="full", plan=plan, compiled=True
        )
        cost = _alpa_cost(model, batch, along, across)
        ran = row["mean_latency_s"] != "OOM"
        yield MemoryRow(
            f"{row['method'].removeprefix('alpa.')} {width} {mesh}",
            float(row["mean_latency_s"]) if ran else nan,
            cost.step_time,
            float(row["peak_mem_GB"]) if ran else nan,
            cost.peak_memory / 2**30,
            limit,
        )


@cache
def _alpa_cost(model: Gpt, batch: int, along: int, across: int) -> Any:
    job = programs.train_step(model, batch)
    return cost_of(job, f"v100:1x{along * across}", along, across, (0,))


def rank_correlation(rows: Sequence[Row]) -> float:
    """Spearman's, of the rows with a published time."""
    known = [row for row in rows if not isnan(row.published)]
    published, predicted = ([getattr(r, n) for r in known] for n in ("published", "predicted"))
    return float(spearmanr(published, predicted).statistic)


# Printing


@dataclass(frozen=True, slots=True)
class Table:
    """rows: what makes them. most: the mean error that is asked for, in per cent; 0 for none, where
    it is about the order of rows. published: whether that is what predictions are held against.
    """

    title: str
    unit: str
    rows: Callable[[Path], Iterator[Row]]
    most: float = 0.0
    published: bool = True


TABLES = {
    "layers": Table("Korthikanti, table 4: a layer of 22B", "ms", layer_rows, 10),
    "iterations": Table("Korthikanti, table 5", "s", iteration_rows, 5),
    "megatron": Table("Megatron, table 1: each GPU", "TFLOP/s", megatron_rows, 8),
    "own": Table(
        "Megatron, table 1: the published plans and the planner's own choices, both predicted",
        "s",
        own_rows,
        published=False,
    ),
    "fsdp": Table("MosaicML's FSDP sweep", "s", fsdp_rows, 12),
    "alpa": Table("Alpa, figure 9: GPT; GiB published and predicted", "s", alpa_rows),
}


def shown(table: Table, rows: list[Row]) -> str:
    """A table as text, its mean absolute error last."""
    cells = [("", f"published {table.unit}", f"predicted {table.unit}", "error", "")]
    if not table.published:
        cells = [("", f"published plan {table.unit}", f"own {table.unit}", "longer", "")]
    for row in rows:
        ran = not isnan(row.published)
        numbers = (
            f"{row.published:.3f}" if ran else "",
            f"{row.predicted:.3f}",
            f"{row.error:+.1%}" if ran else "",
        )
        cells.append((row.name, *numbers, row.note))
    lines = [table.title, *columns(cells, "lrrrl", "  ")]
    ran = [row for row in rows if not isnan(row.published)]
    if ran and table.published:
        asked = f", asked for: {table.most:.0f}%" if table.most else ""
        error = mean(abs(row.error) for row in ran)
        lines.append(f"  mean error {error:.1%} of {len(ran)} rows{asked}")
    if ran and table.published and not table.most:
        lines.append(f"  rank correlation {rank_correlation(ran):.2f}, asked for: 0.85")
    return "\n".join(lines)


def main() -> None:
    """Print the tables; with --write, put them into the document too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "tables", nargs="*", default=[n for n in TABLES if n != "own"], help=", ".join(TABLES)
    )
    parser.add_argument("--data", type=Path, default=DATA, help="a folder of tables")
    parser.add_argument("--write", type=Path, help="a document that ends with all tables")
    options = parser.parse_args()
    texts = []
    for name in options.tables:
        texts.append(shown(TABLES[name], list(TABLES[name].rows(options.data))))
        print(texts[-1], end="\n\n", flush=True)
    if options.write is not None:
        before = options.write.read_text().partition(MARK)[0]
        tables = "\n\n".join(texts)
        options.write.write_text(f"{before}{MARK}\n\n```\n{tables}\n```\n")


if __name__ == "__main__":
    sys.exit(main())
