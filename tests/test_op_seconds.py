"""Seconds by which a function is cut into parts are those that a search would price."""

import pytest
import zoo

from autoshard.trace import trace
from cost_models.cluster import cluster
from passes.answer import read_back
from passes.attention import NONE
from passes.compiler import quotients_kept, tanh_bytes
from passes.decisions import decide
from passes.fusion import fuse
from passes.ir.mesh import Mesh
from passes.liveness import liveness
from passes.op_seconds import op_seconds
from passes.price import price


@pytest.mark.parametrize("where", ["tpu-v6e:4x4", "h100:8"])
@pytest.mark.parametrize("scan", [False, True])
def test_they_are_those_of_a_search_on_one_device(where: str, scan: bool) -> None:
    fn, args = zoo.gpt(width=64, layers=2, heads=2, sequence=32, batch=8, vocab=64, scan=scan)
    graph, hardware, one = trace(fn, *args).graph, cluster(where), Mesh(("model",), (1,))
    kept, tanh = quotients_kept(hardware), tanh_bytes(hardware)
    fusion = fuse(graph, hardware.platform, NONE, kept, tanh)
    live, decisions = liveness(graph, fusion.stored), decide(graph, ())
    priced = price(graph, one, hardware, decisions, live, fusion, None, ())
    answer = read_back(priced, [0] * len(priced.problem.nodes))
    assert op_seconds(graph, hardware) == answer.seconds
    assert sum(answer.seconds) > 0
