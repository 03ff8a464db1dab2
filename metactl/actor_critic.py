"""The networks that PPO trains: an actor that sees one run, a critic that also sees its pairs."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import Tensor, nn

from metactl.errors import unknown_name
from metactl.knobs import FloatArray
from metactl.policy import CLIP
from metactl.signals import INTERNAL, UNIVERSAL, is_flag


class Normaliser(BaseFeaturesExtractor):
    """Standardises observations with statistics that are estimated once, then frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self, observation_space: gymnasium.Space[Any]) -> None:
        assert observation_space.shape is not None
        size = observation_space.shape[0]
        super().__init__(observation_space, features_dim=size)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def forward(self, observations: Tensor) -> Tensor:
        return ((observations - self.mean) / self.std).clamp(-CLIP, CLIP)


def standardisation(seen: np.ndarray, names: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """Mean and deviation of every entry of observations `[n, n_entries]`.

    Flags are 0.5 and 0.5, so that 0 and 1 lie at -1 and 1: a flag that happens to be constant in
    the calibration would put a run with the other value far outside of all that training saw.

    Args:
        seen: Observations; entries beyond the names are differences to paired runs.
        names: Of the entries that a policy sees, which come first.
    """
    flags = np.zeros(seen.shape[1], dtype=bool)
    flags[: len(names)] = [is_flag(name) for name in names]
    mean, std = seen.mean(axis=0, dtype=np.float64), seen.std(axis=0, dtype=np.float64)
    return np.where(flags, 0.5, mean), np.where(flags, 0.5, np.where(std > 1e-3, std, 1.0))


def entries_of(signals: Sequence[str] | None, names: Sequence[str]) -> NDArray[np.bool_]:
    """Which entries of an observation somebody sees who is shown some signals, and the knobs.

    Args:
        signals: By name; `None` for all.
        names: Of the entries.

    Raises:
        ValueError: For a signal that the observation does not have.
    """
    if signals is None:
        return np.ones(len(names), dtype=bool)
    known = [name.removeprefix("signal/") for name in names if name.startswith("signal/")]
    for signal in signals:
        if signal not in known:
            raise ValueError(unknown_name("signal", signal, known))
    shown = {f"signal/{signal}" for signal in signals}
    shown |= {f"has/{s.group}" for s in (*UNIVERSAL, *INTERNAL) if s.name in signals}
    return np.array([name in shown or name.startswith("knob/") for name in names])


class AsymmetricPolicy(ActorCriticPolicy):
    """An actor that sees some of the features; the critic sees all.

    The critic is gone when a policy is used, so it may see what no controller can (arXiv
    1710.06542): where paired runs are. What a run gains over its pairs depends on that.

    Args:
        seen: Of the first entries, those of the run itself: whether the actor sees each.
        hidden: Units of the hidden layers.
    """

    def __init__(
        self, *args: Any, seen: NDArray[np.bool_], hidden: Sequence[int], **kwargs: Any
    ) -> None:
        self._seen, self._hidden = seen, tuple(hidden)
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _Networks(  # type: ignore[assignment]
            self._seen, self.features_dim, self._hidden
        )


class _Networks(nn.Module):
    """The hidden layers of actor and critic, under the names that Stable-Baselines3 asks for."""

    seen: Tensor

    def __init__(self, seen: NDArray[np.bool_], n_all: int, hidden: Sequence[int]) -> None:
        super().__init__()
        n_seen = len(seen)
        self.register_buffer("seen", torch.from_numpy(seen).float(), persistent=False)
        self.latent_dim_pi, self.latent_dim_vf = (n_seen, *hidden)[-1], (n_all, *hidden)[-1]
        layers = [create_mlp(n_in, -1, list(hidden), nn.Tanh) for n_in in (n_seen, n_all)]
        self.policy_net, self.value_net = (nn.Sequential(*modules) for modules in layers)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        latent: Tensor = self.policy_net(features[:, : len(self.seen)] * self.seen)
        return latent

    def forward_critic(self, features: Tensor) -> Tensor:
        latent: Tensor = self.value_net(features)
        return latent
