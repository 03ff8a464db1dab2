"""Where an evaluation plays its runs, and how it counts them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metactl.evaluation.kept import KeepingRow
from metactl.progress import Progress
from metactl.shards import ShardRow


@dataclass(frozen=True, kw_only=True)
class Where:
    """The environment in which runs are played.

    Args:
        env_id: Gymnasium id, with the module prefix.
        options: Keyword arguments of the environment.
        n_envs: Runs per worker.
        n_workers: Worker processes; 0 plays in this one.
        folder: Where what was played is kept, if it is.
    """

    env_id: str
    options: dict[str, Any]
    n_envs: int
    n_workers: int
    folder: Path | None = None

    def open(self, **changes: Any) -> ShardRow:
        """A row of shards; the caller closes it.

        Raises:
            ValueError: If the environment has no such option.
        """
        options = {**self.options, **changes}
        place = (self.env_id, self.n_envs, options, self.n_workers)
        return ShardRow(*place) if self.folder is None else KeepingRow(self.folder, *place)


class RunCounter:
    """Counts finished runs for a progress bar."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, "")
