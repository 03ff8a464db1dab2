"""The loss-driven rule: move the RoPE base when the loss stops improving."""

import numpy as np

from metactl.controllers.base import BaseController
from metactl.signals import Codec


class Responsive(BaseController):
    """Moves one knob in steps on its own scale while the smoothed loss does not improve.

    The rule compares a smoothed loss with its best so far (not single batches), waits for
    `patience` control steps before it acts, moves by an equal ratio each time (a logarithmic
    step), and turns round when a move was followed by no improvement.

    Args:
        knob: The knob that is moved, if the run has it.
        patience: Control steps without improvement before a move.
        step: Size of a move, as a share of the largest.
        smoothing: Weight of the newest loss in the moving average.
        tolerance: Relative improvement of the smoothed loss that counts.
    """

    memory = ("_smoothed", "_best", "_waited", "_direction", "_moved")

    def __init__(
        self,
        knob: str = "rope_base",
        *,
        patience: int = 3,
        step: float = 0.5,
        smoothing: float = 0.3,
        tolerance: float = 0.002,
    ) -> None:
        self.knob, self.patience, self.step = knob, patience, step
        self.smoothing, self.tolerance = smoothing, tolerance

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        self._smoothed = np.full(n_runs, np.nan)
        self._best = np.full(n_runs, np.inf)
        self._waited = np.zeros(n_runs, dtype=np.int64)
        self._direction = np.ones(n_runs)
        self._moved = np.zeros(n_runs, dtype=bool)  # since the last improvement

    def act(self, observation: np.ndarray) -> np.ndarray:
        loss = self.codec.read(observation, "signal/train_level").astype(np.float64)
        first = np.isnan(self._smoothed)
        mixed = self._smoothed + self.smoothing * (loss - self._smoothed)
        self._smoothed = np.where(first, loss, mixed)
        improved = self._smoothed < self._best - self.tolerance
        self._best = np.minimum(self._best, self._smoothed)
        self._waited = np.where(improved, 0, self._waited + 1)
        due = self._waited >= self.patience
        self._direction = np.where(due & self._moved, -self._direction, self._direction)
        move = np.where(due, self.step * self._direction, 0.0)
        self._moved = np.where(improved, False, self._moved | due)
        self._waited = np.where(due, 0, self._waited)
        return self.only(self.knob, move)
