"""What may a whole StableHLO function split, when each operation in it has a Shardy rule?

Each dim of each value is a list of *atoms*, outermost first, whose lengths multiply to the dim's.
An operation's rule says which dims share a factor: their atoms become one, after both lists are
cut into common pieces. When all operations are read, the atoms of the function's arguments and
results are the factors of its rule.

That is sound because an atom is split everywhere or nowhere, so each operation sees a split that
its own rule allows. An atom stays whole where an operation needs it whole, where lengths have no
common pieces, where one value has it twice, and where a reduction over it does not reach the
results untouched (its partial results would be used before they are complete).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from autoshard.shardy_atoms import Atoms
from autoshard.shardy_text import NoRule, OpRule
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors

_Named = dict[str, list[int]]

# Operations that hand values on without a rule: result n is operand n.
_PASSED_ON = frozenset({"stablehlo.optimization_barrier"})
_SOURCES = frozenset({"stablehlo.constant", "stablehlo.iota", "stablehlo.create_token"})
_RETURNS = frozenset({"stablehlo.return", "func.return"})
# A partial result may pass these: they move elements about and compute nothing.
_MOVES = frozenset(
    {"stablehlo.reshape", "stablehlo.transpose", "stablehlo.broadcast_in_dim",
     "stablehlo.optimization_barrier", "sdy.sharding_constraint", "func.call", *_RETURNS}
)  # fmt: skip
_BODY_OPS = {
    "stablehlo.add": "add", "stablehlo.maximum": "max", "stablehlo.minimum": "min",
    "stablehlo.multiply": "mul", "stablehlo.and": "and", "stablehlo.or": "or",
    "stablehlo.xor": "xor",
}  # fmt: skip


def join_rules(module: Any, ranks: Sequence[int]) -> Rule:
    """The rule of a module's `main`, whose operations carry Shardy's rules; raises NoRule.

    ranks: number of dims to report for each argument and result, in order (a value may have more
    dims in StableHLO than in jax, such as the words of a random key).
    """
    return _Join(module).rule(ranks)


class _Join:
    """The atoms of all values, filled in by walking through the module."""

    def __init__(self, module: Any) -> None:
        self._atoms = Atoms()
        self._dims: dict[Any, list[list[int]]] = {}
        self._next: dict[Any, list[tuple[str, Any]]] = {}
        self._reductions: list[tuple[int, str, list[Any]]] = []
        self._elements = 0
        self._functions = {f.attributes["sym_name"].value: f for f in _functions(module)}
        self._done: set[str] = set()

    def rule(self, ranks: Sequence[int]) -> Rule:
        """Walk through `main` and collect the rule."""
        main = self._functions["main"]
        arguments = list(main.regions[0].blocks[0].arguments)
        results = self._function("main")
        tensors = [self._of(v) for v in (*arguments, *results)]
        if len(tensors) != len(ranks):
            raise NoRule(f"it lowers to {len(tensors)} arguments and results, not {len(ranks)}")
        for dims, rank in zip(tensors, ranks, strict=True):
            for extra in dims[rank:]:
                self._atoms.keep_whole(extra)
        self._forbid_repeats()
        ops = self._reduction_ops(results)
        shown = [dims[:rank] for dims, rank in zip(tensors, ranks, strict=True)]
        return self._collect(shown, len(arguments), ops)

    def _of(self, value: Any) -> list[list[int]]:
        """Atoms of each dim of a value."""
        if value not in self._dims:
            self._dims[value] = [self._atoms.dim(n) for n in _shape(value)]
        return self._dims[value]

    def _same(self, a: Any, b: Any) -> None:
        """Two values of one shape that are split alike."""
        for x, y in zip(self._of(a), self._of(b), strict=True):
            self._atoms.same(x, y)

    def _flow(self, op: str, source: Any, target: Any) -> None:
        self._same(source, target)
        self._next.setdefault(source, []).append((op, target))

    # Walking.

    def _function(self, name: str) -> list[Any]:
        """Walk a function once; the values it returns."""
        block = self._functions[name].regions[0].blocks[0]
        if name not in self._done:
            self._done.add(name)
            self._block(block)
        return list(_terminator(block).operands)

    def _block(self, block: Any) -> None:
        for op in block.operations:
            self._operation(op.operation)

    def _operation(self, op: Any) -> None:
        name = op.name
        if name in _SOURCES or name in _RETURNS:
            return
        if name == "func.call":
            self._call(op)
        elif name == "stablehlo.while":
            self._loop(op)
        elif name == "stablehlo.case":
            self._branches(op)
        elif name in _PASSED_ON:
            for operand, result in zip(op.operands, op.results, strict=True):
                self._flow(name, operand, result)
        elif "sdy.sharding_rule" in op.attributes:
            self._apply(op, OpRule.parse(str(op.attributes["sdy.sharding_rule"])))
        elif name.startswith("chlo.") and _is_pointwise(op):
            for operand in op.operands:
                self._flow(name, operand, op.results[0])
        else:
            raise NoRule(f"Shardy has no rule for {_call_target(op) or name}")
        self._elements += sum(_size(r) for r in op.results)

    def _call(self, op: Any) -> None:
        name = op.attributes["callee"].value
        returned = self._function(name)
        inside = self._functions[name].regions[0].blocks[0].arguments
        for operand, argument in zip(op.operands, inside, strict=True):
            self._flow("func.call", operand, argument)
        for value, result in zip(returned, op.results, strict=True):
            self._flow("func.call", value, result)

    def _loop(self, op: Any) -> None:
        """A loop's start values, what its parts see and give, and its results are split alike."""
        blocks = [region.blocks[0] for region in op.regions]
        for block in blocks:
            self._block(block)
        returned = list(_terminator(blocks[1]).operands)
        for n, operand in enumerate(op.operands):
            for block in blocks:
                self._flow("loop", operand, block.arguments[n])
            self._flow("loop", returned[n], blocks[1].arguments[n])
            self._flow("loop", returned[n], op.results[n])
            self._same(operand, op.results[n])

    def _branches(self, op: Any) -> None:
        for region in op.regions:
            self._block(region.blocks[0])
            for value, result in zip(
                _terminator(region.blocks[0]).operands, op.results, strict=True
            ):
                self._flow("branch", value, result)

    def _apply(self, op: Any, rule: OpRule) -> None:
        """Unify the dims of one operation along its factors."""
        whole = rule.of_kind("need_replication", "permutation") | rule.one_sided(results=False)
        if op.name != "stablehlo.broadcast_in_dim":
            whole |= rule.one_sided(results=True)
        factors = {name: self._atoms.dim(n) for name, n in rule.sizes.items()}
        for name in whole:
            self._atoms.keep_whole(factors[name])
        for value, tensor in zip((*op.operands, *op.results), rule.tensors, strict=True):
            for atoms, names in zip(self._of(value), tensor, strict=True):
                self._unify(atoms, names, whole, factors)
        for operand in op.operands:
            for result in op.results:
                self._next.setdefault(operand, []).append((op.name, result))
        for name in sorted(rule.of_kind("reduction")):
            for atom in factors[name]:
                self._reductions.append((atom, _reduction_op(op), list(op.results)))

    def _unify(
        self, atoms: list[int], names: Sequence[str], whole: frozenset[str], factors: _Named
    ) -> None:
        """A dim is its factors, as far as the first one that stays whole."""
        count = next((n for n, name in enumerate(names) if name in whole), len(names))
        self._atoms.same(atoms, [a for name in names[:count] for a in factors[name]])
        for name in names[count:]:
            self._atoms.keep_whole(factors[name])

    # Collecting.

    def _forbid_repeats(self) -> None:
        """One value must not have an atom twice."""
        for dims in self._dims.values():
            seen: set[int] = set()
            for atom in self._atoms.expand(a for dim in dims for a in dim):
                if atom in seen:
                    self._atoms.keep_whole((atom,))
                seen.add(atom)

    def _reduction_ops(self, results: Sequence[Any]) -> dict[int, str]:
        """How each reduced atom is put together again; those that can not be become whole."""
        ops: dict[int, str] = {}
        final = set(results)
        kept = {
            a for v in results for a in self._atoms.expand(x for dim in self._of(v) for x in dim)
        }
        for factor, kind, made in self._reductions:
            untouched = all(self._reaches_untouched(v, final) for v in made)
            for atom in self._atoms.expand((factor,)):
                if not untouched or atom in kept or ops.get(atom, kind) != kind:
                    self._atoms.keep_whole((atom,))
                ops[atom] = kind
        return ops

    def _reaches_untouched(self, value: Any, final: set[Any]) -> bool:
        """Whether everything computed from a value is the value itself, moved about."""
        todo, seen = [value], {value}
        while todo:
            for op, target in self._next.get(todo.pop(), ()):
                if op not in _MOVES and not (op == "stablehlo.convert" and _floats(target)):
                    return False
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return True

    def _collect(
        self, tensors: Sequence[list[list[int]]], operands: int, ops: dict[int, str]
    ) -> Rule:
        """The atoms of the arguments and results as factors; whole ones are not shared."""
        f = Factors()
        made: dict[int, Dim] = {}

        def factor(atom: int) -> Dim:
            size = self._atoms.size(atom)
            if self._atoms.is_whole(atom):
                return f.whole(size)
            if atom not in made:
                made[atom] = f.reduction(size, ops[atom]) if atom in ops else f.parallel(size)
            return made[atom]

        dims = [
            [sum((factor(a) for a in self._atoms.expand(dim)), ()) for dim in tensor]
            for tensor in tensors
        ]
        rule = f.rule(dims[:operands], dims[operands:], flops=float(self._elements))
        return rule.with_source("shardy")


