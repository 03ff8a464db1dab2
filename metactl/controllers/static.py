"""Knobs that stay where they are: a run without a controller."""

import numpy as np

from metactl.controllers.base import BaseController


class Static(BaseController):
    """Moves nothing; the setting is where the run begins."""

    def act(self, observation: np.ndarray) -> np.ndarray:
        return self.hold()
