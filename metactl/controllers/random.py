"""Random moves: what moving without looking is worth."""

import numpy as np

from metactl.controllers.base import Controller
from metactl.signals import Codec


class RandomMoves(Controller):
    """A random walk of every knob.

    Args:
        seed: Determines the moves.
        scale: Standard deviation of an action, as a share of the largest move.
    """

    def __init__(self, seed: int, scale: float = 0.5) -> None:
        self.seed, self.scale = seed, scale

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        self._rng = np.random.default_rng(self.seed)

    def act(self, observation: np.ndarray) -> np.ndarray:
        moves = self._rng.normal(0, self.scale, (self.n_runs, len(self.codec.knobs)))
        return np.clip(moves, -1, 1)
