"""Replay: a recorded trajectory of knob positions, whatever the run does."""

import numpy as np

from metactl.controllers.schedule import Schedule
from metactl.knobs import FloatArray


class Replay(Schedule):
    """Replays recorded positions; what a learned policy is worth without its feedback.

    Args:
        positions: `[n_control_steps + 1, n_knobs]`: where the recorded run began, and where its
            knobs were in each control step.
    """

    def __init__(self, positions: FloatArray) -> None:
        super().__init__(np.linspace(0, 1, len(positions)), positions)
