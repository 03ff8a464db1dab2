"""Open-loop schedules: knob positions as a function of progress alone."""

import numpy as np

from metactl.controllers.base import BaseController
from metactl.knobs import FloatArray


class Schedule(BaseController):
    """Follows positions given at fixed points of progress, linear in between.

    Args:
        progress: Increasing points in [0, 1].
        positions: `[len(progress), n_knobs]` in [0, 1].
        n_control_steps: Decisions per run.
    """

    def __init__(self, progress: FloatArray, positions: FloatArray, n_control_steps: int) -> None:
        self.progress, self.positions = np.asarray(progress), np.asarray(positions)
        if len(self.progress) != len(self.positions) or np.any(np.diff(self.progress) <= 0):
            raise ValueError(
                f"A schedule needs one row of positions per increasing point of progress, got "
                f"{len(self.progress)} points and {len(self.positions)} rows"
            )
        self.share = 1 / n_control_steps

    def act(self, observation: np.ndarray) -> np.ndarray:
        now = (self.codec.read(observation, "signal/progress") + 1) / 2 + self.share
        columns = [np.interp(now, self.progress, column) for column in self.positions.T]
        return self.towards(np.stack(columns, axis=1), observation, self.share)
