"""Random moves: what moving without looking is worth."""

import numpy as np

from metactl.controllers.base import Controller


class RandomMoves(Controller):
    """A random walk of every knob.

    Args:
        seed: Determines the moves.
        scale: Standard deviation of an action, as a share of the largest move.
    """

    def __init__(self, seed: int, scale: float = 0.5) -> None:
        self.seed, self.scale = seed, scale
        self._rng = np.random.default_rng(seed)

    def act(self, observation: np.ndarray) -> np.ndarray:
        moves = self._rng.normal(0, self.scale, (self.n_runs, len(self.codec.knobs)))
        return np.clip(moves, -1, 1)
