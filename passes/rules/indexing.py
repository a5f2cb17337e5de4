"""What may an operation split that reads or writes at computed places?

Four sorts of dims, told apart by their lengths and by the dimension numbers:

* a dim that is taken as a whole (its slice is as long as itself) is left alone: parallel;
* a batching dim, and any dim of the indices in which results stand side by side: parallel;
* a dim in which single rows are looked up. Each device has some of the rows, answers the look-ups
  that fall on them with the row and the others with zero, and the sum over devices is the result:
  a *reduction* of a gather's operand (an embedding table split by vocabulary). A scatter is the
  mirror image: the device that owns the row writes it, the others drop it, so the row dim of the
  operand and of the result is parallel and the updates are the same on all devices;
* a dim of which a stretch is cut at a computed place: whole.

The look-ups of a scatter that combines (add, mul, min, max) may be split as well: every device
combines its own updates into its own copy, which on all devices but one starts from the neutral
element, and the copies are reduced. A plain scatter has no such reduction, and for one that
subtracts XLA does not make it: whole.

This is what XLA's partitioner does (GSPMD, arXiv 2105.04663, section 4; `gather_scatter_handler.cc`
of openxla/xla: passthrough, parallel and trivially sliced dims), so the cost of a split is the cost
of the program that comes out. It has no such trick for `dynamic_slice`, whose operand it gathers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from passes.ir.graph import Signature
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors, is_float
from passes.rules.registry import rule

_COMBINE = {
    "scatter-add": "add",
    "scatter-max": "max",
    "scatter-min": "min",
    "scatter-mul": "mul",
}
# Which operands must be partial together for the result to be partial.
_SCATTER_LINEAR = {"scatter-add": ((0, 2),), "scatter-sub": ((0, 2),), "scatter-mul": ((0,),)}


def _others(rank: int, dims: Sequence[int]) -> list[int]:
    return [d for d in range(rank) if d not in dims]


@rule("gather")
def gather(s: Signature) -> Rule:
    """`v d, i -> i d` for a look-up of rows, v reduced."""
    d = s.params["dimension_numbers"]
    table, indices = (t.shape for t in s.operands)
    slices = s.params["slice_sizes"]
    looked_up, gone = (
        d["start_index_map"],
        (*d["collapsed_slice_dims"], *d["operand_batching_dims"]),
    )
    f = Factors()
    places = [f.parallel(n) for n in indices[:-1]]
    result: list[Dim] = [()] * len(s.results[0].shape)
    for at, dim in zip(_others(len(result), d["offset_dims"]), places, strict=True):
        result[at] = dim
    window = dict(zip(_others(len(table), gone), d["offset_dims"], strict=True))
    batching = dict(zip(d["operand_batching_dims"], d["start_indices_batching_dims"], strict=True))
    operand: list[Dim] = []
    for k, (size, taken) in enumerate(zip(table, slices, strict=True)):
        if k in batching:
            operand.append(places[batching[k]])
        elif taken == size:
            operand.append(f.parallel(size))
            if k in window:
                result[window[k]] = operand[k]
        elif taken == 1 and k in looked_up:
            operand.append(f.reduction(size, "add"))
        else:
            operand.append(f.whole(size))
            if k in window:
                result[window[k]] = f.whole(taken)
    return f.rule(
        [operand, [*places, f.whole(indices[-1])]],
        [result],
        linear=((0,),) if _keeps_sums(s) else (),
        moved=float(2 * s.results[0].nbytes + s.operands[1].nbytes),
    )


def _keeps_sums(s: Signature) -> bool:
    """Whether a gather of partial sums gives partial sums: what it fills in must be 0 or NaN."""
    if s.params["mode"] != "FILL_OR_DROP":
        return True
    fill = s.params["fill_value"]
    return is_float(s.results[0]) if fill is None else fill != fill or fill == 0


@rule("scatter", "scatter-sub", *_COMBINE)
def scatter(s: Signature) -> Rule:
    """`v d, i, i d -> v d`, i reduced by what the scatter combines with; whole if it overwrites."""
    d = s.params["dimension_numbers"]
    table, indices, updates = (t.shape for t in s.operands)
    op = _COMBINE.get(s.name, "")
    f = Factors()
    batching = dict(
        zip(d["operand_batching_dims"], d["scatter_indices_batching_dims"], strict=True)
    )
    places: list[Dim] = []
    for k, n in enumerate(indices[:-1]):
        parallel = k in batching.values()
        places.append(f.parallel(n) if parallel else f.reduction(n, op) if op else f.whole(n))
    given: list[Dim] = [()] * len(updates)
    for at, dim in zip(_others(len(updates), d["update_window_dims"]), places, strict=True):
        given[at] = dim
    left_out = (*d["inserted_window_dims"], *batching)
    window = dict(zip(_others(len(table), left_out), d["update_window_dims"], strict=True))
    operand: list[Dim] = []
    for k, size in enumerate(table):
        length = updates[window[k]] if k in window else 1
        if k in batching:
            operand.append(places[batching[k]])
        elif length == size or (length == 1 and k in d["scatter_dims_to_operand_dims"]):
            operand.append(f.parallel(size))
        else:
            operand.append(f.whole(size))
        if k in window:
            given[window[k]] = operand[k] if length == size else f.whole(length)
    return f.rule(
        [operand, [*places, f.whole(indices[-1])], given],
        [operand],
        linear=_scatter_linear(s.name, s.params),
        flops=float(s.operands[2].size) if s.name != "scatter" else 0.0,
        # Read the updates, read and write their rows: it works in place, on a cache or on zeros.
        moved=float(3 * s.operands[2].nbytes + s.operands[1].nbytes),
    )


def _scatter_linear(name: str, params: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Linear groups. A plain scatter overwrites, unless the user gave a function of his own.

    The tracer leaves sub-programs out, so that parameter is there only when it is None.
    """
    if name == "scatter":
        return ((0, 2),) if "update_jaxpr" in params else ()
    return _SCATTER_LINEAR.get(name, ())


@rule("dynamic_slice")
def dynamic_slice(s: Signature) -> Rule:
    """`i a -> i c`: a dim that is taken as a whole is parallel, a dim that is cut whole."""
    f = Factors()
    operand: list[Dim] = []
    out: list[Dim] = []
    for before, after in zip(s.operands[0].shape, s.results[0].shape, strict=True):
        operand.append(f.parallel(before) if before == after else f.whole(before))
        out.append(operand[-1] if before == after else f.whole(after))
    starts = [[f.whole(n) for n in t.shape] for t in s.operands[1:]]
    moved = float(2 * s.results[0].nbytes)
    return f.rule([operand, *starts], [out], linear=((0,),), moved=moved, fuses=True)


@rule("dynamic_update_slice")
def dynamic_update_slice(s: Signature) -> Rule:
    """`i a, i -> i a` for one row: its owner writes it. A longer stretch keeps the dim whole."""
    f = Factors()
    operand: list[Dim] = []
    update: list[Dim] = []
    for size, length in zip(s.operands[0].shape, s.operands[1].shape, strict=True):
        operand.append(f.parallel(size) if length in (1, size) else f.whole(size))
        update.append(operand[-1] if length == size else f.whole(length))
    starts = [[f.whole(n) for n in t.shape] for t in s.operands[2:]]
    moved = float(2 * s.operands[1].nbytes)
    return f.rule([operand, update, *starts], [operand], linear=((0, 1),), moved=moved)
