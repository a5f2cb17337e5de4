"""Which schedules have been published, for microbatches that all go one way?

Every generator gives the order of tasks, whatever they cost. devices: p below; microbatches: m.
Of equal stages and without time for sending, the bubble is, in time of a device (F, B, W: those of
one microbatch on one device):

  gpipe        (p-1)(F+B+W)       all forward, then all backward
  one_f_one_b  (p-1)(F+B+W)       at most p microbatches under way
  eager        (p-1)(F+B+W)       2p-1 of them, so that what is sent arrives in time
  interleaved  (p-1)(F+B+W)/v     v chunks per device
  two_bp       (p-1)(F+B-W)       all W last, but for what fills the cool-down (if W <= F)
  zb_h1        (p-1)(F+B-W)       at most p under way, W fill the cool-down
  zb_h2        (p-1)(F+B-2W)      at most 2p-1 under way, W fill warm-up and cool-down
"""

from __future__ import annotations

from collections.abc import Iterator

from passes.pipeline.schedule import Schedule, ScheduleError, Task, straight


def gpipe(devices: int, microbatches: int) -> Schedule:
    """All forward tasks, then all backward (Huang et al., arXiv 1811.06965)."""
    order = (
        *(Task("F", k, 0) for k in range(microbatches)),
        *(Task("BW", k, 0) for k in reversed(range(microbatches))),
    )
    return _on_one_way("GPipe", [order] * devices, microbatches)


def one_f_one_b(devices: int, microbatches: int) -> Schedule:
    """One forward, one backward (Narayanan et al., arXiv 2104.04473, section 2.2.1)."""
    return _f_then_b("1F1B", devices, microbatches, 1)


def eager(devices: int, microbatches: int) -> Schedule:
    """1F1B with twice the forward tasks first (Zhuang et al., arXiv 2211.05322, section 4)."""
    return _f_then_b("eager 1F1B", devices, microbatches, 2)


def _f_then_b(name: str, devices: int, microbatches: int, first: int) -> Schedule:
    """Forward tasks ahead: so many for each device that follows; then in turn."""
    orders = []
    for d in range(devices):
        ahead = first * (devices - 1 - d)
        orders.append(tuple(_in_turn(ahead, microbatches, "BW")))
    return _on_one_way(name, orders, microbatches)


def _in_turn(ahead: int, microbatches: int, backward: str) -> Iterator[Task]:
    """So many forward tasks, then one of each in turn."""
    yield from (Task("F", k, 0) for k in range(min(ahead, microbatches)))
    for k in range(microbatches):
        if k + ahead < microbatches:
            yield Task("F", k + ahead, 0)
        yield Task(backward, k, 0)


def interleaved(devices: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B over several chunks per device (Narayanan et al., arXiv 2104.04473, section 2.2.2).

    Raises ScheduleError where the microbatches are no multiple of the devices.
    """
    if microbatches % devices:
        near = max(1, round(microbatches / devices)) * devices
        raise ScheduleError(
            f"interleaved 1F1B takes a multiple of {devices} microbatches (as many as devices), "
            f"not {microbatches}; the nearest is {near}"
        )
    turns = [
        (first + k, c)
        for first in range(0, microbatches, devices)
        for c in range(chunks)
        for k in range(devices)
    ]
    orders = []
    for d in range(devices):
        ahead = 2 * (devices - 1 - d) + (chunks - 1) * devices
        forward = [Task("F", k, c) for k, c in turns]
        backward = [Task("BW", k, chunks - 1 - c) for k, c in turns]
        order = forward[:ahead]
        for k, task in enumerate(backward):
            order += [*forward[ahead + k : ahead + k + 1], task]
        orders.append(tuple(order))
    way = straight(devices, chunks)
    return Schedule("interleaved 1F1B", (way,), (0,) * microbatches, tuple(orders))


def two_bp(devices: int, microbatches: int) -> Schedule:
    """1F1B with all W put off (Rae et al., arXiv 2405.18047): to the cool-down and after it."""
    orders = []
    for d in range(devices):
        ahead = devices - 1 - d
        order, pending = [], list[Task]()
        for task in _in_turn(ahead, microbatches, "B"):
            cooling = task.kind == "B" and task.microbatch > max(0, microbatches - 1 - ahead)
            if cooling and pending:
                order.append(pending.pop(0))
            order.append(task)
            if task.kind == "B":
                pending.append(task._replace(kind="W"))
        orders.append((*order, *pending))
    return _on_one_way("2BP", orders, microbatches)


def zb_h1(devices: int, microbatches: int) -> Schedule:
    """Zero bubble within the memory of 1F1B (Qi et al., arXiv 2401.10241, section 2.1)."""
    return _zero_bubble("ZB-H1", devices, microbatches, 1)


def zb_h2(devices: int, microbatches: int) -> Schedule:
    """Zero bubble within twice that memory (Qi et al., arXiv 2401.10241, section 2.2)."""
    return _zero_bubble("ZB-H2", devices, microbatches, 2)


def _zero_bubble(name: str, devices: int, microbatches: int, first: int) -> Schedule:
    """W follow so many B later that every device holds as many microbatches as the first."""
    orders = []
    for d in range(devices):
        late = first * d
        order = list[Task]()
        for task in _in_turn(first * (devices - 1 - d), microbatches, "B"):
            order.append(task)
            if task.kind == "B" and task.microbatch >= late:
                order.append(Task("W", task.microbatch - late, 0))
        left = range(max(0, microbatches - late), microbatches)
        orders.append((*order, *(Task("W", k, 0) for k in left)))
    return _on_one_way(name, orders, microbatches)


def _on_one_way(name: str, orders: list[tuple[Task, ...]], microbatches: int) -> Schedule:
    return Schedule(name, (straight(len(orders)),), (0,) * microbatches, tuple(orders))
