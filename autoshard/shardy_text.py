"""What does one of Shardy's rules say?  Reads the text of an `sdy.op_sharding_rule` attribute."""

from __future__ import annotations

import re
from dataclasses import dataclass


class NoRule(Exception):
    """An operation that Shardy has no rule for."""


@dataclass(frozen=True, slots=True)
class OpRule:
    """One `sdy.op_sharding_rule`: factor names per dim, their lengths, and the named kinds."""

    tensors: tuple[tuple[tuple[str, ...], ...], ...]
    operands: int
    sizes: dict[str, int]
    kinds: dict[str, frozenset[str]]

    @staticmethod
    def parse(text: str) -> OpRule:
        """Read the attribute's text.

        >>> rule = "([ij, k], [k])->([i, j]) {i=2, j=4, k=8} reduction={k}"
        >>> r = OpRule.parse(f"#sdy.op_sharding_rule<{rule}>")
        >>> r.tensors[0], r.operands, r.sizes["j"], sorted(r.kinds["reduction"])
        ((('i', 'j'), ('k',)), 2, 4, ['k'])
        """
        found = re.search(r"<\((.*?)\)->\((.*?)\)\s*(?:\{(.*?)\})?(.*)>", text, re.S)
        if not found:
            raise NoRule(f"the rule {text!r} can not be read")
        left, right, sizes, rest = found.groups()
        operands = _tensors(left)
        kinds = re.findall(r"(\w+)=\{(.*?)\}", rest)
        return OpRule(
            (*operands, *_tensors(right)),
            len(operands),
            {n: int(size) for n, size in re.findall(r"([a-z](?:_\d+)?)=(\d+)", sizes or "")},
            {kind: frozenset(re.findall(r"[a-z](?:_\d+)?", names)) for kind, names in kinds},
        )

    def one_sided(self, *, results: bool) -> frozenset[str]:
        """Names of the factors, reductions apart, that only operands (only results) have."""
        sides = (self.tensors[: self.operands], self.tensors[self.operands :])
        left, right = ({n for t in side for dim in t for n in dim} for side in sides)
        return frozenset(right - left if results else left - right - self.of_kind("reduction"))

    def of_kind(self, *kinds: str) -> frozenset[str]:
        """Names of the factors of these kinds."""
        return frozenset().union(*(self.kinds.get(kind, frozenset()) for kind in kinds))


def _tensors(text: str) -> list[tuple[tuple[str, ...], ...]]:
    return [
        tuple(tuple(re.findall(r"[a-z](?:_\d+)?", dim)) for dim in tensor.split(",") if dim.strip())
        for tensor in re.findall(r"\[(.*?)\]", text)
    ]
