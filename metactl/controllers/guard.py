"""The guard: whatever a controller does, the training run goes on."""

import logging

import numpy as np

from metactl.controllers.base import Controller
from metactl.signals import Codec

logger = logging.getLogger(__name__)

_LOSS_SIGNALS = ("signal/probe_level", "signal/train_level")


class Guard(Controller):
    """Wraps a controller: bounds its actions, and takes over when it fails or the loss leaves.

    - A non-finite action moves nothing.
    - When the loss rises more than `band` above its best since the knobs last did well, the knobs
      go back to where they were then; if it stays out for `patience` more control steps, to their
      defaults.
    - A controller that raises is switched off for good, with one warning.

    Args:
        controller: Who is guarded.
        band: Rise of the log loss over its best that is tolerated (0.2: by a factor of 1.22).
        patience: Control steps at the last good knobs before the defaults are tried.
        n_control_steps: Decisions per run.
    """

    def __init__(
        self,
        controller: Controller,
        *,
        band: float = 0.2,
        patience: int = 4,
        n_control_steps: int = 40,
    ) -> None:
        self.controller, self.band, self.patience = controller, band, patience
        self.share = 1 / n_control_steps
        self.failed = False

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        self.controller.begin(codec, n_runs)
        self._best = np.full(n_runs, np.inf)
        self._outside = np.zeros(n_runs, dtype=np.int64)
        self._good = codec.knobs.default_positions(n_runs)
        self.vetoes = np.zeros(n_runs, dtype=np.int64)

    def act(self, observation: np.ndarray) -> np.ndarray:
        wanted = self._ask(observation)
        finite = np.asarray(np.isfinite(wanted).all(axis=1))
        actions = np.where(finite[:, None], np.clip(wanted, -1, 1), 0.0)
        loss = self._loss(observation)
        self._outside = np.where(loss > self._best + self.band, self._outside + 1, 0)
        inside = np.asarray(self._outside == 0)
        improved = inside & (loss <= self._best)
        self._best = np.minimum(self._best, loss)
        self._good[improved] = self.codec.positions(observation)[improved]
        defaults = self.codec.knobs.default_positions(self.n_runs)
        home = np.where((self._outside > self.patience)[:, None], defaults, self._good)
        back = self.towards(home, observation, self.share)
        self.vetoes += ~inside | ~finite
        return np.where(inside[:, None], actions, back)

    def _ask(self, observation: np.ndarray) -> np.ndarray:
        if self.failed:
            return self.hold()
        expected = (self.n_runs, len(self.codec.knobs))
        try:
            wanted = np.asarray(self.controller.act(observation), dtype=np.float64)
            if wanted.shape != expected:
                raise ValueError(f"actions must have shape {expected}, got {wanted.shape}")
            return wanted
        except Exception:
            self.failed = True
            logger.warning("The controller failed and is off; the run goes on", exc_info=True)
            return self.hold()

    def _loss(self, observation: np.ndarray) -> np.ndarray:
        probed = self.codec.read(observation, "has/probe_loss") > 0
        probe, train = (self.codec.read(observation, name) for name in _LOSS_SIGNALS)
        return np.where(probed, probe, train)
