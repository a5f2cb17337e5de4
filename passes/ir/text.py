"""How does a graph read, and how is one written down for a test?

`print_graph` gives one line per operation; names are made here, so that they never enter a plan.
`parse_graph` (in `passes.ir.parse`) reads the same text back:

>>> from passes.ir.parse import parse_graph
>>> graph = parse_graph('''
... graph mlp
...   arg   x  f32[8,16]
...   arg   w  f32[16,4]
...   hint  x  [data, .]  train.py:7
...   %0 = dot_general x w  f32[8,4]  b k, k n -> b n  add(k)  train.py:9
...   %1 = reduce_sum %0  f32[4]  b n -> n  add(b)
...   out   %1  loss
... ''')
>>> print(graph)
graph mlp
  arg   x               f32[8,16]
  arg   w               f32[16,4]
  hint  x               [data, .]  train.py:7
  %0 = dot_general x w  f32[8,4]   b k, k n -> b n  add(k)  train.py:9
  %1 = reduce_sum %0    f32[4]     b n -> n         add(b)
  out   %1              loss

Columns are separated by two or more blanks. Factor sizes follow from the types; a mark such as
`{h=4 d=8}` gives those that do not (factors of a dim that has several). Further marks: `add(k)`
and the like for reductions, `halo(h:2)`, `whole(t)`, `linear(0 1, 2)`, `from(shardy)`, `effects`.
A lone `whole` is the rule that splits nothing. Parameters and jaxpr paths are not printed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from passes.ir.graph import Graph, Hint, Op, Region, Type, Value
from passes.ir.rule import Factor, Rule

_SAFE_NAME = re.compile(r"(?!_$)[A-Za-z_][^\s,:`%{}]*")
_SAFE_LITERAL = re.compile(r"[^\s,:`]+")
# A column wider than this does not push the others to the right on every line.
_WIDEST = 56

Row = tuple[int, tuple[str, ...]]  # indentation, columns


def print_graph(graph: Graph, *, costs: bool = False) -> str:
    """The graph as text; `costs` adds each rule's FLOP, moved bytes and whether it fuses."""
    names = value_names(graph)
    rows = [*_header(graph, names), *_body(graph, names, costs)]
    for k, v in enumerate(graph.outputs):
        name = graph.output_names[k] if k < len(graph.output_names) else ""
        rows.append((1, ("out   " + names[v], name)))
    rows.extend((1, (f"note  {note}",)) for note in graph.notes)
    return "\n".join([f"graph {graph.name}", *_aligned(rows)])


def value_names(graph: Graph) -> tuple[str, ...]:
    """A name for every value: argument names as they are, `%0`, `%1`, ... for the others."""
    often = Counter(v.name for v in graph.values if _keeps_name(v))
    inline = _inline_literals(graph)
    out: dict[int, str] = {}
    made = 0
    for v in _in_print_order(graph):
        if _keeps_name(v) and often[v.name] == 1:
            out[v.id] = quoted(v.name)
        elif v.id in inline:
            out[v.id] = f"{v.name}:{type_text(v.type)}"
        else:
            out[v.id] = f"%{made}"
            made += 1
    return tuple(out[v.id] for v in graph.values)


def quoted(name: str) -> str:
    """A value's name as printed: in backticks when it holds blanks, commas and the like."""
    return name if _SAFE_NAME.fullmatch(name) else "`" + name.replace("`", "``") + "`"


def line_text(source: str) -> str:
    """`train.py:14 (loss)`, without a function that has no name."""
    return re.sub(r" \(<.*>\)$", "", source) or "(no source line)"


def _keeps_name(value: Value) -> bool:
    return bool(value.name) and value.kind != "literal"


def _in_print_order(graph: Graph) -> Iterable[Value]:
    """Arguments, constants and literals of the header, then operands and results op by op."""
    seen: set[int] = set()
    inline = _inline_literals(graph)
    header = [*graph.inputs, *(v.id for v in graph.values if _in_header(v, inline))]
    body = [v for op in graph.ops for v in (*op.inputs, *op.outputs)]
    for v in (*header, *body, *range(len(graph.values))):
        if v not in seen:
            seen.add(v)
            yield graph.values[v]


