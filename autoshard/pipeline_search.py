"""Which pipeline is the fastest?  Stages x chunks x groups x mesh x microbatches x schedule.

`search_pipelines` prices forms (`autoshard.pipeline_costs`), the most promising one first. What a
form promises is

  c B / N (1 + bubble)

for a batch of B samples on N devices, where c is device-seconds per sample. c is that of the most
similar form that has been priced, a little less. Before anything is known, a device is taken to
work at half of its best rate. The search ends when no promise is below the best step found, or
after so many forms, or pieces of them; the plan says which.

The bubble is that of even stages: (p - 1) / (v m) for 1F1B of p stages in v chunks (Narayanan et
al., arXiv 2104.04473, section 2.2), a third of it for ZB-H1 (Qi et al., arXiv 2401.10241), none for
ZB-V.

What does not fit in memory rules out forms of the same schedule that need more: with as many
devices in a group, no more stages, and no smaller microbatches. On GPUs a group stays within the
devices that the fastest links join, as experts keep it (Narayanan et al., section 5.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autoshard.pipeline_costs import Form, Pipeline, PipelineCosts
from cost_models.cluster import Cluster
from cost_models.roofline import peak_flops
from cost_models.units import format_bytes, format_seconds
from passes.ir.mesh import Mesh
from passes.microbatch_loop import NoTimeLoop
from passes.pipeline.published import chunks_of, published
from passes.pipeline.schedule import ScheduleError
from passes.search import NoFeasiblePlan, Progress
from passes.stages import NoStages

MOST = 16  # forms that are priced
_PIECES, _FORMS = 320, 6  # pieces that are cut in all: so many, or of so many forms like the first
_CHUNKS = (2, 3, 4)
_SMALL = 160  # tasks of F up to which a schedule is searched for, too
_DOUBT = 0.15  # for each form with W apart that did not fit: they hold more activations
_BETTER = 0.97  # of what is known: how much better a form that is not known may be
Refusal = NoFeasiblePlan | ScheduleError | NoStages | NoTimeLoop


class Size(NamedTuple):
    """What efficiency depends on: devices of a group, samples of a microbatch, W apart or not."""

    devices: int
    samples: float
    apart: bool


@dataclass(frozen=True)
class Wanted:
    """What is asked for; None where the search decides.

    mesh: of a group, with its axes' names. samples: of the batch. layers: most pieces that the
    model can be cut into. flops: of a step. state: bytes of arguments that lie on devices; read: of
    those that tasks read, which each group has as a whole. found: ends a sentence about the batch,
    where it was found and not given.
    """

    devices: int
    samples: int
    layers: int
    flops: float
    state: float
    read: float
    stages: int | None = None
    groups: int | None = None
    mesh: Mesh | None = None
    microbatches: int | None = None
    schedule: str | None = None
    chunks: int | None = None
    axes: tuple[str, ...] = ("model",)
    found: str = ""


@dataclass(frozen=True)
class Searched:
    """The best pipeline; all that were priced, the best first; and why others were not."""

    best: Pipeline
    others: tuple[Pipeline, ...]
    refused: tuple[tuple[Form, str, str], ...]
    left: int


def search_pipelines(
    costs: PipelineCosts, wanted: Wanted, progress: Progress | None = None, most: int = MOST
) -> Searched:
    """The fastest pipeline that fits. Raises what refused the most promising form if none does."""
    tell = progress or (lambda _: None)
    left = list(candidates(wanted, costs))
    known: dict[Size, float] = {}
    found: list[Pipeline] = []
    refused: list[tuple[Form, str, Refusal]] = []
    start, doubt, pieces, room = _best_rate(costs, wanted), 0, 0, 0
    for _ in range(most):
        promises = [
            (promise(wanted, f, n, known, start) * (1 + _DOUBT * doubt * f.apart), k)
            for k, (f, n) in enumerate(left)
        ]
        expected, k = min(promises, default=(math.inf, 0))
        if expected >= min((p.step_time for p in found), default=math.inf):
            left = []
            break
        room = room or max(_PIECES, _FORMS * left[k][0].pieces)
        if found and pieces + left[k][0].pieces > room:
            break
        form, name = left.pop(k)
        pieces += form.pieces
        tell(f"{form}, {name}")
        try:
            pipeline = costs.of(form, name)
        except (NoFeasiblePlan, ScheduleError, NoStages, NoTimeLoop) as error:
            refused.append((form, name, error))
            if isinstance(error, NoFeasiblePlan):
                doubt += form.apart
                left = [(f, n) for f, n in left if not _needs_more(wanted, (f, n), (form, name))]
            continue
        found.append(pipeline)
        known[_size(wanted, form)] = _device_seconds(wanted, pipeline)
        tell(f"{form}, {name}: {format_seconds(pipeline.step_time)}")
    if not found:
        raise _nothing(wanted, costs, refused)
    found.sort(key=lambda p: p.step_time)
    told = tuple((form, name, str(error)) for form, name, error in refused)
    return Searched(found[0], tuple(found[1:]), told, len(left))


def candidates(wanted: Wanted, costs: PipelineCosts) -> Iterator[tuple[Form, str]]:
    """Forms and schedules that could fit."""
    limit, most = costs.limit, _largest_group(costs.cluster)
    for stages in _choices(wanted.stages, wanted.devices):
        if wanted.devices % stages:
            continue
        rest = wanted.devices // stages
        for mesh in _meshes(wanted, rest, most):
            groups = rest // mesh.devices
            least = _least(wanted, groups, costs.shared_update) / (stages * mesh.devices)
            if wanted.groups not in (None, groups) or least > limit:
                continue
            for m in _microbatches(wanted, groups, stages):
                for name, chunks in _schedules(wanted, stages, m):
                    if stages * chunks <= wanted.layers:
                        apart = published(name).apart
                        yield Form(stages, groups, mesh, m, chunks, apart), name


def _least(wanted: Wanted, groups: int, shared: bool | None) -> float:
    """Bytes of arguments that all devices of a group have at least."""
    if shared is False:
        return wanted.state
    return wanted.read + (wanted.state - wanted.read) / groups


def _choices(wish: int | None, devices: int) -> list[int]:
    return [wish] if wish else [n for n in range(1, devices + 1) if devices % n == 0]


def _meshes(wanted: Wanted, devices: int, most: int) -> Iterator[Mesh]:
    """Meshes of a group: one axis, and every number of devices."""
    if wanted.mesh is not None:
        if devices % wanted.mesh.devices == 0:
            yield wanted.mesh
        return
    ones = (1,) * (len(wanted.axes) - 1)
    for n in range(1, min(devices, most) + 1):
        if devices % n == 0:
            yield Mesh(wanted.axes, (*ones, n))


def _microbatches(wanted: Wanted, groups: int, stages: int) -> list[int]:
    if wanted.samples % groups:
        return []
    each = wanted.samples // groups
    if wanted.microbatches is not None:
        return [wanted.microbatches] if each % wanted.microbatches == 0 else []
    return [each // b for b in (1, 2, 4, 8, 16) if each % b == 0 and each // b >= min(stages, each)]


def _schedules(wanted: Wanted, stages: int, microbatches: int) -> Iterator[tuple[str, int]]:
    """Names of schedules with their chunks."""
    if wanted.schedule is not None:
        fixed = chunks_of(published(wanted.schedule))
        yield wanted.schedule, fixed or wanted.chunks or 2
        return
    chunks = [wanted.chunks] if wanted.chunks else [1, *_CHUNKS]
    if 1 in chunks:
        yield "1F1B", 1
        if stages > 1:
            yield "ZB-H1", 1
    if stages > 1 and 2 in chunks:
        yield "ZB-V", 2
    for v in chunks:
        if v > 1 and stages > 1 and microbatches % stages == 0:
            yield "interleaved 1F1B", v
    if stages > 1 and 1 in chunks and stages * microbatches <= _SMALL:
        yield "auto", 1


def promise(
    wanted: Wanted, form: Form, name: str, known: Mapping[Size, float], start: float
) -> float:
    """Seconds of a step that a form is expected not to stay below. start: of c, none known."""
    ideal = _expected(_size(wanted, form), known, start) * wanted.samples / wanted.devices
    return ideal * (1 + _bubble(form, name))


def _expected(size: Size, known: Mapping[Size, float], start: float) -> float:
    """Device-seconds per sample."""
    if size in known:
        return known[size]
    if not known:
        return start * (1 + size.apart)  # the simplest first

    def far(other: Size) -> tuple[float, ...]:
        devices = abs(math.log2(size.devices / other.devices))
        samples = abs(math.log2(size.samples / other.samples))
        return devices + samples + (size.apart != other.apart), devices, samples, other.devices

    return known[min(known, key=far)] * _BETTER


def _needs_more(wanted: Wanted, other: tuple[Form, str], refused: tuple[Form, str]) -> bool:
    """Whether a form needs no less memory than one that did not fit.

    Where the gradients of weights are tasks of their own, whatever the schedule.
    """
    (form, name), (large, same) = other, refused
    own, its = _size(wanted, form), _size(wanted, large)
    alike = name == same or (form.apart and large.apart)
    more = form.stages <= large.stages and own.samples >= its.samples
    return alike and more and own.devices == its.devices


def _bubble(form: Form, name: str) -> float:
    """Idle time over work."""
    full = (form.stages - 1) / (form.microbatches * form.chunks)
    shares = {"ZB-H1": 1 / 3, "ZB-V": 0.0, "auto": 0.0, "ZB-H2": 0.0}
    return full * shares.get(name, 1.0)


def _size(wanted: Wanted, form: Form) -> Size:
    return Size(form.mesh.devices, wanted.samples / form.steps, form.apart)


def _device_seconds(wanted: Wanted, pipeline: Pipeline) -> float:
    """Seconds of one device per sample."""
    work = sum(sum(p.seconds.values()) for p in pipeline.prices)
    size = _size(wanted, pipeline.form)
    return work * size.devices / size.samples


def _best_rate(costs: PipelineCosts, wanted: Wanted) -> float:
    """Device-seconds per sample at half of the chip's rate."""
    return 2 * wanted.flops / wanted.samples / peak_flops(costs.cluster.chip, "bfloat16")


