"""The guard: whatever a controller does, the training run goes on."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from metactl.arrays import to_json
from metactl.controllers.base import BaseController
from metactl.homeostasis import BALANCE
from metactl.signals import BOUND, Codec

logger = logging.getLogger(__name__)
_NEITHER = 1e-6  # above the best log loss: no improvement, nor out of the band


class Guard(BaseController):
    """Wraps a controller: bounds its actions, and takes over when it fails or the run leaves.

    - A non-finite action moves nothing.
    - When the loss rises more than `band` above its best since the knobs last did well, or (with
      the loss at no new best) the drive of `metactl.homeostasis` to `drive_band` times what it was
      then, where the controller has set-points, the knobs go back to where they were; if it stays
      out for `patience` more control steps, to their defaults.
    - When the loss has fallen by as much again from the worst that it was since, the run recovers
      from whatever threw it: the controller acts again, and its best counts from there.
    - A controller that raises is switched off for good, with one warning.

    Args:
        controller: Who is guarded.
        band: Rise of the log loss over its best that is tolerated, and fall from its worst that is
            a recovery; by default the controller's.
        drive_band: Rise of the drive that is tolerated, as a factor; in balance it counts as 1.
        patience: Control steps at the last good knobs before the defaults are tried.
        strict: Let the controller's exceptions through.

    Attributes:
        reasons: Per run, why the last action was not the controller's; empty where it was.
    """

    memory = ("_best", "_worst", "_calm", "_outside", "_probed", "_good", "vetoes", "failed")

    def __init__(
        self,
        controller: BaseController,
        *,
        band: float | None = None,
        drive_band: float = 10.0,
        patience: int = 4,
        strict: bool = False,
    ) -> None:
        self.controller, self.patience = controller, patience
        self.band = controller.band if band is None else band
        self.drive_band, self.strict = drive_band, strict
        self.failed = False

    def keep_pace(self, n_control_steps: int) -> None:
        super().keep_pace(n_control_steps)
        self.controller.keep_pace(n_control_steps)

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        self.controller.begin(codec, n_runs)
        self._best = np.full(n_runs, np.inf)
        self._worst = np.full(n_runs, -np.inf)
        self._calm = np.full(n_runs, np.inf)
        self._outside = np.zeros(n_runs, dtype=np.int64)
        self._probed = np.zeros(n_runs, dtype=bool)
        self._good = codec.knobs.default_positions(n_runs)
        self.vetoes = np.zeros(n_runs, dtype=np.int64)
        self.reasons = [""] * n_runs

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "controller": self.controller.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        newer = {name: to_json(getattr(self, name)) for name in ("_calm", "_worst", "_probed")}
        good = np.asarray(state["_good"], dtype=np.float64)
        if not ((good >= 0) & (good <= 1)).all():
            raise ValueError(f"the last good positions must be in [0, 1], got {good.tolist()}")
        super().load_state_dict({**newer, **state})  # older states lack them
        self.controller.load_state_dict(state["controller"])

    def act(self, observation: np.ndarray, diverged: np.ndarray | None = None) -> np.ndarray:
        """Actions that are safe.

        Args:
            observation: `[n_runs, n_observations]`.
            diverged: `[n_runs]`, where a loss was not finite, which no observation can say.
        """
        wanted = self._ask(observation)
        finite = np.asarray(np.isfinite(wanted).all(axis=1))
        actions = np.where(finite[:, None], np.clip(wanted, -1, 1), 0.0)
        bad = np.zeros(self.n_runs, dtype=bool) if diverged is None else diverged
        self._forget_other_losses(observation, bad)
        loss = np.where(bad, np.inf, self._judged(observation))
        recovers = (loss > self._best) & (loss < self._worst - self.band)
        self._best = np.where(recovers, loss, self._best)
        improved = np.isfinite(loss) & (loss <= self._best)
        drive = self._drive(observation)
        upset = ~improved & (drive > self.drive_band * self._calm)
        out = ~np.isfinite(loss) | (loss > self._best + self.band) | upset
        self._outside = np.where(out, self._outside + 1, 0)
        highest = np.maximum(self._worst, np.where(np.isfinite(loss), loss, -np.inf))
        self._worst = np.where(out, highest, -np.inf)
        inside = ~out
        self._best = np.fmin(self._best, loss)
        self._good[improved] = self.codec.positions(observation)[improved]
        vital = improved & self.begun(observation) & ~recovers
        self._calm = np.where(vital, np.maximum(drive, BALANCE), self._calm)
        defaults = self.codec.knobs.default_positions(self.n_runs)
        lost = self._outside > self.patience
        home = np.where(lost[:, None], defaults, self._good)
        back = self.towards(home, observation)
        self.vetoes += ~inside | ~finite
        with np.errstate(invalid="ignore"):
            rise = loss - self._best
        self.reasons = [
            self._reason(*row)
            for row in zip(inside, finite, lost, rise, np.where(upset, drive, np.nan), strict=True)
        ]
        return np.where(inside[:, None], actions, back)

    def _judged(self, observation: np.ndarray) -> np.ndarray:
        """The log loss; one of exactly 0 is a failed report, neither better nor worse."""
        loss = self.loss(observation)
        neither = np.where(np.isfinite(self._best), self._best + _NEITHER, 0.0)
        return np.where(loss <= -BOUND, neither, loss)

    def _forget_other_losses(self, observation: np.ndarray, diverged: np.ndarray) -> None:
        """What was the best on the probe says nothing of training losses, nor the reverse.

        A probe whose loss is not finite is still there.
        """
        probed = self.codec.read(observation, "has/probe_loss") > 0
        probed = np.where(diverged, self._probed, probed)
        other = probed != self._probed
        self._best = np.where(other, np.inf, self._best)
        self._worst = np.where(other, -np.inf, self._worst)
        self._outside = np.where(other, 0, self._outside)
        self._probed = probed

    def _reason(self, inside: bool, finite: bool, lost: bool, rise: float, drive: float) -> str:
        if not inside:
            home = "the defaults" if lost else "the last good knobs"
            bad = f"the loss is {np.expm1(rise):.0%} above its best"
            if not np.isfinite(rise):
                bad = "the loss is not finite"
            elif rise <= self.band:
                bad = f"the drive away from balance is {drive:.3g}"
            return f"{bad}: back to {home}"
        if not finite:
            return "the controller's action is not finite: nothing moves"
        return "the controller failed and is off" if self.failed else ""

    def _ask(self, observation: np.ndarray) -> np.ndarray:
        if self.failed:
            return self.hold()
        expected = (self.n_runs, len(self.codec.knobs))
        try:
            wanted = np.asarray(self.controller.act(observation.copy()), dtype=np.float64)
            if wanted.shape != expected:
                raise ValueError(f"actions must have shape {expected}, got {wanted.shape}")
            return wanted
        except (Exception, SystemExit):  # a controller ends no training
            if self.strict:
                raise
            self.failed = True
            logger.warning("The controller failed and is off; the run goes on", exc_info=True)
            return self.hold()

    def _drive(self, observation: np.ndarray) -> np.ndarray:
        points = self.controller.set_points
        if points is None:
            return np.zeros(self.n_runs)
        return points.drive(observation, self.codec.names)