def _in_header(value: Value, inline: frozenset[int]) -> bool:
    return value.kind in ("argument", "constant", "literal") and value.id not in inline


def _inline_literals(graph: Graph) -> frozenset[int]:
    """Literals that are written where they are used: `2.0:f32[]` can mean but one value."""
    used = {v for op in graph.ops for v in op.inputs}.union(graph.outputs)
    literals = [v for v in graph.values if v.kind == "literal" and v.id in used]
    often = Counter((v.name, v.type) for v in literals)
    return frozenset(
        v.id for v in literals
        if _SAFE_LITERAL.fullmatch(v.name) and often[v.name, v.type] == 1
    )  # fmt: skip


_HEAD = {"argument": "arg", "constant": "const", "literal": "lit"}


def _header(graph: Graph, names: Sequence[str]) -> Iterable[Row]:
    inline = _inline_literals(graph)
    for v in _in_print_order(graph):
        if not _in_header(v, inline):
            continue
        extra = v.name if v.kind == "literal" else "donated" if v.id in graph.donated else ""
        yield 1, (f"{_HEAD[v.kind]:<5} {names[v.id]}", type_text(v.type), extra)
    for h in graph.hints:
        yield 1, (f"hint  {names[h.value]}", hint_text(h), h.origin or "-", _hint_marks(h))
    for a, b in graph.ties:
        yield 1, (f"tie   {names[a]} {names[b]}",)


def hint_text(hint: Hint) -> str:
    """`[data, ., ?]`: split by data, not split, open; several axes as `data+model`."""
    dims = ("?" if d is None else "+".join(d) or "." for d in hint.dims)
    return f"[{', '.join(dims)}]"


def _hint_marks(hint: Hint) -> str:
    marks = [f"priority={hint.priority}"] if hint.priority else []
    return " ".join([*marks, *([] if hint.hard else ["soft"])])


def _body(graph: Graph, names: Sequence[str], costs: bool) -> Iterable[Row]:
    """Operations and the opening and closing lines of the regions around them."""
    waiting = [r for r in reversed(graph.regions) if r.id]
    open_: list[Region] = []
    for at in range(len(graph.ops) + 1):
        while True:
            if waiting and waiting[-1].begin <= at and not _closes(open_, at, waiting[-1]):
                region = waiting.pop()
                yield 1 + len(open_), (f"{region.kind} x{_number(region.trips)} {{",)
                open_.append(region)
            elif open_ and open_[-1].end <= at:
                open_.pop()
                yield 1 + len(open_), ("}",)
            else:
                break
        if at < len(graph.ops):
            yield 1 + len(open_), _op_columns(graph, graph.ops[at], names, costs)


def _closes(open_: Sequence[Region], at: int, upcoming: Region) -> bool:
    """Whether the innermost open region ends here, before the upcoming one begins."""
    return bool(open_) and open_[-1].end <= at and upcoming.parent != open_[-1].id


def _op_columns(graph: Graph, op: Op, names: Sequence[str], costs: bool) -> tuple[str, ...]:
    left = " ".join(names[v] for v in op.outputs) or "_"
    right = " ".join([op.name, *(names[v] for v in op.inputs)])
    operands = tuple(graph.values[v].type for v in op.inputs)
    results = tuple(graph.values[v].type for v in op.outputs)
    types = " ".join(map(type_text, results)) or "-"
    notation, marks = rule_text(op.rule, operands, results)
    if costs:
        marks = f"{marks} {cost_marks(op.rule)}".strip()
    if op.effects:
        marks = f"{marks} effects".strip()
    return f"{left} = {right}", types, notation, marks, " ".join(op.source.split())


