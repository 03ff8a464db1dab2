"""TensorBoard: one writer per directory, few tags, resumable."""

from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter
from torch.utils.tensorboard import SummaryWriter


class Board:
    """Scalars of one run.

    Args:
        folder: Event files go here.
        purge_step: On resume: what was written from this step on is superseded.
    """

    def __init__(self, folder: Path, purge_step: int = 0) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=purge_step or None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
        numbers = {k: v for k, v in key_values.items() if isinstance(v, int | float)}
        self.board.scalars({k: float(v) for k, v in numbers.items()}, step)

    def close(self) -> None:
        self.board.close()
