"""Progress bars with time left."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

Progress = Callable[[int, int, str], None]
"""Called with what is done, what there is in all, and a short status."""


def console() -> Console:
    return Console(highlight=False)


@contextlib.contextmanager
def bar(title: str) -> Iterator[Progress]:
    """Shows a bar while the block runs; yields what to tell about progress."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Bars(*columns, console=console(), speed_estimate_period=120) as bars:
        task = bars.add_task(title, total=None, status="")

        def update(done: int, total: int, status: str) -> None:
            bars.update(task, completed=done, total=total, status=status)

        yield update
