"""What a sweep's driver hears of its trials: progress, what is lost, what was given up."""

import collections
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metactl.files import write_atomically
from metactl.progress import Progress
from metactl.sweep.config import trial_folder
from metactl.sweep.result import STOPPED, merit, read_result

logger = logging.getLogger(__name__)
_FINENESS = 1000  # of the progress of one trial
_ROOM = 1 << 16  # bytes; whoever cannot write so much cannot go on


def tune_watcher(
    root: Path,
    n_planned: int,
    n_left: int,
    progress: Progress | None,
    finished: Sequence[dict[str, Any]] = (),
) -> Any:
    """A Tune callback that marks trials that were given up, and tells about progress.

    Args:
        root: The sweep's directory.
        n_planned: Trials in all.
        n_left: Of these, how many are not over.
        progress: Told about them.
        finished: Results of those that finished before.
    """
    from ray.tune import Callback

    class Watcher(Callback):
        best: tuple[float, float] | None = max(
            ((merit(result), result["score"]) for result in finished), default=None
        )
        over = n_planned - n_left

        def __init__(self) -> None:
            self.failed: dict[str, str] = {}

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
        ) -> None:
            self._tell(trials)

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            folder = trial_folder(root, str(trial))
            result = read_result(folder)
            if result is not None:
                held = (merit(result), result["score"])
                self.best = held if self.best is None else max(self.best, held)
            elif trial.last_result.get("share") != 1:
                write_atomically(folder / STOPPED, b"This trial was given up.\n")
            self._tell(trials)

        def on_trial_recover(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            require_room(root)  # else it would be tried in vain, again and again
            logger.warning("Trial %s goes on from its checkpoint: %s", trial, _reason(trial))

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            self.failed[str(trial)] = _reason(trial)
            self._tell(trials)

        def _tell(self, trials: list[Any]) -> None:
            if progress is None:
                return
            count = collections.Counter(trial.status for trial in trials)
            ended = ("TERMINATED", "ERROR")
            shares = [
                1.0 if trial.status in ended else float(trial.last_result.get("share", 0.0))
                for trial in trials
            ]
            best = "none yet" if self.best is None else f"{self.best[1]:+.4f} nats"
            status = f"best gain {best}, {count['RUNNING']} running, {count['ERROR']} failed"
            done = int(_FINENESS * (self.over + sum(shares)))
            progress(done, _FINENESS * n_planned, status)

    return Watcher()


def _reason(trial: Any) -> str:
    """Why a trial stopped, as far as Tune knows."""
    if trial.error_file and Path(trial.error_file).exists():
        return last_line(Path(trial.error_file).read_text())
    return "its process is gone"


def last_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else "it failed"


def require_room(root: Path) -> None:
    """Raises what writing there raises, such as that the disk is full."""
    probe = root / "room"
    write_atomically(probe, bytes(_ROOM))
    probe.unlink()
