"""What may a link split that carries a value over a region's border?  All dims but the loop's.

The tracer makes these operations (`passes.ir.graph.LINKS`); they are no jax primitives. They cost
nothing: the value stays where it is. The dim that a scan steps through stays whole, because every
device takes part in each step.
"""

from __future__ import annotations

from passes.ir.graph import Signature
from passes.ir.rule import Rule
from passes.rules.factors import Factors, identity
from passes.rules.registry import rule


@rule("branch_join")
def branch_join(s: Signature) -> Rule:
    """One of the operands, whichever branch ran."""
    f = Factors()
    dims = f.parallel_dims(s.results[0].shape)
    count = len(s.operands)
    return f.rule([dims] * count, [dims], linear=(tuple(range(count)),), fuses=True)


@rule("loop_enter", "loop_next", "region_enter", "region_exit")
def carry(s: Signature) -> Rule:
    """The value itself."""
    return identity(s, linear=((0,),))


@rule("scan_slice")
def scan_slice(s: Signature) -> Rule:
    """`l i j -> i j`: the part of a scanned value that one step sees."""
    f = Factors()
    steps = f.whole(s.operands[0].shape[0], "l")
    dims = f.parallel_dims(s.results[0].shape)
    return f.rule([(steps, *dims)], [dims], linear=((0,),), fuses=True)


@rule("scan_stack")
def scan_stack(s: Signature) -> Rule:
    """`i j -> l i j`: what the steps gave, side by side."""
    f = Factors()
    steps = f.whole(s.results[0].shape[0], "l")
    dims = f.parallel_dims(s.operands[0].shape)
    return f.rule([dims], [(steps, *dims)], linear=((0,),), fuses=True)
