"""In which order should messages visit the nodes?  One that cuts the graph into few, long chains.

Message passing covers the graph with chains that follow the order; a node with f edges ahead and b
behind lies on max(f, b) of them and gives each an equal share of its costs. Fewer chains per node
let a cost travel further in one pass: on traced programs an order chosen for it halves the passes
that a bound needs. From the given order, and from a breadth-first one, each node moves between the
two middle ones of its neighbours where that raises the sum of shares; the better result wins.

>>> chain_order([{1, 2}, {0}, {0}])  # the middle of a path of three belongs in the middle
[1, 0, 2]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

_PASSES = 6


def chain_order(links: Sequence[Collection[int]]) -> list[int]:
    """The nodes 0..n-1, in a good order for message passing."""
    balanced = [_balance(links, order) for order in (range(len(links)), _breadth_first(links))]
    return max(balanced, key=lambda found: found[0])[1]


def _breadth_first(links: Sequence[Collection[int]]) -> list[int]:
    """Cuthill and McKee's order: breadth first from a node of least degree, low degrees first."""
    seen: set[int] = set()
    order: list[int] = []
    by_degree = sorted(range(len(links)), key=lambda v: (len(links[v]), v))
    for start in by_degree:
        if start in seen:
            continue
        seen.add(start)
        order.append(start)
        at = len(order) - 1
        while at < len(order):
            new = sorted(
                (u for u in links[order[at]] if u not in seen), key=lambda u: (len(links[u]), u)
            )
            seen.update(new)
            order += new
            at += 1
    return order


def _balance(links: Sequence[Collection[int]], order: Sequence[int]) -> tuple[float, list[int]]:
    """The sum of shares after moving nodes between their middle neighbours, and the order."""
    place = [0.0] * len(links)
    for i, v in enumerate(order):
        place[v] = float(i)
    ahead = [sum(place[u] > place[v] for u in around) for v, around in enumerate(links)]
    for _ in range(_PASSES):
        moved = False
        for v, around in enumerate(links):
            if len(around) > 1:
                moved |= _move(v, links, place, ahead)
        if not moved:
            break
    shares = (_share(len(around), ahead[v]) for v, around in enumerate(links))
    return sum(shares), sorted(range(len(links)), key=lambda v: (place[v], v))


def _share(links: int, ahead: int) -> float:
    """Of a node's costs that each chain gets, with so many of its links ahead."""
    return 1.0 / max(ahead, links - ahead, 1)


def _move(v: int, links: Sequence[Collection[int]], place: list[float], ahead: list[int]) -> bool:
    """Try the places between the middle neighbours of v; whether one was better."""
    around = links[v]
    count, old = len(around), place[v]
    others = [(place[u], len(links[u]), ahead[u]) for u in around]
    sorted_ = sorted(p for p, _, _ in others)
    half = count // 2
    tries = [(sorted_[half - 1] + sorted_[half]) / 2]
    if count % 2:
        tries.append((sorted_[half] + sorted_[half + 1]) / 2)
    best = _share(count, ahead[v])
    for _, n, a in others:
        best += _share(n, a)
    better = old
    for new in tries:
        value = _share(count, sum(p > new for p, _, _ in others))
        for p, n, a in others:
            value += _share(n, a - (old > p) + (new > p))
        if value > best + 1e-9:
            best, better = value, new
    if better == old:
        return False
    place[v] = better
    ahead[v] = sum(p > better for p, _, _ in others)
    for u, (p, _, _) in zip(around, others, strict=True):
        ahead[u] += (better > p) - (old > p)
    return True
