"""Training runs as Gymnasium environments: one run, or a population of them.

One control step: action -> knob values -> optimizer steps -> measurement -> observation, reward.
`ControlLoop` is that line for N runs; the two environments are its faces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from metactl.episodes import ControlConfig, Episode, draw_episode, horizon_seed
from metactl.knobs import FloatArray, KnobSet
from metactl.reward import ImprovementReward
from metactl.run import Measurement, TrainingRun
from metactl.signals import BOUND, INTERNAL, UNIVERSAL, Codec, History


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a control step returned; every array has a leading `[n_runs]`.

    `blocked`: what bounds took off the actions, summed over the knobs that can move.
    """

    observation: np.ndarray
    reward: FloatArray
    terminated: np.ndarray
    measurement: Measurement
    values: dict[str, FloatArray]
    blocked: FloatArray


class ControlLoop:
    """N training runs, their knobs, what was seen of them and what it was worth.

    Args:
        run: The plant.
        config: How it is controlled.
    """

    def __init__(self, run: TrainingRun, config: ControlConfig) -> None:
        self.run, self.config = run, config
        self.knobs = KnobSet(run.knobs)
        inside = tuple(signal for signal in INTERNAL if signal.name in run.internal_names)
        self.codec = Codec(self.knobs, (*UNIVERSAL, *inside))
        self.reward = ImprovementReward(scale=config.reward_scale)
        n, k = run.n_runs, len(self.knobs)
        self.history = History(n, config.n_control_steps + 1, run.internal_names)
        self.positions = self.knobs.default_positions(n)
        self.last_moves = np.zeros((n, k))
        self.available = np.ones((n, k))
        self.visible = np.ones((n, len(self.codec.groups)))
        self.control_step = np.zeros(n, dtype=np.int64)
        self.value = np.zeros(n)
        self.start_loss = np.zeros(n)
        self.run_seeds = np.zeros(n, dtype=np.int64)  # of the episodes begun last
        self._round_horizon()

    def _round_horizon(self) -> None:
        """Every control step takes the same number of optimizer steps."""
        n = self.config.n_control_steps
        if self.run.horizon < n:
            raise ValueError(
                f"horizon must be at least n_control_steps={n} optimizer steps, "
                f"got {self.run.horizon}"
            )
        self.optimizer_steps = round(self.run.horizon / n)
        self.run.horizon = n * self.optimizer_steps

    def draw_horizon(self, seed: int) -> None:
        """Draws a new horizon where the run varies it; all rows must be between runs."""
        self.run.draw_horizon(seed)
        self._round_horizon()

    def draw_episode(self, seed: int, index: int) -> Episode:
        """The `index`-th episode of an environment seed."""
        return draw_episode(self.config, self.knobs, self.codec.groups, seed, index)

    def reset(self, rows: Sequence[int], episodes: Sequence[Episode]) -> np.ndarray:
        """Starts episodes in some rows; returns the observations of all rows."""
        rows = list(rows)
        tasks = [self.run.sample_task(e.task_seed, self.config.split) for e in episodes]
        self.run.reset(rows, tasks, [episode.run_seed for episode in episodes])
        for row, episode in zip(rows, episodes, strict=True):
            self.positions[row] = episode.positions
            self.run_seeds[row] = episode.run_seed
            self.available[row] = episode.available
            self.visible[row] = [group not in episode.hidden for group in self.codec.groups]
        self.run.apply(self.knobs.values(self.positions))
        loss = self.run.evaluate("probe", rows)
        self.history.reset(rows, {"progress": np.zeros(len(rows)), "probe_loss": loss})
        self.start_loss[rows] = loss
        self.last_moves[rows] = 0
        self.control_step[rows] = 0
        self.value[rows] = 0
        return self.observe()

    def observe(self) -> np.ndarray:
        return self.codec.observe(
            self.history, self.positions, self.last_moves, self.available, self.visible
        )

    def step(self, action: np.ndarray) -> Step:
        """Moves the knobs, trains, and says what was seen and what it was worth."""
        share = 1 / self.config.n_control_steps
        action = np.nan_to_num(np.asarray(action, dtype=np.float64), nan=0.0)
        if action.shape != self.positions.shape:
            raise ValueError(
                f"actions must be of shape {self.positions.shape} (runs, knobs), got {action.shape}"
            )
        moved = self.knobs.move(self.positions, action, progress=share, available=self.available)
        self.last_moves = (moved - self.positions) / (self.knobs.max_moves * share)
        blocked = np.abs(np.clip(action, -1, 1) - self.last_moves) * self.available
        self.positions = moved
        values = self.knobs.values(moved)
        self.run.apply(values)
        measurement = self.run.advance(self.optimizer_steps)
        self.control_step += 1
        self.history.append(np.asarray(self.control_step * share, dtype=np.float64), measurement)
        value = self.reward.value(self.start_loss, measurement.judged_loss, measurement.diverged)
        reward, self.value = value - self.value, value
        return Step(
            observation=self.observe(),
            reward=reward,
            terminated=measurement.diverged | (self.control_step >= self.config.n_control_steps),
            measurement=measurement,
            values=values,
            blocked=blocked.sum(axis=1),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that determines how the episodes go on, arrays and tensors by name."""
        rows = list(range(self.run.n_runs))
        own = {name: getattr(self, name).copy() for name in self._own_arrays()}
        history = {f"history/{name}": col.copy() for name, col in self.history.columns.items()}
        run = {f"run/{name}": value for name, value in self.run.state_dict(rows).items()}
        return {**own, **history, **run, "horizon": np.array([self.run.horizon])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._own_arrays():
            setattr(self, name, np.array(state[name]))
        for name in self.history.columns:
            self.history.columns[name] = np.array(state[f"history/{name}"])
        self.run.horizon = int(state["horizon"][0])
        self._round_horizon()
        run = {key[4:]: value for key, value in state.items() if key.startswith("run/")}
        self.run.load_state_dict(list(range(self.run.n_runs)), run)

    @staticmethod
    def _own_arrays() -> tuple[str, ...]:
        episode = ("positions", "last_moves", "available", "visible")
        return (*episode, "control_step", "value", "start_loss")


def spaces_of(loop: ControlLoop) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    """What one run shows, and what moves its knobs."""
    observation = gymnasium.spaces.Box(-BOUND, BOUND, (len(loop.codec),), np.float32)
    action = gymnasium.spaces.Box(-1.0, 1.0, (len(loop.knobs),), np.float32)
    return observation, action


class RenderModeError(TypeError, ValueError):
    """A picture is asked for; Stable-Baselines3 goes on without one where this is a TypeError."""


def _require_no_picture(render_mode: str | None) -> None:
    if render_mode is not None:
        raise RenderModeError(
            f"render_mode must be None, got {render_mode!r}: TensorBoard shows training runs"
        )


def _shown(step: Step) -> dict[str, np.ndarray]:
    """What the runs showed, `[n_runs]` by name; never the test loss."""
    measured = {
        name: np.array(value, dtype=np.float64)
        for name, value in {**step.measurement.internal, **step.measurement.arrays()}.items()
        if value is not None and name != "diverged"
    }
    knobs = {f"knob/{name}": np.array(value, np.float64) for name, value in step.values.items()}
    own = {"blocked": step.blocked, "diverged": np.array(step.measurement.diverged, dtype=bool)}
    return {**measured, **knobs, **own}


class TrainingRunEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One training run as an environment.

    Observation: the universal signals of the training dynamics, availability flags, and three
    entries per knob; see `metactl.signals.Codec`, whose `names` list them. Box in [-10, 10].

    Action: per knob, the share of its largest move; Box in [-1, 1]; 0 moves nothing.

    Reward: improvement of the probe loss since the last control step, in units of
    `reward_scale`; see `metactl.reward`.

    An episode is one training run. It is terminated at the end of the horizon, or when the run
    diverges; it is never truncated.

    Args:
        run: A plant with `n_runs == 1`.
        config: How it is controlled.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self, run: TrainingRun, config: ControlConfig, render_mode: str | None = None
    ) -> None:
        if run.n_runs != 1:
            raise ValueError(f"TrainingRunEnv needs a run with n_runs=1, got {run.n_runs}")
        _require_no_picture(render_mode)
        self.loop = ControlLoop(run, config)
        self.observation_space, self.action_space = spaces_of(self.loop)
        self._seed: int | None = None
        self._episode = 0
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._seed, self._episode = seed, 0
        elif self._seed is None:  # nobody ever gave one
            self._seed = int(self.np_random.integers(2**31))
        self.loop.draw_horizon(horizon_seed(self._seed, self._episode))
        episode = self.loop.draw_episode(self._seed, self._episode)
        self._episode += 1
        self._over = False
        return self.loop.reset([0], [episode])[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._over:
            raise ResetNeeded("reset comes before step, and after a run that has ended")
        step = self.loop.step(np.asarray(action)[None])
        self._over = bool(step.terminated[0])
        return (
            step.observation[0].copy(),
            float(step.reward[0]),
            self._over,
            False,
            {name: value[0].item() for name, value in _shown(step).items()},
        )

    def close(self) -> None:
        self.loop.run.close()


class TrainingRunVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """A population of training runs as one vector environment; see `TrainingRunEnv`.

    A run that ends is replaced within the same step (`AutoresetMode.SAME_STEP`): its last
    observation is `infos["final_obs"]`. Row i of a reset with seed s is the single environment
    reset with seed s + i, but that all rows have the first one's horizon where it is drawn. What
    took the place of a run that diverged is truncated when the others come to their end, so that
    all begin together again.

    Args:
        run: The plant; its `n_runs` is `num_envs`.
        config: How it is controlled.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self, run: TrainingRun, config: ControlConfig, render_mode: str | None = None
    ) -> None:
        _require_no_picture(render_mode)
        self.loop = ControlLoop(run, config)
        self.num_envs = run.n_runs
        self.single_observation_space, self.single_action_space = spaces_of(self.loop)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._seeds: np.ndarray | None = None
        self._episodes = np.zeros(self.num_envs, dtype=np.int64)

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        seeds: list[int | None] = [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            seeds = [int(seed) + i for i in range(self.num_envs)]
        elif seed is not None:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"reset needs {self.num_envs} seeds, got {len(seeds)}")
        for each in seeds:
            if each is not None and not 0 <= each < 2**63:
                raise ValueError(f"a seed must be in [0, 2**63), got {each}")
        if isinstance(seed, int | np.integer):
            super().reset(seed=int(seed))
        if self._seeds is None:  # where nobody gives one
            self._seeds = int(self.np_random.integers(2**31)) + np.arange(self.num_envs)
        for i, each in enumerate(seeds):
            if each is not None:
                self._seeds[i], self._episodes[i] = each, 0
        return self._begin(list(range(self.num_envs))), {}

    def _begin(self, rows: list[int]) -> np.ndarray:
        """Starts the next episodes; a new horizon is drawn where all rows begin together."""
        assert self._seeds is not None
        if len(rows) == self.num_envs:
            self.loop.draw_horizon(horizon_seed(int(self._seeds[0]), int(self._episodes[0])))
        episodes = [
            self.loop.draw_episode(int(self._seeds[i]), int(self._episodes[i])) for i in rows
        ]
        self._episodes[rows] += 1
        return self.loop.reset(rows, episodes)

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if self._seeds is None:
            raise ResetNeeded("reset comes before step")
        step = self.loop.step(actions)
        infos: dict[str, Any] = {}
        for name, value in _shown(step).items():
            infos |= {name: value, f"_{name}": np.ones(self.num_envs, dtype=bool)}
        observation = step.observation
        over = self.loop.control_step >= self.loop.config.n_control_steps
        truncated = ~step.terminated & over.any()
        ends = step.terminated | truncated
        if over.any():  # all end, and go on with the same, as if none had diverged
            self._episodes[:] = self._episodes.max()
        ended = np.flatnonzero(ends).tolist()
        if ended:
            final = np.full(self.num_envs, None, dtype=object)
            for row in ended:
                final[row] = observation[row].copy()
            infos["final_obs"], infos["_final_obs"] = final, ends
            infos["final_info"] = {key: value for key, value in infos.items() if "final" not in key}
            infos["_final_info"] = ends.copy()
            observation = self._begin(ended)
        infos["episode_index"] = self._episodes - 1  # of the episodes that go on
        infos["_episode_index"] = np.ones(self.num_envs, dtype=bool)
        return observation, step.reward, step.terminated.copy(), truncated, infos

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.loop.state_dict(),
            "seeds": np.arange(self.num_envs) if self._seeds is None else self._seeds.copy(),
            "episodes": self._episodes.copy(),
            "data": np.frombuffer(self.loop.run.fingerprint().encode(), dtype=np.uint8).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: If the runs learn on other data than they did there.
        """
        told = bytes(np.asarray(state.get("data", ()), dtype=np.uint8)).decode()
        if told and told != (now := self.loop.run.fingerprint()):
            raise ValueError(
                f"the data that runs learn on has changed: its SHA-256 was {told[:12]}..., and is "
                f"{now[:12]}... now"
            )
        self._seeds, self._episodes = np.array(state["seeds"]), np.array(state["episodes"])
        self.loop.load_state_dict(state)

    def close_extras(self, **kwargs: Any) -> None:
        self.loop.run.close()
