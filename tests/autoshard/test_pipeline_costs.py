"""What a form of a pipeline costs depends on nothing that was priced before it."""

import itertools

import pytest
import zoo

from autoshard.cut_program import CutProgram
from autoshard.pipeline_costs import Form, Pipeline, PipelineCosts
from autoshard.stage_prices import StagePrice
from cost_models.cluster import cluster
from passes.ir.mesh import Mesh
from passes.search import NoFeasiblePlan

# Of eight devices: each differs from another one in a single thing, besides what that leaves over.
FORMS = [
    Form(stages, 8 // (stages * inside), Mesh(("model",), (inside,)), microbatches, chunks)
    for stages, inside, microbatches, chunks in [
        (2, 1, 4, 1),
        (2, 2, 4, 1),
        (2, 4, 4, 1),
        (2, 2, 8, 1),
        (2, 2, 4, 2),
        (4, 1, 4, 1),
        (4, 2, 4, 1),
    ]
]


def costs(kind: type[PipelineCosts] = PipelineCosts) -> PipelineCosts:
    fn, args = zoo.gpt(width=64, layers=4, heads=2, sequence=32, batch=64, vocab=64, scan=True)
    hardware = cluster("h100:8")
    return kind(fn, args, {}, {}, hardware, hardware.memory_limit)


def known(p: Pipeline) -> tuple[object, ...]:
    each = [(x.seconds, x.lying, x.working, x.updating, x.activation, x.sent) for x in p.prices]
    return p.step_time, p.memory, each


@pytest.mark.slow
def test_prices_do_not_depend_on_their_order() -> None:
    one, other = costs(), costs()
    name = {1: "1F1B", 2: "interleaved 1F1B"}
    forward = {f: known(one.of(f, name[f.chunks])) for f in FORMS}
    backward = {f: known(other.of(f, name[f.chunks])) for f in reversed(FORMS)}
    assert forward == backward
    alone = FORMS[4]
    assert known(costs().of(alone, name[2])) == forward[alone]
    times = [forward[f][0] for f in FORMS]
    assert all(a != b for a, b in itertools.combinations(times, 2))


def test_every_chunk_of_a_device_has_its_weights_and_its_sums_of_gradients() -> None:
    priced = costs()
    found = priced.of(FORMS[4], "interleaved 1F1B")
    for device, memory in enumerate(found.memory):
        own = found.prices[device::2]
        assert memory > sum(p.lying for p in own)
        assert all(p.lying > 4 * p.exchanged.reduced > 0 for p in own)  # weights, two moments, sums


class Demanding(PipelineCosts):
    """One of whose pieces no plan fits in less than all of a device."""

    def prices(self, form: Form, cut: CutProgram, limit: float) -> tuple[StagePrice, ...]:
        if limit < self.limit:
            raise NoFeasiblePlan("too little")
        return super().prices(form, cut, limit)


def test_chunks_do_not_share_out_what_one_task_needs_at_a_time() -> None:
    priced = costs(Demanding)
    assert known(priced.of(FORMS[4], "interleaved 1F1B"))
    priced.limit = 1e6
    with pytest.raises(NoFeasiblePlan, match=r"stage_0|too little"):
        priced.of(FORMS[4], "interleaved 1F1B")
