"""Our rules say what Shardy's say, but for the differences listed here, each with its reason.

Two rules are compared as sets of factors that may be split: kind, length, and the places (tensor,
dim, stride) that the factor indexes. Factors that must stay whole, and halos, are left out: Shardy
calls both *permutation* or *need_replication*, and neither is free.
"""

from __future__ import annotations

import math

import jax
import pytest

import passes.rules  # noqa: F401
from autoshard.jax_compat import jax_version, open_jaxpr
from autoshard.rule_samples import Sample, equation
from autoshard.rule_samples_all import all_samples
from autoshard.shardy import ask_shardy
from autoshard.signature import signature
from passes.ir.rule import Rule
from passes.rules.registry import hand_rule, registered

# Reductions that Shardy does not name: it says only that the dim is reduced.
SAME_REDUCTION = {"argmax": "custom", "argmin": "custom"}


NO_SAMPLE = {
    **dict.fromkeys(
        ("branch_join", "loop_enter", "loop_next", "region_enter", "region_exit", "scan_slice",
         "scan_stack"),
        "a link of ours, no primitive of jax",
    ),
    **dict.fromkeys(
        ("broadcast_to", "create_linear", "mesh_cast", "multiple_of", "pin", "pvary",
         "reciprocal", "relayout", "reshard", "stage", "tie", "unpin", "xla_metadata_value",
         "with_memory_space_constraint", "inspect_sharding", "empty2"),
        "made only inside of jax, of kernels or of explicit sharding, or shown to nobody",
    ),
    **dict.fromkeys(
        ("from_edtype", "to_edtype", "iota_2x32_shape", "philox2x32", "philox4x32",
         "threefry4x32", "geqp3", "geqrf", "scaled_matmul_wrapper", "select_and_scatter"),
        "jax gives no public function that makes one",
    ),
    **dict.fromkeys(
        ("dot_product_attention_bwd_wrapper", "dot_product_attention_fwd_wrapper"),
        "made only where there is a GPU with cuDNN",
    ),
}  # fmt: skip
if jax_version() < (0, 11):
    NO_SAMPLE |= dict.fromkeys(("log2", "one_minus_square", "polynomial"), "came with jax 0.11")


def groupings(rule: Rule) -> frozenset[tuple[str, int, frozenset[tuple[int, int, int]]]]:
    """The factors that may be split, each with the places it indexes."""
    places: list[set[tuple[int, int, int]]] = [set() for _ in rule.factors]
    for t, dims in enumerate((*rule.operands, *rule.results)):
        for d, factors in enumerate(dims):
            for n, f in enumerate(factors):
                stride = math.prod(rule.factors[g].size for g in factors[n + 1 :])
                places[f].add((t, d, stride))
    return frozenset(
        (SAME_REDUCTION.get(f.op, f.op) or f.kind, f.size, frozenset(places[n]))
        for n, f in enumerate(rule.factors)
        if f.size > 1 and f.kind in ("parallel", "reduction") and places[n]
    )


