"""Random moves: what moving without looking is worth."""

import numpy as np

from metactl.controllers.base import BaseController
from metactl.signals import Codec


class RandomMoves(BaseController):
    """A random walk of every knob.

    Args:
        seed: Determines the moves.
        scale: Standard deviation of an action, as a share of the largest move.
    """

    memory = ("_made",)

    def __init__(self, seed: int, scale: float = 0.5) -> None:
        self.seed, self.scale = seed, scale

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        self._made = 0

    def act(self, observation: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self._made])  # so that a resumed run goes on alike
        self._made += 1
        moves = rng.normal(0, self.scale, (self.n_runs, len(self.codec.knobs)))
        return np.clip(moves, -1, 1)
