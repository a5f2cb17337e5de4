"""What does a choice cost?  Counted again, exactly: `cost_of(priced, choice) -> Cost`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from passes.answer import Answer, read_back
from passes.held import peak_memory
from passes.ir.plan import Cost
from passes.priced import Priced
from passes.reshard import reshard_seconds, reshard_sent, waited_seconds
from passes.strategies import parts


def cost_of(priced: Priced, choice: Sequence[int]) -> Cost:
    """The predicted cost of a choice."""
    return cost_of_answer(priced, read_back(priced, choice))


def cost_of_answer(priced: Priced, answer: Answer) -> Cost:
    """The same, of a choice that has been read back."""
    graph, sizes = priced.graph, priced.mesh.sizes
    comm = exposed = sent = 0.0
    for c in answer.changes:
        comm += reshard_seconds(c.moves, c.nbytes, priced.links) * c.trips
        exposed += waited_seconds(c.moves, c.nbytes, priced.links, c.waited) * c.trips
        sent += reshard_sent(c.moves, c.nbytes, sizes) * c.trips
    compute = sum(answer.seconds)
    flops = sum(
        graph.ops[o].rule.flops
        / parts(answer.strategies[o], sizes)
        * graph.trips(graph.ops[o].region)
        * times
        for o, times in Counter(priced.like).items()
        if graph.ops[o].rule.flops
    )
    return Cost(
        step_time=compute + exposed,
        compute_time=compute,
        comm_time=comm,
        peak_memory=peak_memory(priced, answer.values, answer.changes),
        comm_bytes=sent,
        flops=flops,
    )