def _functions(module: Any) -> list[Any]:
    return [op for op in module.body.operations if op.operation.name == "func.func"]


def _terminator(block: Any) -> Any:
    return block.operations[len(block.operations) - 1]


def _shape(value: Any) -> tuple[int, ...]:
    """The dims of a value; a token has none. Raises NoRule when one is only known at run time."""
    shape = tuple(getattr(value.type, "shape", ()))
    if any(n < 0 for n in shape):
        raise NoRule("it has a dim whose length is only known at run time")
    return shape


def _size(value: Any) -> int:
    return math.prod(_shape(value))


def _floats(value: Any) -> bool:
    return str(getattr(value.type, "element_type", "")).startswith(("f", "bf"))


def _is_pointwise(op: Any) -> bool:
    shapes = {_shape(v) for v in (*op.operands, *op.results)}
    return len(shapes) == 1 and len(op.results) == 1


def _call_target(op: Any) -> str:
    """`custom call @name`, or "" for another operation."""
    if "call_target_name" not in op.attributes:
        return ""
    return f"custom call @{op.attributes['call_target_name'].value}"


def _reduction_op(op: Any) -> str:
    """How partial results of an operation are put together."""
    if not op.regions or not op.regions[0].blocks:
        return "add"  # a product or a convolution
    steps = [step.operation.name for step in op.regions[0].blocks[0].operations]
    return _BODY_OPS.get(steps[0], "custom") if len(steps) == 2 else "custom"
