"""The exact state of PPO training: with it, a resumed training is the same training.

Stable-Baselines3's own files leave out the environments, the last observation and the random
generators, and are pickles. Here all of it is tensors and JSON values.
"""

import random
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from torch import Tensor

from metactl.arrays import to_json
from metactl.checkpoint import from_tensors, to_tensors
from metactl.errors import WorkerDied, is_of_size
from metactl.rundir import RunDirectoryError, versions
from metactl.shards import ShardRow
from metactl.vec_env import ShardVecEnv

_SDE = ("exploration_mat", "exploration_matrices")  # gSDE's noise, drawn once per rollout


def snapshot(
    model: PPO, shards: ShardRow, scales: list[float]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that determines how training goes on."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.policy.state_dict().items():
        tensors[f"policy/{name}"] = tensor
    moments = model.policy.optimizer.state_dict()["state"]
    for index, state in moments.items():
        for name, tensor in state.items():
            tensors[f"optimizer/{index}/{name}"] = tensor
    for k, state in enumerate(shards.call_all("state_dict")):
        tensors |= {f"shard/{k}/{name}": value for name, value in to_tensors(state).items()}
    generator: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = generator
    python_version, python_state, python_gauss = random.getstate()
    assert model._last_obs is not None
    assert isinstance(model.env, ShardVecEnv)
    for name, value in model.env.state_dict().items():
        tensors[f"env/{name}"] = torch.from_numpy(value)
    tensors |= {
        "last_obs": torch.from_numpy(np.asarray(model._last_obs)),
        "last_episode_starts": torch.from_numpy(model._last_episode_starts),
        "rng/torch": torch.get_rng_state(),
        "rng/numpy": torch.from_numpy(keys.astype(np.int64)),
        "rng/python": torch.tensor(python_state),
    }
    if model.use_sde:
        tensors |= {f"exploration/{name}": getattr(model.policy.action_dist, name) for name in _SDE}
    scalars = {
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "reward_scales": scales,
        "reward_unit": model.env.reward_unit,
        "pending": {
            name: to_json(float(value))
            for name, value in model.logger.name_to_value.items()
            if isinstance(value, int | float | np.floating)
        },
        "numpy": [position, has_gauss, cached],
        "python": [python_version, python_gauss],
        "versions": versions(),
    }
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, scalars


def restore(
    model: PPO, shards: ShardRow, tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> None:
    """Puts a snapshot in force.

    Raises:
        RunDirectoryError: If it is not of a training like this one.
    """
    try:
        _restore(model, shards, tensors, scalars)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RunDirectoryError | WorkerDied) or is_of_size(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise RunDirectoryError(f"The checkpoint does not fit this training: {reason}") from error


def n_shards_of(tensors: dict[str, Tensor]) -> int:
    """Of how many shards a snapshot is."""
    return len({name.split("/")[1] for name in tensors if name.startswith("shard/")})


def _restore(
    model: PPO, shards: ShardRow, tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> None:
    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        model.policy.load_state_dict(under("policy/"))
    except RuntimeError as error:
        raise RunDirectoryError(
            f"The checkpoint has other networks than this training: it was begun with other "
            f"settings, or by another version (metactl {scalars['versions']['metactl']})"
        ) from error
    optimizer = model.policy.optimizer.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in under("optimizer/").items():
        index, _, name = key.partition("/")
        moments.setdefault(int(index), {})[name] = tensor
    model.policy.optimizer.load_state_dict({**optimizer, "state": moments})
    states = [(from_tensors(under(f"shard/{k}/")),) for k in range(shards.n_shards)]
    n_saved = n_shards_of(tensors)
    if n_saved != shards.n_shards:
        raise RunDirectoryError(
            f"The checkpoint has {n_saved} shards, this training {shards.n_shards}; resume with "
            f"the number of workers that it was trained with"
        )
    shards.call("load_state_dict", states)
    assert isinstance(model.env, ShardVecEnv)
    model.env.load_state_dict({name: value.numpy() for name, value in under("env/").items()})
    if missing := {"reward_scales", "reward_unit", "pending"} - set(scalars):
        raise KeyError(f"no {', '.join(sorted(missing))}")
    model.num_timesteps = scalars["num_timesteps"]
    model._n_updates = scalars["n_updates"]
    model._last_obs = tensors["last_obs"].numpy().copy()
    model._last_episode_starts = tensors["last_episode_starts"].numpy().copy()
    keys = tensors["rng/numpy"].numpy().astype(np.uint32)
    position, has_gauss, cached = scalars["numpy"]
    if not 0 <= position <= len(keys):  # NumPy would read past its end
        raise ValueError(f"NumPy's generator is at {position} of {len(keys)}")
    np.random.set_state(("MT19937", keys, position, has_gauss, cached))
    version, gauss = scalars["python"]
    random.setstate((version, tuple(tensors["rng/python"].tolist()), gauss))


def restore_exploration(model: PPO, tensors: dict[str, Tensor]) -> None:
    """Undoes what Stable-Baselines3 draws before the first rollout of a resumed training."""
    if model.use_sde:
        for name in _SDE:
            setattr(model.policy.action_dist, name, tensors[f"exploration/{name}"])
    torch.set_rng_state(tensors["rng/torch"])
