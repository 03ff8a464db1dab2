"""The base of all controllers."""

import abc

import numpy as np

from metactl.arrays import Remembers
from metactl.episodes import ControlConfig
from metactl.homeostasis import SetPoints
from metactl.signals import Codec


class BaseController(Remembers, abc.ABC):
    """Turns observations into actions, for any number of runs at once.

    A controller sees what every controller sees: the observation of `metactl.signals.Codec`. It
    may remember things per run; `begin` clears them, and `memory` names the attributes that hold
    them. A state is loaded after `begin`.

    Attributes:
        band: How far the log loss may rise over its best before the guard takes over (0.2: by a
            factor of 1.22).
        set_points: Of healthy runs, where it knows them: by these the guard sees a run leave its
            balance before the loss does.
        share: Fraction of a run that a control step covers.
    """

    band: float = 0.2
    set_points: SetPoints | None = None
    share: float = 1 / ControlConfig.n_control_steps
    codec: Codec
    n_runs: int

    def keep_pace(self, n_control_steps: int) -> None:
        """Is told, before `begin`, how many control steps the runs have; 40 if nobody tells."""
        self.share = 1 / n_control_steps

    def begin(self, codec: Codec, n_runs: int) -> None:
        """Prepares for `n_runs` new runs whose observations `codec` puts together."""
        self.codec, self.n_runs = codec, n_runs

    @abc.abstractmethod
    def act(self, observation: np.ndarray) -> np.ndarray:
        """Actions `[n_runs, n_knobs]` in [-1, 1] from observations `[n_runs, n_observations]`."""

    def loss(self, observation: np.ndarray) -> np.ndarray:
        """log(loss / its starting value) of each run, on the probe where it has one."""
        probe, train = (
            self.codec.read(observation, f"signal/{split}_level") for split in ("probe", "train")
        )
        return np.where(self.codec.read(observation, "has/probe_loss") > 0, probe, train)

    def begun(self, observation: np.ndarray) -> np.ndarray:
        """Where something has been measured since the start, `[n_runs]`."""
        return np.asarray(self.codec.read(observation, "signal/progress") > -1)

    def hold(self) -> np.ndarray:
        """The actions that move nothing."""
        return np.zeros((self.n_runs, len(self.codec.knobs)))

    def only(self, knob: str, moves: np.ndarray) -> np.ndarray:
        """The actions that move one knob by `moves`, `[n_runs]`; none, where a run lacks it."""
        actions = self.hold()
        if knob in self.codec.knobs.names:
            actions[:, self.codec.knobs.names.index(knob)] = moves
        return actions

    def towards(self, target: np.ndarray, observation: np.ndarray) -> np.ndarray:
        """The actions that bring knobs to `target` positions, as far as one step reaches.

        Args:
            target: `[n_runs, n_knobs]` in [0, 1].
            observation: Where the knobs are now.
        """
        largest = self.codec.knobs.max_moves * self.share
        return np.clip((target - self.codec.positions(observation)) / largest, -1, 1)
