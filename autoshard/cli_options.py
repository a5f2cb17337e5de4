"""Which options do commands take?  Those of several commands, and those of `autoshard schedule`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[
    str, typer.Argument(help="file.py:name or package.module:name", metavar="TARGET")
]
OnCluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="such as tpu-v5e:4x4, h100:2x8, cpu:8; else the devices here",
        metavar="CLUSTER",
    ),
]
OnMesh = Annotated[
    str | None, typer.Option("--mesh", help="fix the mesh: data=4,model=4", metavar="AXES")
]
Hints = Annotated[
    list[str] | None,
    typer.Option("--hint", help="'params/**/wq=None,model'; may be repeated", metavar="GLOB=SPEC"),
]
Solver = Annotated[
    str,
    typer.Option("--solver", help="ilp, propagate, dp, fsdp, tp or fsdp+tp", metavar="SOLVER"),
]
Limit = Annotated[
    str | None,
    typer.Option("--memory-limit", help="of each device, such as 12GiB", metavar="BYTES"),
]
Donate = Annotated[
    list[int] | None,
    typer.Option(
        "--donate",
        help="number of an argument whose memory the results may take; may be repeated",
        metavar="NUMBER",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="show the whole traceback of an error")]

# autoshard schedule

Stages = Annotated[
    int, typer.Option("--stages", help="devices, each with a stage of the model", metavar="NUMBER")
]
Microbatches = Annotated[int, typer.Option("--microbatches", help="of one step", metavar="NUMBER")]
Forward = Annotated[
    float,
    typer.Option("--forward", help="of a microbatch on a stage, in any unit", metavar="TIME"),
]
Backward = Annotated[
    float, typer.Option("--backward", help="for the gradients of its inputs", metavar="TIME")
]
Weight = Annotated[
    float, typer.Option("--weight", help="for the gradients of its weights", metavar="TIME")
]
Comm = Annotated[
    float, typer.Option("--comm", help="to send from a device to the next", metavar="TIME")
]
Chunks = Annotated[
    int, typer.Option("--chunks", help="pieces per device, interleaved", metavar="NUMBER")
]
Kept = Annotated[
    float,
    typer.Option("--kept", help="the part of activations that --weight needs", metavar="NUMBER"),
]
InMicrobatches = Annotated[
    str | None,
    typer.Option(
        "--microbatches",
        help="cut the batch, one part after the other: how many, or auto",
        metavar="NUMBER",
    ),
]
Blockwise = Annotated[
    str | None,
    typer.Option(
        "--blockwise",
        help="cut huge values, such as attention's scores, into so many blocks, or auto",
        metavar="NUMBER",
    ),
]
TimeAxes = Annotated[
    list[str] | None,
    typer.Option(
        "--time-axis",
        help="an axis over the steps of a loop, micro=8 or micro=auto; may be repeated",
        metavar="NAME=NUMBER",
    ),
]
Remat = Annotated[
    str | None,
    typer.Option(
        "--remat",
        help="what the backward half computes again, by layers: none, full, or auto",
        metavar="WHAT",
    ),
]
InStages = Annotated[
    str | None,
    typer.Option(
        "--stages", help="cut into stages of a pipeline: how many, or auto", metavar="NUMBER"
    ),
]
OfSchedule = Annotated[
    str | None,
    typer.Option("--schedule", help="of the pipeline, such as 1f1b or zb-v", metavar="NAME"),
]
OfChunks = Annotated[
    int | None,
    typer.Option("--chunks", help="pieces of the model per stage", metavar="NUMBER"),
]
Transfer = Annotated[
    float | None,
    typer.Option(
        "--transfer",
        help="of a stage's activations to the host, one way; half of F, B and W if not given",
        metavar="TIME",
    ),
]
ActivationLimit = Annotated[
    float | None,
    typer.Option(
        "--memory-limit",
        help="of each device, in activations of one microbatch of one stage",
        metavar="NUMBER",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="this schedule, such as zb-h1; may be repeated", metavar="NAME"),
]
Picture = Annotated[
    Path | None, typer.Option("--picture", help="draw it: a .svg or .png file", metavar="OUT")
]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", help="write it for ui.perfetto.dev, a .json file", metavar="OUT"),
]


def as_number(text: str | None) -> int | str | None:
    """A number where it is one."""
    return int(text) if text is not None and text.lstrip("-").isdigit() else text
