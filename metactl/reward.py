"""The reward: improvement on the probe, in units of what a default run improves."""

from dataclasses import dataclass

import numpy as np

from metactl.knobs import FloatArray


@dataclass(frozen=True, kw_only=True)
class ImprovementReward:
    """r_t = value(loss_t) - value(loss_{t-1}), value = (starting loss - loss) / scale.

    So the rewards of an episode add up to its total improvement, whatever happened in between:
    oscillating earns nothing. A value never falls below `floor`, and a run that diverges ends
    with a total of `floor - penalty`, below every run that survives: dying early never pays.
    A loss of exactly 0 is a failed report (some trainers log it after a NaN), no improvement.

    Args:
        scale: Typical improvement of a run under default knobs, in nats.
        floor: Smallest value of a run that survives.
        penalty: How far below the floor a diverged run ends.
    """

    scale: float = 1.0
    floor: float = -2.0
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"reward scale must be above 0 nats, got {self.scale}")

    def value(self, start: FloatArray, loss: FloatArray, diverged: np.ndarray) -> FloatArray:
        """Value of runs that began at `start` and are at `loss` (nats), `[n_runs]`."""
        with np.errstate(invalid="ignore"):
            improvement = (start - loss) / self.scale
        value = np.maximum(np.where(loss == 0, 0.0, improvement), self.floor)
        lost = diverged | ~np.isfinite(loss) | ~np.isfinite(start)
        return np.where(lost, self.floor - self.penalty, value)
