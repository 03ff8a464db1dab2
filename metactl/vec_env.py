"""The bridge from a row of shards to Stable-Baselines3's `VecEnv`."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from metactl.shards import ShardRow


def check_pairs(n_envs: int, paired_runs: int) -> None:
    """Refuses pairs that would lie across shards."""
    if n_envs % paired_runs:
        raise ValueError(f"paired_runs must divide the {n_envs} runs of a shard, got {paired_runs}")


class ShardVecEnv(VecEnv):
    """All runs of a row of shards as one SB3 vector environment.

    Seeds: run i of the row, after `seed(s)`, is the single environment with seed
    `s + i // paired_runs`. So `paired_runs` neighbours live through the same episodes (task,
    weights, batches, noise, initial knobs) and differ by their actions alone, and the reward of
    each is taken relative to the mean of the others: what the task gives to all of them says
    nothing about an action, and without it far fewer runs are needed to learn. The baseline does
    not depend on a run's own actions, so the best policy stays the best (the leave-one-out
    baseline of arXiv 2402.14740).

    Observations: the run's own `n_seen` entries; with pairs, then what they differ by from the
    mean of the other runs at the same moment, for a critic that has to say what a run will gain
    over them.

    Args:
        shards: The row; it stays the caller's to close.
        paired_runs: Runs per group; 1 gives plain rewards.
        bound_cost: Taken off the reward for every largest move that a knob's bound blocks.

    Attributes:
        reward_unit: Rewards are divided by it. Differences between paired runs are small beside
            the improvement that all share; in a unit of their own size a critic learns them.
    """

    def __init__(self, shards: ShardRow, paired_runs: int = 1, bound_cost: float = 0.0) -> None:
        check_pairs(shards.n_envs, paired_runs)
        self.shards, self.paired_runs, self.bound_cost = shards, paired_runs, bound_cost
        self.reward_unit = 1.0
        about = shards.describe()
        space = about.observation_space
        self.n_seen = space.shape[0]
        if paired_runs > 1:
            apart = space.high - space.low
            low, high = np.append(space.low, -apart), np.append(space.high, apart)
            space = gymnasium.spaces.Box(low, high, dtype=space.dtype)
        self._actions = np.zeros(0)
        self._seed = 0
        self._age = np.zeros((2, 0), dtype=np.int64)
        self._returns = np.zeros(0)
        super().__init__(shards.n_shards * shards.n_envs, space, about.action_space)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        self._seed = 0 if seed is None else seed
        return self._row_seeds()

    def _row_seeds(self) -> list[int]:
        return [self._seed + i // self.paired_runs for i in range(self.num_envs)]

    def reset(self) -> np.ndarray:
        seeds = self._row_seeds()
        self._age = np.zeros((2, self.num_envs), dtype=np.int64)  # episode, control step
        self._returns = np.zeros(self.num_envs)
        n = self.shards.n_envs
        chunks = [(seeds[k * n : (k + 1) * n],) for k in range(self.shards.n_shards)]
        return self._beside_pairs(np.concatenate(self.shards.call("reset", chunks)))

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        chunks = np.split(self._actions, self.shards.n_shards)
        answers = self.shards.call("step", [(chunk,) for chunk in chunks])
        observations, rewards, terminated, truncated, infos = zip(*answers, strict=True)
        per_run = [
            info
            for shard, cut in zip(infos, truncated, strict=True)
            for info in self._per_run(shard, cut)
        ]
        reward = np.concatenate(rewards)
        done = np.concatenate(terminated) | np.concatenate(truncated)
        self._returns += reward
        for info, own, so_far in zip(per_run, reward, self._returns, strict=True):
            info |= {"own_reward": float(own), "own_return": float(so_far)}
        relative = self._apart(reward[:, None])[:, 0] / self.reward_unit
        relative -= self.bound_cost * np.array([info["blocked"] for info in per_run])
        self._age[0] = [info["episode_index"] for info in per_run]
        self._age[1] = np.where(done, 0, self._age[1] + 1)
        self._returns[done] = 0
        seen = self._beside_pairs(np.concatenate(observations))
        return seen, relative.astype(np.float32), done, per_run

    def _beside_pairs(self, observation: np.ndarray) -> np.ndarray:
        """Observations as the critic sees them, `[num_envs, n_seen or 2 n_seen]`."""
        if self.paired_runs == 1:
            return observation
        apart = self._apart(observation).astype(observation.dtype)
        return np.concatenate([observation, apart], axis=1)

    def _apart(self, values: np.ndarray) -> np.ndarray:
        """`[num_envs, n]` minus the mean of the other runs at the same moment of the same episode.

        As they are without pairs; 0 for a run whose pairs are all elsewhere.
        """
        if self.paired_runs == 1:
            return values
        groups = values.reshape(-1, self.paired_runs, values.shape[1])
        age = self._age.reshape(2, -1, self.paired_runs)
        twins = (age[:, :, :, None] == age[:, :, None, :]).all(axis=0)
        twins &= ~np.eye(self.paired_runs, dtype=bool)
        n_twins = twins.sum(axis=2)[:, :, None]
        apart = (n_twins > 0) * (groups - twins @ groups / np.maximum(n_twins, 1))
        return apart.reshape(values.shape)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"age": self._age.copy(), "returns": self._returns.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._age, self._returns = np.array(state["age"]), np.array(state["returns"])

    def _per_run(self, infos: dict[str, Any], truncated: np.ndarray) -> list[dict[str, Any]]:
        """SB3 wants one dictionary per run, and the last observation of those that ended."""
        ended = infos.get("_final_obs", np.zeros(self.shards.n_envs, dtype=bool))
        others = ("final_obs", "final_info")
        names = [key for key in infos if not key.startswith("_") and key not in others]
        columns = [infos[name].tolist() for name in names]
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        for i in np.flatnonzero(ended):
            last = infos["final_obs"][i]
            beside = np.zeros_like(last)[: self.n_seen * (self.paired_runs > 1)]  # nobody is there
            rows[i]["terminal_observation"] = np.concatenate([last, beside])
            rows[i]["TimeLimit.truncated"] = bool(truncated[i])
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