# Sample -> why our rule differs.
DIFFERENT: dict[str, str] = dict.fromkeys(
    ("igamma", "igammac", "igamma_grad_a", "regularized_incomplete_beta"),
    "It lowers to a loop that ends when all elements have converged; the joined rule sees a "
    "reduction over all dims. It counts iterations only: every element stands for itself.",
) | dict.fromkeys(
    (
        "gather: rows of a table, fill", "gather: embedding", "gather: columns",
        "gather: along a dim",
    ),
    "It lowers to a gather and a choice between its result and NaN, which partial sums do not "
    "pass; but an index out of range is out of range on every device.",
) | dict.fromkeys(
    (
        "reduce_window_sum: pooling", "reduce_window_max: pooling", "reduce_window_min: pooling",
        "reduce_window: the user's function", "select_and_scatter_add", "select_and_gather_add",
        "conv_general_dilated: patches", "conv_general_dilated: one by one",
    ),
    "Shardy splits a dim under any window with an exchange between neighbours; we see that these "
    "windows do not overlap, so that whole windows may be split off freely.",
) | dict.fromkeys(
    ("top_k", "top_k: batched"),
    "It lowers to chlo.top_k, which Shardy does not know; other dims are independent.",
) | dict.fromkeys(
    ("triangular_solve: left", "triangular_solve: right"),
    "Shardy knows LAPACK's routine by its batch dims alone; right-hand sides are independent.",
) | {
    "dce_sink": "It has a side effect, so that Shardy is not asked.",
    "ragged_dot_general: rows by group":
        "It lowers to a masked product over all groups and a sum over them, joined by operations "
        "through which partial sums are not seen to pass; the rows of absent groups are zero.",
    "ragged_dot_general: summed by group":
        "It lowers to a masked product in which the group is cut out of the rows; every device can "
        "sum up the rows of its own groups.",
    "ragged_dot_general: batch by group":
        "The group sizes play no part in the result, and Shardy lets them be split as well.",
    **dict.fromkeys(
        ("reduce_xor", "reduce: the user's function", "reduce: two arrays together"),
        "No collective reduces so: XLA's CPU and GPU backends refuse to compile one.",
    ),
    "reshape: (0, 4) to (4, 0)": "Shardy gives no rule for an array without elements.",
    "rng_uniform": "Shardy has no rule for stablehlo.rng; it stays whole.",
    "scaled_dot: blocks of two":
        "It lowers to a composite, which Shardy does not look into.",
    "symmetric_product":
        "It lowers to a product scaled and added to another array; partial sums of the product "
        "are seen not to reach the result untouched.",
}  # fmt: skip
# The same, where the Shardy of jax 0.10 differs and that of jax 0.12 agrees with us.
if jax_version() < (0, 11):
    DIFFERENT |= {
        "dynamic_update_slice: one dim":
            "Shardy lets every device write its part of the stretch; XLA's partitioner gathers.",
        "dynamic_update_slice: both dims":
            "Shardy lets every device write its part of the stretch; XLA's partitioner gathers.",
        "pad: shifting": "Shardy sees that lengths agree, not that the elements move.",
    }  # fmt: skip


def test_enough_cases_and_no_stale_reason() -> None:
    names = [str(s) for s in all_samples()]
    assert len(set(names)) == len(names) >= 150
    assert set(DIFFERENT) <= set(names)
    assert all(DIFFERENT.values())


@pytest.mark.parametrize("sample", all_samples(), ids=str)
def test_rule_is_shardys(sample: Sample) -> None:
    eqn = equation(sample)
    ours = hand_rule(signature(eqn))
    if ours is None:
        pytest.skip("no hand-written rule")
    theirs, reason = ask_shardy(eqn)
    agree = theirs is not None and groupings(ours) == groupings(theirs)
    listed = DIFFERENT.get(str(sample))
    if listed is None:
        assert agree, f"ours:   {ours}\nShardy: {theirs or reason}"
    else:
        assert not agree, f"no longer differs from Shardy: take {sample} off the list ({listed})"


def test_every_rule_of_ours_has_a_sample() -> None:
    sampled = {s.primitive for s in all_samples()}
    assert set(registered()) - sampled - NO_SAMPLE.keys() == set()
    assert not sampled & NO_SAMPLE.keys(), "a reason not to have a sample, but a sample"


def test_a_wrong_rule_is_noticed() -> None:
    eqn = equation(next(s for s in all_samples() if s.primitive == "cumsum"))
    theirs, _ = ask_shardy(eqn)
    wrong = Rule.parse("i j -> i j", {"i": 4, "j": 6})
    assert theirs is not None
    assert groupings(wrong) != groupings(theirs)


def test_why_shardy_has_no_rule() -> None:
    loop = jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y + 1, x))(1.0)
    eqn = open_jaxpr(loop)[0].eqns[-1]
    assert ask_shardy(eqn)[0] is None
    assert "sub-program" in ask_shardy(eqn)[1]
    top_k = equation(next(s for s in all_samples() if s.primitive == "top_k"))
    assert ask_shardy(top_k) == (None, "Shardy has no rule for chlo.top_k")
