"""Rules that practitioners apply by hand, one knob each."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from metactl.controllers.base import BaseController
from metactl.signals import GAP_SCALE, Codec


class Plateau(BaseController):
    """Lowers a knob for as long as the loss does not improve (as PyTorch's ReduceLROnPlateau).

    Args:
        knob: The knob that is lowered, if the run has it.
        patience: Control steps without improvement before it moves.
        tolerance: Relative improvement that counts; less of it adds up.
    """

    memory = ("_best", "_waited")

    def __init__(
        self, knob: str = "learning_rate_multiplier", *, patience: int = 3, tolerance: float = 0.002
    ) -> None:
        self.knob, self.patience, self.tolerance = knob, patience, tolerance

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        self._best = np.full(n_runs, np.inf)
        self._waited = np.zeros(n_runs, dtype=np.int64)

    def act(self, observation: np.ndarray) -> np.ndarray:
        loss = self.loss(observation).astype(np.float64)
        improved = loss < self._best - self.tolerance
        self._best = np.where(improved, loss, self._best)
        self._waited = np.where(improved, 0, self._waited + 1)
        return self.only(self.knob, np.where(self._waited >= self.patience, -1.0, 0.0))


class GapDriven(BaseController):
    """Raises a knob while a run fits its data better than new data, and lowers it otherwise.

    Args:
        knob: The knob that regularises, if the run has it.
        low: Gap, as log(probe loss / train loss), below which the knob is lowered.
        high: Gap above which it is raised.
    """

    def __init__(self, knob: str = "dropout", *, low: float = 0.02, high: float = 0.08) -> None:
        self.knob, self.low, self.high = knob, low, high

    def act(self, observation: np.ndarray) -> np.ndarray:
        gap = self.codec.read(observation, "signal/generalisation_gap") / GAP_SCALE
        probed = self.codec.read(observation, "has/probe_loss") > 0
        measured = self.begun(observation) & probed
        move = (gap > self.high).astype(np.float64) - (gap < self.low)
        return self.only(self.knob, np.where(measured, move, 0.0))


class Together(BaseController):
    """Several controllers that move different knobs.

    Args:
        controllers: Their actions are added.
    """

    def __init__(self, *controllers: Plateau | GapDriven) -> None:
        self.controllers = controllers

    def keep_pace(self, n_control_steps: int) -> None:
        super().keep_pace(n_control_steps)
        for controller in self.controllers:
            controller.keep_pace(n_control_steps)

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        for controller in self.controllers:
            controller.begin(codec, n_runs)

    def state_dict(self) -> dict[str, Any]:
        return {"controllers": [each.state_dict() for each in self.controllers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for controller, kept in zip(self.controllers, state["controllers"], strict=True):
            controller.load_state_dict(kept)

    def act(self, observation: np.ndarray) -> np.ndarray:
        total = sum((each.act(observation) for each in self.controllers), start=self.hold())
        return np.clip(total, -1.0, 1.0)
