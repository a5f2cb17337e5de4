"""How does a user see that something long is going on?  A moving line on stderr, after two seconds.

Where stderr is no terminal nothing is written at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PATIENCE_S = 2.0


@contextmanager
def progress(what: str, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """A function to tell of each step; the bar appears when the block takes over two seconds."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(pulse_style="cyan"), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=None)
    timer = threading.Timer(PATIENCE_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda text: bar.update(task, description=f"{what}: {text}")
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
