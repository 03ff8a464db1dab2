"""The bridge from a row of shards to Stable-Baselines3's `VecEnv`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from metactl.shards import ShardRow


class ShardVecEnv(VecEnv):
    """All runs of a row of shards as one SB3 vector environment.

    Seeds: shard k's run i of `reset` after `seed(s)` is the single environment with seed
    `s + k * n_envs + i`.

    Args:
        shards: The row; it stays the caller's to close.
    """

    def __init__(self, shards: ShardRow) -> None:
        self.shards = shards
        about = shards.describe()
        self._actions = np.zeros(0)
        self._seed = 0
        super().__init__(
            shards.n_shards * shards.n_envs, about["observation_space"], about["action_space"]
        )

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        self._seed = 0 if seed is None else seed
        return [self._seed + i for i in range(self.num_envs)]

    def reset(self) -> np.ndarray:
        seeds = [(self._seed + k * self.shards.n_envs,) for k in range(self.shards.n_shards)]
        return np.concatenate(self.shards.call("reset", seeds))

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        chunks = np.split(self._actions, self.shards.n_shards)
        answers = self.shards.call("step", [(chunk,) for chunk in chunks])
        observations, rewards, terminated, _, infos = zip(*answers, strict=True)
        per_run = [info for shard in infos for info in self._per_run(shard)]
        return (
            np.concatenate(observations),
            np.concatenate(rewards).astype(np.float32),
            np.concatenate(terminated),
            per_run,
        )

    def _per_run(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        """SB3 wants one dictionary per run, and the last observation of those that ended."""
        ended = infos.get("_final_obs", np.zeros(self.shards.n_envs, dtype=bool))
        measured = {key: value for key, value in infos.items() if not key.startswith("_")}
        final = measured.pop("final_obs", None)
        measured.pop("final_info", None)
        rows = []
        for i in range(self.shards.n_envs):
            row = {key: value[i] for key, value in measured.items()}
            if ended[i]:
                row["terminal_observation"] = final[i]
                row["TimeLimit.truncated"] = False
            rows.append(row)
        return rows

    def close(self) -> None:
        """Does nothing: the row of shards belongs to the caller."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise AttributeError(f"Runs in shards have no attribute {attr_name!r} to read")

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"Runs in shards have no attribute {attr_name!r} to set")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        raise AttributeError(f"Runs in shards have no method {method_name!r} to call")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs
