"""What does a controller do otherwise than asked for?  A sentence for each such thing.

Nothing of it changes a result; it takes memory, or time, that the table does not show.
"""

from __future__ import annotations

from collections.abc import Sequence

from passes.pipeline.schedule import Schedule


def not_moved(schedule: Schedule, table: Sequence[float], here: Sequence[float]) -> tuple[str, ...]:
    """Of a schedule that offloads, on devices that reach no other memory.

    table, here: per device the peak of the table, and the one without its transfers.
    """
    if not any(schedule.transfers):
        return ()
    return (
        f"{schedule.name} offloads activations, but the devices reach no memory of a host besides "
        f"their own: all stay there, and a device holds those of up to {max(here):g} microbatches "
        f"of a piece instead of {max(table):g}",
    )
