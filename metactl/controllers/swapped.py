"""A controller that reads some signals of another run: what are they worth to it?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metactl.controllers.base import BaseController
from metactl.signals import Codec


class WithSignalsOf(BaseController):
    """Shows a controller a recorded run's values of some entries, the run's own of all others.

    Args:
        controller: Who decides.
        entries: Names of the entries that are replaced.
        recorded: Observations of the other run, before each of its decisions,
            `[n_control_steps or more, n_observations]`, put together by a codec like this run's.
    """

    memory = ("_made",)

    def __init__(
        self, controller: BaseController, entries: Sequence[str], recorded: np.ndarray
    ) -> None:
        self.controller, self.entries, self.recorded = controller, tuple(entries), recorded
        self.band, self.set_points = controller.band, controller.set_points

    def keep_pace(self, n_control_steps: int) -> None:
        super().keep_pace(n_control_steps)
        self.controller.keep_pace(n_control_steps)

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        self.controller.begin(codec, n_runs)
        self._columns = [codec.names.index(name) for name in self.entries]
        self._made = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "controller": self.controller.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.controller.load_state_dict(state["controller"])

    def act(self, observation: np.ndarray) -> np.ndarray:
        seen = np.array(observation)
        seen[:, self._columns] = self.recorded[self._made, self._columns]
        self._made += 1
        return self.controller.act(seen)
