"""Open-loop schedules: knob positions as a function of progress alone."""

import numpy as np

from metactl.controllers.base import BaseController
from metactl.knobs import FloatArray
from metactl.signals import Codec


class Schedule(BaseController):
    """Follows positions given at fixed points of progress, linear in between.

    Args:
        progress: Increasing points in [0, 1].
        positions: `[len(progress), n_knobs]` in [0, 1].
    """

    def __init__(self, progress: FloatArray, positions: FloatArray) -> None:
        self.progress, self.positions = np.asarray(progress), np.asarray(positions)
        if len(self.progress) != len(self.positions) or np.any(np.diff(self.progress) <= 0):
            raise ValueError(
                f"A schedule needs one row of positions per increasing point of progress, got "
                f"{len(self.progress)} points and {len(self.positions)} rows"
            )

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        if self.positions.shape[1:] != (len(codec.knobs),):
            raise ValueError(
                f"A schedule needs one column of positions per knob, {len(codec.knobs)} of them, "
                f"got positions of shape {self.positions.shape}"
            )

    def wanted(self, observation: np.ndarray) -> FloatArray:
        """Positions `[n_runs, n_knobs]` at the end of the coming control step."""
        now = (self.codec.read(observation, "signal/progress") + 1) / 2 + self.share
        columns = [np.interp(now, self.progress, column) for column in self.positions.T]
        return np.stack(columns, axis=1)

    def act(self, observation: np.ndarray) -> np.ndarray:
        return self.towards(self.wanted(observation), observation)
