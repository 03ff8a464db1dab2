"""The learned controller: a policy file at work on whatever run it is given."""

import numpy as np

from metactl.controllers.base import BaseController
from metactl.policy import Policy
from metactl.signals import Codec


class Learned(BaseController):
    """Acts by a policy; knobs and signals are matched by name.

    Knobs that the policy does not know are left alone; what the policy expects and the run does
    not have is observed as absent. Moves keep the size that they had in training, also where a
    run's knob has another largest move.

    Args:
        policy: The policy.
    """

    band = 0.06  # chosen on tasks of meta-training (docs/sweep_study.md)

    def __init__(self, policy: Policy) -> None:
        self.policy, self.set_points = policy, policy.card.set_points

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        known = [knob.name for knob in self.policy.card.knobs]
        self._pairs = [
            (i, known.index(name)) for i, name in enumerate(codec.knobs.names) if name in known
        ]
        if not self._pairs:
            raise ValueError(
                f"The policy and the run have no knob in common: the policy moves "
                f"{', '.join(known)}; the run has {', '.join(codec.knobs.names)}"
            )
        theirs, ours = self.policy.card.knobs, codec.knobs.knobs
        self._scale = {o: theirs[t].max_move / ours[o].max_move for o, t in self._pairs}
        last_moves = {f"knob/{ours[o].name}/last_move": o for o, _ in self._pairs}
        names = list(self.policy.card.observations)
        self._entries = [
            (
                i,
                codec.names.index(name),
                self._scale[last_moves[name]] if name in last_moves else 1.0,
            )
            for i, name in enumerate(names)
            if name in codec.names
        ]

    def act(self, observation: np.ndarray) -> np.ndarray:
        seen = np.zeros((len(observation), len(self.policy.card.observations)))
        for theirs, ours, scale in self._entries:
            seen[:, theirs] = observation[:, ours] / scale
        decided = self.policy.act(seen)
        actions = self.hold()
        for ours, theirs in self._pairs:
            actions[:, ours] = self._scale[ours] * decided[:, theirs]
        return np.clip(actions, -1.0, 1.0)
