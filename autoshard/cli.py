"""The command `autoshard`: from plan, run and compare to solve and schedule.

Every command is one public call and a print-out. Exit codes: 0 done; 1 no plan fits, or numbers
differ; 2 the command or the user's code was wrong, in one sentence on stderr (`--debug` shows all);
3 a fault of our own. jax is imported only by commands that need it.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from autoshard import atomic_file, cli_options, cli_tables
from autoshard.cli_errors import Failure, failure
from autoshard.cli_options import Debug, Donate, Hints, Limit, OnCluster, OnMesh, Solver, Target
from autoshard.cli_planning import Asked, check_runs, check_writable, pipelines_compared, planned
from autoshard.cli_target import load
from autoshard.progress import progress

P = ParamSpec("P")
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Say how to split a JAX function over many devices, why so, how fast, in how much memory.",
    epilog="TARGET is file.py:name or package.module:name; name() gives back (fn, args).",
)


def main() -> int:
    """The entry point; typer exits by itself."""
    app(prog_name="autoshard")
    return 0


def _command(function: Callable[P, int]) -> Callable[P, None]:
    """A command whose exceptions become a sentence and an exit code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = function(*args, **kwargs)
        except BrokenPipeError:  # `autoshard plan ... | head`
            raise typer.Exit(1) from None
        except Exception as error:
            if kwargs.get("debug"):
                raise
            found = failure(error, str(kwargs.get("target", "")))
            _tell(found)
            raise typer.Exit(found.code) from None
        raise typer.Exit(code)

    return run


def _tell(found: Failure) -> None:
    if found.details:
        print(found.details.rstrip(), file=sys.stderr)
    print(f"autoshard: {found.sentence}", file=sys.stderr)


@app.command("plan")
@_command
def plan_command(
    target: Target,
    cluster: OnCluster = None,
    mesh: OnMesh = None,
    hint: Hints = None,
    solver: Solver = "ilp",
    microbatches: cli_options.InMicrobatches = None,
    blockwise: cli_options.Blockwise = None,
    time_axis: cli_options.TimeAxes = None,
    remat: cli_options.Remat = None,
    stages: cli_options.InStages = None,
    schedule: cli_options.OfSchedule = None,
    chunks: cli_options.OfChunks = None,
    memory_limit: Limit = None,
    donate: Donate = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="write the plan to this file", metavar="FILE")
    ] = None,
    specs: Annotated[
        bool, typer.Option("--specs", help="print PartitionSpecs to paste, nothing else")
    ] = False,
    dump_problem: Annotated[
        Path | None,
        typer.Option(
            "--dump-problem",
            help="write what was solved for its mesh, in the IOPDDL format: .json or .json.gz",
            metavar="FILE",
        ),
    ] = None,
    debug: Debug = False,
) -> int:
    """Find the best plan and print it on one screen."""
    asked = Asked.among(locals())
    check_writable(json, dump_problem)
    found = planned(target, cluster, asked)
    if json is not None:
        atomic_file.write(json, found.to_json())
    if dump_problem is not None:
        from passes.solve import iopddl

        iopddl.write(found.problem, dump_problem)
    if specs:
        from autoshard.spec_text import specs_text

        print(specs_text(dict(found.mesh), found.in_shardings, found.out_shardings))
    else:
        show(str(found))
    return 0


