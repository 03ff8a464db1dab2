"""TensorBoard: one writer per directory, few tags, resumable."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import KVWriter
from torch.utils.tensorboard import SummaryWriter


class Board:
    """Scalars of one run.

    Args:
        folder: Event files go here.
        purge_step: On resume: what was written from this step on is superseded.
    """

    def __init__(self, folder: Path, purge_step: int = 0) -> None:
        if purge_step:
            _wait_for_a_later_name(folder)
        self._folder = str(folder)
        self._writer = SummaryWriter(self._folder, purge_step=purge_step or None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        with self._named():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        with self._named():
            self._writer.flush()

    def close(self) -> None:
        with self._named():
            self._writer.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What cannot be written, such as on a full disk, is said with its place."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or self._folder) from error

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """Event files are read in the order of their names, which begin with the second they are of."""
    names = [re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.glob("*")]
    now = time.time()
    seconds = [int(name[1]) for name in names if name is not None]
    if int(now) in seconds:
        time.sleep(int(now) + 1 - now)


_NUMBERS = (int, float, np.floating)


class BoardWriter(KVWriter):
    """Passes what Stable-Baselines3 logs to a board."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def write(
        self,
        key_values: dict[str, Any],
        key_excluded: dict[str, tuple[str, ...]],
        step: int = 0,
    ) -> None:
        numbers = {k: v for k, v in key_values.items() if isinstance(v, _NUMBERS)}
        self.board.scalars({k: float(v) for k, v in numbers.items()}, step)

    def close(self) -> None:
        self.board.close()
