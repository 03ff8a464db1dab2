"""Progress bars with time left."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

_FILE_WIDTH = 110
Progress = Callable[[int, int, str], None]
"""Called with what is done, what there is in all, and a short status."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to the command line what becomes of a run that nobody reads any more."""
        raise


def console() -> Console:
    """Where people read: a terminal as wide as it is; a file or a pipe wide enough for a table."""
    found = _Console(highlight=False)
    return found if found.is_terminal else _Console(highlight=False, width=_FILE_WIDTH)


@contextlib.contextmanager
def bar(title: str) -> Iterator[Progress]:
    """Shows a bar while the block runs (lines, where there is no terminal); yields what to tell
    about progress.
    """
    if not console().is_terminal:
        yield _Lines(title)
        return
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


class _Lines:
    """Progress as a line every tenth of the way."""

    def __init__(self, title: str) -> None:
        self.title, self.started, self.next_tenth = title, time.monotonic(), 0

    def __call__(self, done: int, total: int, status: str) -> None:
        if 10 * done < self.next_tenth * total:
            return
        self.next_tenth = 10 * done // total + 1
        elapsed = time.monotonic() - self.started
        known = 20 * done >= total  # the start is slow; an estimate from it would frighten
        left = f", about {elapsed * (total - done) / done:.0f} s left" if known else ""
        note = f" ({status})" if status else ""
        console().print(f"{self.title}: {100 * done // total} % in {elapsed:.0f} s{left}{note}")
