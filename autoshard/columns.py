"""How are the columns of a print-out lined up?  `columns([("a", "1"), ("bc", "22")], "lr")`.

>>> print("\\n".join(columns([("step", "1.5 ms"), ("x", "12 us")], "lr")))
step  1.5 ms
x      12 us
"""

from __future__ import annotations

from collections.abc import Sequence


def columns(
    rows: Sequence[Sequence[str]], sides: str, indent: str = "", most: int = 100
) -> list[str]:
    """Lines with aligned columns, cut at `most` characters. sides: `l` or `r` for each column."""
    if not rows:
        return []
    widths = [max(len(row[k]) for row in rows) for k in range(len(sides))]
    used = [k for k, width in enumerate(widths) if width]
    out = []
    for row in rows:
        cells = (f"{row[k]:{'<' if sides[k] == 'l' else '>'}{widths[k]}}" for k in used)
        out.append(cut(indent + "  ".join(cells).rstrip(), most))
    return out


def cut(text: str, most: int) -> str:
    """The text, its end replaced by `..` where it is longer than that."""
    return text if len(text) <= most else text[: most - 2].rstrip() + ".."


def bar(parts: Sequence[float], whole: float, marks: str, width: int = 24) -> str:
    """`[######----....]`: how much of the whole each part is, one mark per part, dots for the rest.

    >>> bar([3.0, 1.0], 8.0, "#-", width=8)
    '[###-....]'
    """
    if whole <= 0:
        return f"[{'.' * width}]"
    ends = [min(width, round(width * sum(parts[: k + 1]) / whole)) for k in range(len(parts))]
    out, at = "", 0
    for mark, end in zip(marks, ends, strict=True):
        out, at = out + mark * (end - at), max(at, end)
    return f"[{out:.<{width}}]"
