"""Fused attention splits by batch and heads; cuDNN, which runs it, is not needed to say so."""

from __future__ import annotations

import passes.rules  # noqa: F401
from passes.ir.graph import Signature, Type
from passes.ir.rule import Rule
from passes.rules.registry import hand_rule

B, T, S, N, K, H = 4, 16, 32, 6, 2, 8


def array(*shape: int) -> Type:
    return Type(shape, "bfloat16", 16)


def kernel(
    direction: str, *, heads_first: bool = False, key_heads: int = K, bias: bool = False
) -> Rule:
    def tokens(time: int, heads: int) -> Type:
        return array(B, heads, time, H) if heads_first else array(B, time, heads, H)

    queries, keys = tokens(T, N), tokens(S, key_heads)
    shared = (
        queries,
        keys,
        keys,
        array(1, N, T, S) if bias else array(0),
        array(B),
        *[array(0)] * 5,
    )
    if direction == "fwd":
        operands, results = shared, (queries, array(B, N, T))
    else:
        operands = (*shared, array(B, N, T), queries, queries)
        results = (queries, keys, keys, *([array(1, N, T, S)] if bias else []))
    name = f"dot_product_attention_{direction}_wrapper"
    rule = hand_rule(Signature(name, operands, results, {"layout": int(heads_first)}))
    assert rule is not None
    return rule


def test_batch_and_heads_split_and_nothing_else() -> None:
    for direction in ("fwd", "bwd"):
        rule = kernel(direction)
        assert {f.name: f.size for f in rule.factors if f.kind != "whole"} == {"b": B, "n": K}
        assert {f.kind for f in rule.factors} == {"parallel", "whole"}


def test_a_key_head_stays_with_its_query_heads() -> None:
    assert kernel("fwd").notation() == (
        "b t (n g) h, b s n h, b s n e, x3, b, x5, x6, x7, x8, x9 -> b t (n g) e, b (n g) t"
    )


def test_heads_before_time_and_a_bias() -> None:
    assert kernel("bwd", heads_first=True, key_heads=N, bias=True).notation() == (
        "b n t h, b n s h, b n s e, . n t s, b, x5, x6, x7, x8, x9, b n t, b n t e, b n t e"
        " -> b n t h, b n s h, b n s e, . n t s"
    )


def test_flops() -> None:
    product = 2.0 * B * N * T * S * H
    assert kernel("fwd").flops == 2 * product
    assert kernel("bwd").flops == 5 * product