def _largest_group(cluster: Cluster) -> int:
    """Most devices of a group: on GPUs those that the fastest links join."""
    if cluster.platform != "gpu":
        return 64
    return math.prod(cluster.extents[-1]) if cluster.extents[-1] else 64


def _nothing(
    wanted: Wanted, costs: PipelineCosts, refused: Sequence[tuple[Form, str, Refusal]]
) -> Exception:
    """Why there is no pipeline, and what would be the nearest."""
    if not refused:
        return _why_none(wanted, costs.limit)
    if costs.least is None:
        return refused[0][2]
    needed, what = costs.least
    return NoFeasiblePlan(
        f"no pipeline of {len(refused)} that were priced fits in {format_bytes(costs.limit)} per "
        f"device; the nearest, {what}, needs {format_bytes(needed)}"
    )


def _why_none(wanted: Wanted, limit: float) -> Exception:
    """What stands in the way, with the nearest that does not."""

    def nearest(wish: int, fits: Callable[[int], bool], most: int) -> int:
        return min((n for n in range(1, most + 1) if fits(n)), key=lambda n: (abs(n - wish), n))

    stages, m = wanted.stages, wanted.microbatches
    if stages and wanted.devices % stages:
        near = nearest(stages, lambda n: wanted.devices % n == 0, wanted.devices)
        return NoStages(
            f"{stages} stages can not share {wanted.devices} devices evenly; {near} can"
        )
    if stages and stages > wanted.layers:
        return NoStages(
            f"{stages} stages are more than the model has layers: it can be cut into "
            f"{wanted.layers} at most"
        )
    too_many = _pieces_refused(wanted)
    if too_many is not None:
        return too_many
    groups = wanted.groups or 1
    if wanted.samples % groups:
        near = nearest(groups, lambda n: wanted.samples % n == 0, wanted.samples)
        return NoTimeLoop(
            f"a batch of {wanted.samples} can not be shared by {groups} data-parallel groups; the "
            f"nearest number that divides it is {near}{wanted.found}"
        )
    each = wanted.samples // groups
    if m and each % m:
        near = nearest(m, lambda n: each % n == 0, each)
        of = f"a batch of {wanted.samples}" + (f" over {groups} groups" if groups > 1 else "")
        return NoTimeLoop(
            f"{of} can not be cut into {m} microbatches; the nearest number that divides it is "
            f"{near}{wanted.found}"
        )
    if stages and m and wanted.chunks and not list(_schedules(wanted, stages, m)):
        near = max(stages, round(m / stages) * stages)
        return ScheduleError(
            f"{wanted.chunks} chunks on {stages} stages take a multiple of {stages} microbatches, "
            f"not {m}; the nearest is {near}"
        )
    least = wanted.state / wanted.devices
    return NoFeasiblePlan(
        f"no pipeline fits in {format_bytes(limit)} per device: state of "
        f"{format_bytes(wanted.state)}, {format_bytes(least)} per device at least, and a batch of "
        f"{wanted.samples} over {wanted.devices} devices"
    )


def _pieces_refused(wanted: Wanted) -> NoStages | None:
    """Where the schedules that are asked for have more pieces than the model can be cut into."""
    stages = wanted.stages
    if not stages:
        return None
    # No schedule is left out for as many microbatches as there are stages.
    least = {
        n: min((chunks for _, chunks in _schedules(wanted, n, n)), default=1)
        for n in range(1, stages + 1)
    }
    if stages * least[stages] <= wanted.layers:
        return None
    what = wanted.schedule or f"{wanted.chunks} chunks"
    fits = [
        n for n in range(2, stages) if n * least[n] <= wanted.layers and wanted.devices % n == 0
    ]
    near = f"; {max(fits)} stages can" if fits else ""
    return NoStages(
        f"{what} on {stages} stages is {stages * least[stages]} pieces, more than the model has "
        f"layers: it can be cut into {wanted.layers} at most{near}"
    )
