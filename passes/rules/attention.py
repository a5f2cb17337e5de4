"""What may a fused attention kernel split?  The batch and the heads.

These are cuDNN's kernels, which `jax.nn.dot_product_attention(implementation="cudnn")` calls; jax
partitions them itself, by batch and heads only: `b t n h, b s n h, b s n e -> b t n e`. With fewer
key heads than query heads, each key head stays with its group of query heads: `(n g)` against `n`.

FLOP: two products of t x s x h for each head forward, five backward (Dao, "FlashAttention-2",
arXiv 2307.08691, section 3); a causal mask does not halve them here.
"""

from __future__ import annotations

from passes.ir.graph import Signature, Type
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors
from passes.rules.registry import rule

_HEADS_FIRST = 1  # parameter `layout`; 0 is batch, time, heads, features
_SHARED = 10  # queries, keys, values, bias, two lengths, two offsets, two page tables


class _Attention:
    """The factors of one attention, and the dims of each sort of tensor in it."""

    def __init__(self, s: Signature) -> None:
        queries, keys, values = (t.shape for t in s.operands[:3])
        self.turned = s.params["layout"] == _HEADS_FIRST
        heads, time = (1, 2) if self.turned else (2, 1)
        self.f = Factors()
        self.batch_size = queries[0]
        self.batch = self.f.parallel(queries[0], "b")
        self.key_heads = self.f.parallel(keys[heads], "n")
        self.heads = self.key_heads + self.f.whole(queries[heads] // keys[heads], "g")
        self.time = self.f.whole(queries[time], "t")
        self.key_time = self.f.whole(keys[time], "s")
        self.features = self.f.whole(queries[3], "h")
        self.made = self.f.whole(values[3], "e")
        self.products = 2.0 * s.operands[0].size * keys[time]

    def _tokens(self, time: Dim, heads: Dim, features: Dim) -> tuple[Dim, ...]:
        middle = (heads, time) if self.turned else (time, heads)
        return (self.batch, *middle, features)

    def tokens(self) -> list[tuple[Dim, ...]]:
        """Queries, keys and values, or their gradients."""
        return [
            self._tokens(self.time, self.heads, self.features),
            self._tokens(self.key_time, self.key_heads, self.features),
            self._tokens(self.key_time, self.key_heads, self.made),
        ]

    def output(self) -> tuple[Dim, ...]:
        """The result, or its gradient."""
        return self._tokens(self.time, self.heads, self.made)

    def bias(self, t: Type) -> tuple[Dim, ...]:
        """(batch, heads, t, s), the first two possibly of length one; no elements when absent."""
        if len(t.shape) != 4:
            return self._whole(t, 3)
        dims = (self.batch, self.heads, self.time, self.key_time)
        return tuple(() if n == 1 else d for n, d in zip(t.shape, dims, strict=True))

    def statistics(self, t: Type) -> tuple[Dim, ...]:
        """(batch x packed segments, heads, t)."""
        return (self.batch + self.f.whole(t.shape[0] // self.batch_size), self.heads, self.time)

    def lengths(self, t: Type, operand: int) -> tuple[Dim, ...]:
        """One for each sequence of the batch, or something else that all devices need."""
        return (self.batch,) if t.shape == (self.batch_size,) else self._whole(t, operand)

    def _whole(self, t: Type, operand: int) -> tuple[Dim, ...]:
        return tuple(self.f.whole(n, f"x{operand}{d or ''}") for d, n in enumerate(t.shape))

    def shared(self, s: Signature) -> list[tuple[Dim, ...]]:
        """The operands of forward and backward kernels alike."""
        lengths = [self.lengths(t, n) for n, t in enumerate(s.operands[4:_SHARED], 4)]
        return [*self.tokens(), self.bias(s.operands[3]), *lengths]


@rule("dot_product_attention_fwd_wrapper")
def attention_forward(s: Signature) -> Rule:
    """The output, and in training the logarithms of the softmax's sums."""
    a = _Attention(s)
    results = [a.output(), *(a.statistics(t) for t in s.results[1:])]
    return a.f.rule(a.shared(s), results, flops=2.0 * a.products)


@rule("dot_product_attention_bwd_wrapper")
def attention_backward(s: Signature) -> Rule:
    """Gradients of queries, keys and values, and of a bias if there is one."""
    a = _Attention(s)
    kept = [a.statistics(s.operands[_SHARED]), a.output(), a.output()]
    results = [*a.tokens(), *(a.bias(t) for t in s.results[3:])]
    return a.f.rule([*a.shared(s), *kept], results, flops=5.0 * a.products)
