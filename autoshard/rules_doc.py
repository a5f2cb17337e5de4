"""Which primitives have which rule?  Writes `docs/rules.md`: `python -m autoshard.rules_doc`.

Every primitive that this jax can lower has a row: its rule on a small sample equation, what of it
lets partial sums pass, and whether the rule is ours, Shardy's or none (*whole*).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autoshard.jax_compat import lowerable_primitives
from autoshard.rule_samples import Sample, equation
from autoshard.rule_samples_all import all_samples
from autoshard.shardy import shardy_rule
from autoshard.signature import signature
from autoshard.trace import INLINED, REMAT
from passes.ir.graph import LINKS, Signature, Type
from passes.ir.rule import Rule
from passes.rules.registry import hand_rule, registered, whole_rule

_HEAD = """# The rule of every primitive

Written by `python -m autoshard.rules_doc > docs/rules.md`; do not edit it by hand.

A rule names the index letters (factors) of an operation, as einsum does: operands, `->`, results,
separated by commas; `.` is a dim that nothing splits, `[]` a scalar, `(i j)` a dim made of two
factors, the major one first. Then follow the lengths of the factors, and those that are not simply
parallel: `add(k)` is reduced by addition, `whole(j)` must not be split, `halo(x)` takes a few
elements from its neighbours. *Linear in* lists the groups of operands that may hold partial sums
together, so that the results are partial sums.

*Source* is `hand` for a rule of our own (`passes/rules`), `shardy` for the rule that Shardy has for
what the equation lowers to (`autoshard/shardy.py`), `whole` where nothing may be split. Primitives
without a row here are met by asking Shardy, and stay whole if it has no answer.

Where our rules differ from Shardy's, `tests/autoshard/test_rules_against_shardy.py` says why.
`tests/autoshard/test_rules_numerics.py` runs each sample piece by piece and compares.
"""

# Why a primitive has no rule: what stands as its source, the reason, the primitives.
_NO_RULE: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("-", "inlined: the body's operations have their own rules", frozenset(INLINED)),
    (
        "-", "a region: the body's operations have their own rules",
        frozenset({"scan", "while", "cond", *REMAT}),
    ),
    ("-", "one operation, split as its own specs say", frozenset({"shard_map"})),
    (
        "whole", "a side effect: kept, and left unsharded",
        frozenset({"check", "debug_callback", "debug_print", "io_callback"}),
    ),
    (
        "whole", "a token, or a length known at run time: nothing to split",
        frozenset({"after_all", "create_token", "dim_as_value", "dimension_size",
                   "platform_index", "shape_assertion", "unreachable"}),
    ),
    (
        "whole", "a sub-program or foreign code that is not looked into",
        frozenset({"call", "call_exported", "composite", "core_map", "cudnn_fusion",
                   "custom_linear_solve", "custom_partitioning", "custom_vmap_call",
                   "eval_jaxpr", "ffi_call", "linear_call", "mpmd_map", "pallas_call",
                   "pure_callback", "remat_opt", "run_scoped", "run_state"}),
    ),
    (
        "whole", "a kernel of cuDNN, for GPUs only",
        frozenset({"scaled_matmul", *(f"dot_product_attention_{kind}{wrapper}"
                   for kind in ("fwd", "bwd", "fp8_fwd", "fp8_bwd")
                   for wrapper in ("", "_wrapper"))}),
    ),
)  # fmt: skip
_COLLECTIVE = "a collective, only inside of a shard_map"
_STEMS = (
    "all_gather", "all_to_all", "axis_index", "pbroadcast", "pmax", "pmin", "ppermute", "precv",
    "preduced", "psend", "psum", "ragged_all_to_all", "reduce_scatter", "reduced_vary",
    "unreduced_", "vary_unreduced",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One primitive: source of its rule, the sample's types, the rule (or why there is none)."""

    primitive: str
    source: str
    types: str
    rule: str
    linear: str


def markdown() -> str:
    """The whole page."""
    lines = [_HEAD]
    rows = list(_rows())
    counts = {s: sum(r.source == s for r in rows) for s in ("hand", "shardy", "whole")}
    lines.append(
        f"{len(rows)} primitives: {counts['hand']} with a rule by hand, {counts['shardy']} with "
        f"Shardy's, {counts['whole']} whole, {len(rows) - sum(counts.values())} that need none.\n"
    )
    lines.append("| primitive | source | sample | rule | linear in |")
    lines.append("|---|---|---|---|---|")
    lines += [f"| `{r.primitive}` | {r.source} | {r.types} | {r.rule} | {r.linear} |" for r in rows]
    lines.append("\n## Links\n")
    lines.append("Operations of our own that carry values over the border of a loop or branch.\n")
    lines.append("| link | rule |")
    lines.append("|---|---|")
    lines += [f"| `{name}` | `{_link(name)}` |" for name in sorted(LINKS)]
    return "\n".join(lines) + "\n"


def _rows() -> Iterator[Row]:
    samples: dict[str, Sample] = {}
    for sample in all_samples():
        samples.setdefault(sample.primitive, sample)
    names = set(lowerable_primitives()) | samples.keys()
    for name in sorted(names):
        if name in samples:
            yield _sampled(samples[name])
        elif name in registered():
            yield Row(name, "hand", "", "no public function of jax makes one to show", "")
        else:
            yield _unruled(name)


def _sampled(sample: Sample) -> Row:
    eqn = equation(sample)
    s = signature(eqn)
    rule = hand_rule(s) or shardy_rule(eqn) or whole_rule(s)
    types = ", ".join(map(str, s.operands)) + " -> " + ", ".join(map(str, s.results))
    return Row(sample.primitive, rule.source, f"`{types.strip()}`", f"`{rule}`", _linear(rule))


def _unruled(name: str) -> Row:
    for source, reason, names in _NO_RULE:
        if name in names:
            return Row(name, source, "", reason, "")
    if name.startswith(_STEMS):
        return Row(name, "-", "", _COLLECTIVE, "")
    return Row(name, "whole", "", "unless Shardy has a rule for what it lowers to", "")


def _linear(rule: Rule) -> str:
    return " or ".join("+".join(map(str, group)) for group in rule.linear)


def _link(name: str) -> Rule:
    """A link's rule on a value of two dims, in a scan of five steps."""
    one = Type((4, 6), "float32", 32)
    many = Type((5, 4, 6), "float32", 32)
    operands = {"scan_slice": (many,), "branch_join": (one, one)}.get(name, (one,))
    rule = hand_rule(Signature(name, operands, (many if name == "scan_stack" else one,)))
    assert rule is not None, f"the link {name} has no rule"
    return rule


if __name__ == "__main__":
    print(markdown(), end="")