def rule_text(rule: Rule, operands: Sequence[Type], results: Sequence[Type]) -> tuple[str, str]:
    """The rule's notation, and the marks that say what the notation and the types do not."""
    rule = _with_distinct_letters(rule)
    shapes = [t.shape for t in (*operands, *results)]
    bare = replace(rule, flops=0.0, moved=None, fuses=False)
    if bare == Rule.whole(shapes[: len(operands)], shapes[len(operands) :]):
        return "whole", ""
    known = sizes_by_letter(rule, shapes)
    factors = _in_order_of_mention(rule)
    marks = []
    unknown = [f"{f.name}={f.size}" for f in factors if known.get(f.name) != f.size]
    if unknown:
        marks.append("{" + " ".join(unknown) + "}")
    for kind in dict.fromkeys(_kind_mark(f) for f in factors if f.kind != "parallel"):
        of_kind = [f for f in factors if f.kind != "parallel" and _kind_mark(f) == kind]
        marks.append(f"{kind}({' '.join(_halo_text(f) for f in of_kind)})")
    if rule.linear:
        marks.append(f"linear({', '.join(' '.join(map(str, g)) for g in rule.linear)})")
    if rule.source != "hand":
        marks.append(f"from({rule.source})")
    return rule.notation(), " ".join(marks)


def _in_order_of_mention(rule: Rule) -> list[Factor]:
    """The factors as a reader of the notation meets them, which is the order they read back in."""
    tensors = (*rule.operands, *rule.results)
    return [rule.factors[f] for f in dict.fromkeys(f for t in tensors for dim in t for f in dim)]


def _with_distinct_letters(rule: Rule) -> Rule:
    """The same rule, later factors renamed where two have one name."""
    names = [f.name for f in rule.factors]
    if len(set(names)) == len(names):
        return rule
    factors = (
        f if names.index(f.name) == n else replace(f, name=f"{f.name}_{n}")
        for n, f in enumerate(rule.factors)
    )
    return replace(rule, factors=tuple(factors))


def cost_marks(rule: Rule) -> str:
    """`flops=1024.0 moved=64.0 fuses`, without what is zero, absent or false."""
    marks = [f"flops={rule.flops!r}"] if rule.flops else []
    marks += [] if rule.moved is None else [f"moved={rule.moved!r}"]
    return " ".join([*marks, *(["fuses"] if rule.fuses else [])])


def sizes_by_letter(rule: Rule, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Factor sizes that types alone tell: the length of the first dim that is one factor."""
    out: dict[str, int] = {}
    for dims, shape in zip((*rule.operands, *rule.results), shapes, strict=False):
        for dim, length in zip(dims, shape, strict=False):
            if len(dim) == 1:
                out.setdefault(rule.factors[dim[0]].name, length)
    return out


def _kind_mark(factor: Factor) -> str:
    return factor.op or "reduction" if factor.kind == "reduction" else factor.kind


def _halo_text(factor: Factor) -> str:
    return f"{factor.name}:{factor.halo}" if factor.kind == "halo" else factor.name


def type_text(type_: Type) -> str:
    """`f32[8,16]`; the bits of an element are added, `key<fry>/64[]`, where the name hides them."""
    text = str(type_)
    if type_.bits == default_bits(type_.dtype):
        return text
    name, shape = text.rsplit("[", 1)
    return f"{name}/{type_.bits}[{shape}"


def default_bits(dtype: str) -> int | None:
    """Bits of one element as the dtype's name says: 16 for bfloat16, None where it says nothing."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    return 8 if dtype == "bool" else int(found[1]) if found else None


def _number(x: float) -> str:
    return str(int(x)) if x == int(x) else repr(x)


def _aligned(rows: Sequence[Row]) -> Iterable[str]:
    """Lines with every column starting at the same place, but for the few too-wide cells."""
    cells = [("  " * depth + columns[0], *columns[1:]) for depth, columns in rows]
    widths: dict[int, int] = {}
    for row in cells:
        for k, cell in enumerate(row[:-1] if len(row) > 1 else ()):
            if len(cell) <= _WIDEST:
                widths[k] = max(widths.get(k, 0), len(cell))
    for row in cells:
        line = "  ".join(cell.ljust(widths.get(k, 0)) for k, cell in enumerate(row))
        yield line.rstrip()
