"""Which weights of an attention lie in memory because what is made of them is sent?

Weights are a quotient that is made narrower, as bfloat16, for the two products that read it. Where
each of these computes them again, XLA:TPU for v6e still keeps them if an all-to-all sends what one
of the products makes: mixed values in the forward pass, the gradient of values in the backward
pass. They lie beside the scores until the last of the two. So it is with one head on a device, of
64 or 128 elements, and a result whose places come last (as `einsum` makes of "bhqk,bkhd->bqhd");
not with two heads (of 16384 places, one such array was made all the same), nor with 256 elements.
An all-to-all of what a product reads changes nothing, be it values, the gradient of mixed values,
or queries and keys; nor does an all-gather of mixed values. For v5e they are computed again all the
same; v5p keeps them always.

(Attention layers and their gradients, 4 and 16 devices, 4096 to 16384 places, with a causal mask
and without, and a batch of two; each of the all-to-alls by itself on 4 devices of v6e, all of them
at once on 4 of v5e and v5p. Why a result that is sent decides about an operand was not found.
Queries, keys and values that are arguments, with mixed values sent, had none kept; that is not
counted. Neither is that a schedule may make the gradient of scores while weights lie there still.
Weights that loops stack up were not looked at. jax 0.10.2, libtpu 0.0.42.1.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cost_models.fitted import LANES
from passes.answer import Change
from passes.chains import MOVES, PRODUCTS, SAYS
from passes.compiler import exchanged_quotients_kept
from passes.ir.graph import Op
from passes.ir.plan import Axes
from passes.ir.sharding import Sharding
from passes.priced import Priced
from passes.reshard_copies import exchanges


def kept_for_exchanges(
    priced: Priced, values: Sequence[Axes], changed: Sequence[Change]
) -> Mapping[int, tuple[int, int]]:
    """When such weights lie there: [begin, end) by value that is not stored otherwise."""
    if not priced.fusion.quotients or not exchanged_quotients_kept(priced.cluster):
        return {}
    graph, when = priced.graph, priced.live.when
    makers, readers = graph.producers(), graph.consumers()
    sent = {c.value for c in changed if exchanges(c.moves)}
    out = dict[int, tuple[int, int]]()
    for v in priced.fusion.quotients:
        maker, shape = graph.ops[makers[v]], graph.values[v].shape
        local = Sharding(values[v]).local_shape(shape, priced.mesh.sizes)
        several = any(1 < here < n for here, n in zip(local, shape, strict=True))
        products = [(graph.ops[c], k) for c, k in readers[v]]
        if several or any(
            op.name not in PRODUCTS or op.region != maker.region for op, _ in products
        ):
            continue
        if any(k and _is_narrow(priced, op) and _is_sent(priced, op, sent) for op, k in products):
            out[v] = when[maker.id], max(when[op.id] for op, _ in products) + 1
    return out


def _is_narrow(priced: Priced, op: Op) -> bool:
    """Whether a product makes columns of 128 elements at most."""
    return priced.graph.values[op.outputs[0]].shape[-2] <= LANES


def _is_sent(priced: Priced, op: Op, sent: set[int]) -> bool:
    """Whether an all-to-all sends a result, or the same elements in another order or width."""
    ops, readers = priced.graph.ops, priced.graph.consumers()
    made = [op.outputs[0]]
    for u in made:
        if u in sent:
            return True
        made += [w for c, _ in readers[u] if ops[c].name in MOVES | SAYS for w in ops[c].outputs]
    return False
