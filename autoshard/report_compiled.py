"""How does a verification read?  Surprises first, predicted beside compiled, then collectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import add
from typing import TYPE_CHECKING

from autoshard.columns import columns
from cost_models.units import format_bytes, format_seconds
from passes.ir.text import line_text

if TYPE_CHECKING:
    from autoshard.auditing import Audit
    from autoshard.compiled import Found, Profile
    from autoshard.verification import Seen, Verification

_MOST_SEEN, _MOST_SURPRISES, _MOST_UNSEEN = 12, 5, 4


def report(v: Verification) -> str:
    """The verification on one screen."""
    found = [s.found for s in v.seen]
    listed = collectives(found, v.mesh, v.seen) if v.compiled is not None else []
    sections = (head(v), surprises(v), table(v), listed, unseen(v), ranking(v))
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def report_audit(a: Audit) -> str:
    """The audit on one screen."""
    rows = []
    if a.compiled is not None:
        rows = [
            ("compute", format_seconds(a.compiled.compute)) if a.compiled.compute else (),
            ("communication", format_seconds(a.compiled.comm)),
            ("sent", f"{format_bytes(a.compiled.sent)} by each device"),
            ("step", format_seconds(a.compiled.step)) if a.compiled.step else (),
        ]
    numbers = columns([row for row in rows if row], "ll", "  ")
    table = collectives(a.compiled.collectives, a.mesh) if a.compiled is not None else []
    return "\n\n".join("\n".join(lines) for lines in ([*head(a), *numbers], table) if lines)


def head(v: Verification | Audit) -> list[str]:
    """What was compiled for what, and whether it fits."""
    mesh = " ".join(f"{n}={s}" for n, s in v.mesh)
    lines = [("compiled", f"for {v.cluster}, mesh {mesh}, by its own compiler, without hardware")]
    if v.options:
        lines.append(("options", " ".join(f"{k}={o}" for k, o in v.options.items())))
    if v.added:
        added = " ".join(f"{k}={o}" for k, o in v.added.items())
        lines.append(("note", f"{added} too: without hardware it finds no tiles for Triton"))
    limit = format_bytes(v.memory_limit)
    if v.compiled is None:
        wants = f"{format_bytes(v.needed)} of " if v.needed else "more than "
        lines.append(("memory", f"does not fit: it wants {wants}{limit} on each device"))
    elif v.compiled.memory is not None:
        verdict = "fits" if v.fits else "does not fit"
        held = format_bytes(v.compiled.memory.peak)
        lines.append(("memory", f"{verdict}: {held} of {limit} on each device"))
    if v.compiled and v.compiled.unknown_trips:
        lines.append(
            ("note", f"{v.compiled.unknown_trips} loops whose trips XLA does not say count once")
        )
    return [v.name, *columns(lines, "ll", "  ")]


def surprises(v: Verification) -> list[str]:
    """What XLA sends that the plan did not foresee, by line and the most first."""
    groups: dict[tuple[str, str, str], list[Seen]] = {}
    for s in v.seen:
        if s.surprise:
            axes = "+".join(s.axes) or f"of {s.found.size} devices"
            groups.setdefault((s.found.kind, axes, s.found.source), []).append(s)
    sent = {key: sum(s.surprise for s in seen) for key, seen in groups.items()}
    least = 0.01 * max(v.predicted.comm_bytes, v.compiled.sent if v.compiled else 0.0)
    found = sorted((key for key in groups if sent[key] > least), key=lambda key: (-sent[key], key))
    if not found:
        return []
    lines = []
    for kind, axes, source in found[:_MOST_SURPRISES]:
        key = kind, axes, source
        trips = sum(s.found.trips for s in groups[key])
        lines.append(
            f"  XLA sends {format_bytes(sent[key])} in {kind} {axes} x{trips:g} at "
            f"{line_text(source)} that the plan did not foresee"
        )
    more = len(found) - _MOST_SURPRISES
    return ["surprises", *lines, *([f"  and {more} more"] if more > 0 else [])]


def table(v: Verification) -> list[str]:
    """Predicted beside compiled."""
    if v.compiled is None:
        return []
    p, c = v.predicted, v.compiled
    rows = [
        _row("peak memory", p.peak_memory, c.memory.peak if c.memory else None, format_bytes),
        _row("compute", p.compute_time, c.compute, format_seconds),
        _row("communication", p.comm_time, c.comm, format_seconds),
        _row("sent", p.comm_bytes, c.sent, format_bytes),
        _row("step", p.step_time, c.step, format_seconds),
        _row("  all overlapped", p.bounds[0], _bound(c, max), format_seconds),
        _row("  none overlapped", p.bounds[1], _bound(c, add), format_seconds),
    ]
    return columns([("", "predicted", "compiled", "error"), *rows], "lrrr", "  ")


def _bound(c: Profile, of: Callable[[float, float], float]) -> float | None:
    return None if c.compute is None else of(c.compute, c.comm)


def _row(
    name: str, predicted: float, compiled: float | None, text: Callable[[float], str]
) -> tuple[str, ...]:
    if compiled is None:
        return name, text(predicted), "-", "the compiler says nothing of it"
    error = f"{predicted / compiled - 1:+.1%}" if compiled else "-" if predicted else "+0.0%"
    return name, text(predicted), text(compiled), error


def collectives(
    found: Sequence[Found], mesh: Sequence[tuple[str, int]], seen: Sequence[Seen] = ()
) -> list[str]:
    """The collectives of a compiled program, like ones of a line together.

    seen: for each of them what a plan foresaw, where there was one.
    """
    groups: dict[tuple[str, str, str], list[int]] = {}
    for k, f in enumerate(found):
        axes = "+".join(mesh[a][0] for a in f.axes) if f.axes is not None else f"of {f.size}"
        groups.setdefault((f.kind, axes, f.source), []).append(k)
    sent = {key: sum(found[k].sent for k in ks) for key, ks in groups.items()}
    order = sorted(groups.items(), key=lambda item: (-sent[item[0]], item[0]))
    rows = [
        (
            format_bytes(sent[key]),
            " ".join(key[:2]),
            f"x{sum(found[k].trips for k in ks):g}",
            format_seconds(sum(found[k].seconds for k in ks)),
            "beside compute" if all(found[k].hidden for k in ks) else "",
            line_text(key[2]),
            _foreseen([seen[k] for k in ks]) if seen else "",
        )
        for key, ks in order[:_MOST_SEEN]
    ]
    if not rows:
        return ["collectives in the compiled program  none"]
    left = order[_MOST_SEEN:]
    rest = format_bytes(sum(sent[key] for key, _ in left))
    more = [f"  and {len(left)} more: {rest}"] if left else []
    return ["collectives in the compiled program", *columns(rows, "rlrrlll", "  ", 120), *more]


def _foreseen(seen: Sequence[Seen]) -> str:
    sent, here = sum(s.found.sent for s in seen), sum(s.here for s in seen)
    if not any(s.surprise for s in seen):
        return "foreseen" if here > 0.5 * sent else "foreseen on another line"
    known = (here + sum(s.elsewhere for s in seen)) / sent
    return f"{known:.0%} foreseen" if known >= 0.005 else "not foreseen"


def unseen(v: Verification) -> list[str]:
    """What the plan sends and XLA does not."""
    if v.compiled is None:
        return []
    found = [(line, sent) for line, sent in v.unseen if sent > 0.01 * v.predicted.comm_bytes]
    lines = [f"  {format_bytes(sent)} at {line_text(line)}" for line, sent in found[:_MOST_UNSEEN]]
    return ["foreseen, and not sent by XLA", *lines] if lines else []


def ranking(v: Verification) -> list[str]:
    """This plan and the others that were compiled, the fastest by its compiled program first."""
    if not v.others:
        return []
    order = sorted((v, *v.others), key=lambda o: (o.judged, o.predicted.step_time))
    rows = [
        (
            ">" if o is v else "",
            o.solver + ("" if o.options == v.options else ", no options"),
            " ".join(f"{n}={s}" for n, s in o.mesh),
            format_seconds(o.predicted.step_time),
            format_seconds(o.judged) if o.judged < math.inf else "does not fit",
            format_bytes(o.predicted.peak_memory),
            format_bytes(_held(o)) if _held(o) else "?",
        )
        for o in order
    ]
    titles = ("", "", "", "predicted", "compiled", "predicted", "compiled")
    best = order[0]
    said = "" if best is v else f"  {best.solver} on {rows[0][2]} is judged faster by its program"
    lines = ["by the compiled programs", *columns([titles, *rows], "lllrrrr", "  ")]
    return [*lines, *([said] if said else [])]


def _held(v: Verification) -> float:
    held = v.compiled.memory if v.compiled else None
    return held.peak if held else v.needed