@app.command("run")
@_command
def run_command(
    target: Target,
    cluster: Annotated[
        str, typer.Option("--cluster", help="devices of this machine", metavar="CLUSTER")
    ] = "cpu:8",
    steps: Annotated[
        int, typer.Option("--steps", help="how often to run it", min=1, metavar="NUMBER")
    ] = 1,
    mesh: OnMesh = None,
    hint: Hints = None,
    solver: Solver = "ilp",
    microbatches: cli_options.InMicrobatches = None,
    blockwise: cli_options.Blockwise = None,
    time_axis: cli_options.TimeAxes = None,
    remat: cli_options.Remat = None,
    stages: cli_options.InStages = None,
    schedule: cli_options.OfSchedule = None,
    chunks: cli_options.OfChunks = None,
    memory_limit: Limit = None,
    donate: Donate = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="largest relative difference; else by dtype",
            min=0.0,
            metavar="NUMBER",
        ),
    ] = None,
    debug: Debug = False,
) -> int:
    """Run it sharded beside unsharded, compare all results."""
    asked = Asked.among(locals())
    from autoshard.virtual_devices import prepare

    hardware, options = prepare(cluster), asked.options()
    from autoshard import same_numbers
    from autoshard.api import plan

    fn, args = load(target)
    check_runs(target, fn)
    args = same_numbers.fill(args)
    with progress("planning") as tell:
        found = plan(fn, *args, cluster=hardware, **options, progress=tell)
    show(found.headline() + "\n")
    with progress("running") as tell:
        tell("compiling")
        compared = same_numbers.compare(
            fn, found.compile(), args, found.state, steps, tolerance, tell
        )
    show(cli_tables.run_table(compared, steps, hardware.devices))
    return 0 if compared.ok else 1


@app.command("compare")
@_command
def compare_command(
    target: Target,
    cluster: OnCluster = None,
    mesh: OnMesh = None,
    hint: Hints = None,
    stages: cli_options.InStages = None,
    memory_limit: Limit = None,
    donate: Donate = None,
    debug: Debug = False,
) -> int:
    """Show the search beside every baseline; with --stages, beside expert pipelines."""
    asked = Asked.among(locals())
    if asked.stages is not None:
        show(pipelines_compared(target, cluster, asked))
        return 0
    found = planned(target, cluster, asked)
    from passes.search import SOLVERS

    show(cli_tables.comparison(found.data, SOLVERS))
    return 0


@app.command("explain")
@_command
def explain_command(
    target: Target,
    glob: Annotated[
        str, typer.Argument(help="'params/**/wq', or a source line: train.py:14", metavar="GLOB")
    ],
    cluster: OnCluster = None,
    mesh: OnMesh = None,
    hint: Hints = None,
    solver: Solver = "ilp",
    microbatches: cli_options.InMicrobatches = None,
    blockwise: cli_options.Blockwise = None,
    time_axis: cli_options.TimeAxes = None,
    remat: cli_options.Remat = None,
    memory_limit: Limit = None,
    donate: Donate = None,
    debug: Debug = False,
) -> int:
    """Say why a value is split so, and what else costs."""
    asked = Asked.among(locals())
    found = planned(target, cluster, asked)
    with progress("explaining"):
        text = found.explain(glob)
    show(text)
    return 0


@app.command("verify")
@_command
def verify_command(
    target: Target,
    cluster: OnCluster = None,
    mesh: OnMesh = None,
    hint: Hints = None,
    solver: Solver = "ilp",
    microbatches: cli_options.InMicrobatches = None,
    blockwise: cli_options.Blockwise = None,
    time_axis: cli_options.TimeAxes = None,
    remat: cli_options.Remat = None,
    stages: cli_options.InStages = None,
    schedule: cli_options.OfSchedule = None,
    chunks: cli_options.OfChunks = None,
    memory_limit: Limit = None,
    donate: Donate = None,
    top: Annotated[
        int,
        typer.Option("--top", help="compile so many of the best plans", min=1, metavar="NUMBER"),
    ] = 1,
    debug: Debug = False,
) -> int:
    """Compile the plan for its cluster, no hardware needed, compare."""
    asked = Asked.among(locals())
    from autoshard.virtual_devices import prepare_compiler

    hardware = prepare_compiler(cluster)
    found = planned(target, hardware, asked)
    with progress("verifying") as tell:
        verified = found.verify(top=top, progress=tell)
    show(str(verified))
    return 0 if verified.fits else 1


@app.command("audit")
@_command
def audit_command(target: Target, cluster: OnCluster = None, debug: Debug = False) -> int:
    """Compile a function sharded already: what is sent, and why."""
    del debug
    from autoshard.virtual_devices import prepare_compiler

    hardware = prepare_compiler(cluster)
    fn, args = load(target)
    from autoshard.auditing import audit

    with progress("compiling"):
        found = audit(fn, *args, cluster=hardware)
    show(str(found))
    return 0 if found.fits else 1


