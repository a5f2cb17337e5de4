"""What a form of a pipeline costs depends on nothing that was priced before it."""

import itertools

import zoo

from autoshard.pipeline_costs import Form, Pipeline, PipelineCosts
from cost_models.cluster import cluster
from passes.ir.mesh import Mesh

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


def costs() -> PipelineCosts:
    fn, args = zoo.gpt(width=64, layers=4, heads=2, sequence=32, batch=64, vocab=64, scan=True)
    hardware = cluster("h100:8")
    return PipelineCosts(fn, args, {}, {}, hardware, hardware.memory_limit)


def known(p: Pipeline) -> tuple[object, ...]:
    each = [(x.seconds, x.lying, x.working, x.updating, x.activation, x.sent) for x in p.prices]
    return p.step_time, p.memory, each


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
