"""The command `autoshard`: from plan, run and compare to solve and schedule.

Every command is one public call and a print-out. Exit codes: 0 done; 1 no plan fits, or numbers
differ; 2 the command or the user's code was wrong, in one sentence on stderr (`--debug` shows all);
3 a fault of our own. jax is imported only by commands that need it.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from autoshard import atomic_file, cli_options, cli_tables
from autoshard.cli_errors import Failure, failure
from autoshard.cli_options import Debug, Donate, Hints, Limit, OnCluster, OnMesh, Solver, Target
from autoshard.cli_target import TargetError, load
from autoshard.progress import progress

if TYPE_CHECKING:
    from autoshard.api import Plan
    from cost_models.cluster import Cluster

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
    del debug
    for file in (json, dump_problem):
        if file is not None:
            _check_writable(file)
    over_time = cli_options.OverTime(microbatches, blockwise, time_axis)
    staged = cli_options.Staged(stages, schedule, chunks)
    found = _plan(
        target, cluster, mesh, hint, solver, memory_limit, donate, over_time, staged, remat
    )
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
    del debug
    from autoshard.virtual_devices import prepare

    hardware = prepare(cluster)
    over_time = cli_options.OverTime(microbatches, blockwise, time_axis)
    from autoshard import same_numbers
    from autoshard.api import plan

    fn, args = load(target)
    _check_runs(target, fn)
    args = same_numbers.fill(args)
    with progress("planning") as tell:
        found = plan(
            fn,
            *args,
            cluster=hardware,
            mesh=_mesh(mesh),
            hints=_hints(hint),
            donate_argnums=tuple(donate or ()),
            memory_limit=memory_limit,
            solver=solver,
            **over_time.options(),
            remat=remat,
            **cli_options.Staged(stages, schedule, chunks).options(),
            progress=tell,
        )
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
    del debug
    if stages is not None:
        return _compare_pipelines(target, cluster, mesh, hint, stages, memory_limit, donate)
    found = _plan(target, cluster, mesh, hint, "ilp", memory_limit, donate)
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
    del debug
    over_time = cli_options.OverTime(microbatches, blockwise, time_axis)
    found = _plan(target, cluster, mesh, hint, solver, memory_limit, donate, over_time, remat=remat)
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
    del debug
    from autoshard.virtual_devices import prepare_compiler

    hardware = prepare_compiler(cluster)
    over_time = cli_options.OverTime(microbatches, blockwise, time_axis)
    staged = cli_options.Staged(stages, schedule, chunks)
    found = _plan(
        target, hardware, mesh, hint, solver, memory_limit, donate, over_time, staged, remat
    )
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

    if json is not None:
        _check_writable(json)
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

    for file in (json, picture, trace):
        if file is not None:
            _check_writable(file)
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


def _plan(
    target: str,
    cluster: str | Cluster | None,
    mesh: str | None,
    hint: list[str] | None,
    solver: str,
    memory_limit: str | None,
    donate: list[int] | None,
    over_time: cli_options.OverTime = cli_options.AT_ONCE,
    stages: cli_options.Staged = cli_options.UNSTAGED,
    remat: str | None = None,
) -> Plan:
    """Load the target and plan it."""
    from cost_models.cluster import cluster as read_cluster

    # Before the target is loaded: it is quick.
    hardware = read_cluster(cluster) if isinstance(cluster, str) else cluster
    axes, hints, options = _mesh(mesh), _hints(hint), {**over_time.options(), **stages.options()}
    fn, args = load(target)
    from autoshard.api import plan

    with progress("planning") as tell:
        return plan(
            fn,
            *args,
            cluster=hardware,
            mesh=axes,
            hints=hints,
            donate_argnums=tuple(donate or ()),
            memory_limit=memory_limit,
            solver=solver,
            **options,
            remat=remat,
            progress=tell,
        )


def _compare_pipelines(
    target: str,
    cluster: str | None,
    mesh: str | None,
    hint: list[str] | None,
    stages: str,
    memory_limit: str | None,
    donate: list[int] | None,
) -> int:
    """The best pipeline beside those that experts would take."""
    from autoshard.api import plan
    from autoshard.pipeline_comparison import as_text, beside

    fn, args = load(target)
    common: dict[str, Any] = {
        "cluster": cluster,
        "hints": _hints(hint),
        "memory_limit": memory_limit,
    }
    common["donate_argnums"] = tuple(donate or ())
    with progress("planning") as tell:
        asked = cli_options.as_number(stages) or "auto"
        found = plan(fn, *args, **common, mesh=_mesh(mesh), stages=asked, progress=tell)
        rows = beside(found, lambda **other: plan(fn, *args, **common, **other), asked, tell)
    show(as_text(rows))
    return 0


def _check_writable(file: Path) -> None:
    """OSError for a file that can not be written, before planning takes its time."""
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise IsADirectoryError(f"cannot write {file}: it is a folder; give the name of a file")
    if not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {file}: the folder {file.parent} is not writable")


def _check_runs(target: str, fn: Callable[..., Any]) -> None:
    """TargetError for a function that `run` can not call beside its sharded form."""
    from autoshard.api import Parallelized

    static = [k for k in ("static_argnums", "static_argnames") if k in getattr(fn, "options", ())]
    if isinstance(fn, Parallelized) and static:
        raise TargetError(
            f"{target} has static arguments ({static[0]}), which run does not know; give them to "
            "the function beforehand, as functools.partial does"
        )


def _mesh(text: str | None) -> dict[str, int] | None:
    from passes.ir.mesh import Mesh

    return None if text is None else Mesh.parse(text).as_dict()


def _hints(texts: list[str] | None) -> dict[str, Any]:
    from passes.hints import HintError, parse_spec

    out: dict[str, Any] = {}
    for text in texts or ():
        glob, sign, spec = text.partition("=")
        if not sign or not glob:
            raise HintError(
                f"cannot read --hint {text!r}; write GLOB=SPEC: 'params/**/wq=None,model'"
            )
        if glob in out and out[glob] != parse_spec(spec):
            raise HintError(f"--hint {glob!r} is given twice, with different specs; remove one")
        out[glob] = parse_spec(spec)
    return out


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
