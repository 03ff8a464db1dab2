"""Where an evaluation plays its runs, and how it counts them."""

from dataclasses import dataclass
from typing import Any

from metactl.config import ConfigError
from metactl.progress import Progress
from metactl.shards import ShardRow


@dataclass(frozen=True, kw_only=True)
class Where:
    """The environment in which runs are played, on tasks that training never drew."""

    env_id: str
    options: dict[str, Any]
    n_envs: int
    n_workers: int

    def open(self, **changes: Any) -> ShardRow:
        """A row of shards; the caller closes it.

        Raises:
            ConfigError: If the environment has no such option.
        """
        options = {**self.options, **changes}
        try:
            return ShardRow(self.env_id, self.n_envs, options, self.n_workers)
        except TypeError as error:
            raise ConfigError(f"{self.env_id}: {error}") from error


class Counter:
    """Counts finished runs for a progress bar."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, "")