@app.command("calibrate")
@_command
def calibrate_command(
    out: Annotated[
        Path, typer.Argument(help="the file to write, such as mine.toml", metavar="OUT")
    ],
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices",
            help="so many of those here, virtual ones on a CPU; else all",
            min=2,
            metavar="NUMBER",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="20 seconds, and coarser")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
    debug: Debug = False,
) -> int:
    """Measure the devices here, and write a cluster file to plan with."""
    del debug
    from autoshard.calibration import calibrate, check_file
    from autoshard.virtual_devices import first_devices

    check_file(out, force)
    with progress("measuring") as tell:
        found = calibrate(first_devices(devices), out=out, force=force, quick=quick, progress=tell)
    show(cli_tables.calibrated_text(out, found))
    return 0


@app.command("clusters")
@_command
def clusters_command(
    name: Annotated[
        str | None, typer.Argument(help="one of them, such as h100 or tpu-v5e:4x4", metavar="NAME")
    ] = None,
    debug: Debug = False,
) -> int:
    """List known hardware, or one kind with its sources."""
    del debug
    show(cli_tables.clusters_table() if name is None else cli_tables.cluster_text(name))
    return 0


@app.command("solve")
@_command
def solve_command(
    file: Annotated[
        Path,
        typer.Argument(help="a .json or .json.gz file, in the IOPDDL format", metavar="FILE"),
    ],
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            help="be done after so many seconds, reading included",
            min=0.0,
            metavar="SECONDS",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="write the solution to this file", metavar="OUT")
    ] = None,
    debug: Debug = False,
) -> int:
    """Solve a problem from a file, such as one of plan --dump-problem."""
    del debug
    begin = time.monotonic()
    from autoshard import solved
    from passes.solve import iopddl
    from passes.solve.ilp import solve

    check_writable(json)
    with progress("solving") as tell:
        tell("reading")
        problem = iopddl.read(file)
        reading = time.monotonic() - begin
        left = None if time_limit is None else time_limit - 2 * reading  # counting takes as long
        found = solve(problem, time_limit=left, progress=lambda now: tell(solved.as_progress(now)))
    count = solved.counted(problem, found)
    if json is not None:
        atomic_file.write(json, solved.as_json(found, count))
    show(solved.as_text(problem, found, count))
    return 0


@app.command("schedule")
@_command
def schedule_command(
    stages: cli_options.Stages,
    microbatches: cli_options.Microbatches,
    forward: cli_options.Forward,
    backward: cli_options.Backward,
    weight: cli_options.Weight,
    comm: cli_options.Comm = 0.0,
    chunks: cli_options.Chunks = 2,
    kept: cli_options.Kept = 0.5,
    transfer: cli_options.Transfer = None,
    memory_limit: cli_options.ActivationLimit = None,
    only: cli_options.Only = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="write all schedules to this file", metavar="OUT"),
    ] = None,
    picture: cli_options.Picture = None,
    trace: cli_options.Trace = None,
    debug: Debug = False,
) -> int:
    """Compare pipeline schedules, for stages that take so long."""
    del debug
    from autoshard import cli_schedule
    from passes.pipeline.published import Setting

    check_writable(json, picture, trace)
    cli_schedule.check_files(picture)
    setting = Setting(
        stages, microbatches, forward, backward, weight, comm, kept, chunks, memory_limit, transfer
    )
    with progress("scheduling"):
        found = cli_schedule.compare(setting, only or ())
        cli_schedule.write(found, json, picture, trace)
    show(cli_schedule.table(found))
    cli_schedule.show_timelines(found)
    return 0


def show(text: str) -> None:
    """Print to stdout; on a terminal headings are bold, and what splits a dim has a colour."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        print(text)
        return
    styled = Text(text)
    styled.highlight_regex(r"(?m)^\S.*$", "bold")
    styled.highlight_regex(r"(?<=\d)\{[^{}\n]*\}", "cyan")
    styled.highlight_regex(r"(?<=\[)#+", "green")
    styled.highlight_regex(r"(?<=[\[#])-+(?=[.\]])", "yellow")
    styled.highlight_regex(r"NUMBERS DIFFER.*|TOO LARGE|does not fit.*", "red")
    console.print(styled)
