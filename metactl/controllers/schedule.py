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
        n_control_steps: Decisions per run.
    """

    def __init__(self, progress: FloatArray, positions: FloatArray, n_control_steps: int) -> None:
        self.progress, self.positions = np.asarray(progress), np.asarray(positions)
        if len(self.progress) != len(self.positions) or np.any(np.diff(self.progress) <= 0):
            raise ValueError(
                f"A schedule needs one row of positions per increasing point of progress, got "
                f"{len(self.progress)} points and {len(self.positions)} rows"
            )
        self.keep_pace(n_control_steps)

    def keep_pace(self, n_control_steps: int) -> None:
        self.share = 1 / n_control_steps

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
        return self.towards(self.wanted(observation), observation, self.share)


class ContextualSchedule(BaseController):
    """A schedule that is told how much data the task has: it reads no other signal.

    As nothing is measured before the first control step, it is told from the second on.

    Args:
        schedule: Positions where the context is 0.
        slopes: `[len(progress), n_knobs]`: what a context of 1 adds to them.
        context: The entry of the observation that tells the tasks apart.
    """

    def __init__(
        self, schedule: Schedule, slopes: FloatArray, context: str = "signal/data_pressure"
    ) -> None:
        self.schedule, self.context = schedule, context
        self.slopes = Schedule(schedule.progress, slopes, round(1 / schedule.share))

    def keep_pace(self, n_control_steps: int) -> None:
        self.schedule.keep_pace(n_control_steps)
        self.slopes.keep_pace(n_control_steps)

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        self.schedule.begin(codec, n_runs)
        self.slopes.begin(codec, n_runs)

    def act(self, observation: np.ndarray) -> np.ndarray:
        told = self.codec.read(observation, self.context)[:, None]
        wanted = self.schedule.wanted(observation) + told * self.slopes.wanted(observation)
        return self.towards(np.clip(wanted, 0, 1), observation, self.schedule.share)
