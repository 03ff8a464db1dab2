"""A row of shards: populations of training runs, in this process or in worker processes.

A shard is a vector environment of N runs. Small runs gain little from threads inside one tensor
program, so on a CPU each core gets its own worker process with one thread.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from metactl.config import ConfigError
from metactl.env import TrainingRunVectorEnv, spaces_of
from metactl.knobs import FloatArray, KnobSet
from metactl.reward import ImprovementReward
from metactl.rollout import Between, PlannedRun, PlayedRun, play
from metactl.worker import Build, ProcessWorker, Worker

_OWN_PACKAGES = ("envs", "models")
_OF_GYMNASIUM = {"id", "num_envs", "vectorization_mode", "vector_kwargs", "wrappers"}


def make_population(env_id: str, n_envs: int, options: Mapping[str, Any]) -> TrainingRunVectorEnv:
    """A vector environment by id, with a clear word when Python finds the wrong package."""
    require_own_package(env_id.partition(":")[0])
    if taken := sorted(set(options) & _OF_GYMNASIUM):
        raise ConfigError(f"{env_id}: unknown option {taken[0]!r}")
    try:
        env = gymnasium.make_vec(env_id, num_envs=n_envs, **options).unwrapped
    except gymnasium.error.Error as error:
        raise ConfigError(f"No environment {env_id!r}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"{env_id}: {error}") from error
    if not isinstance(env, TrainingRunVectorEnv):
        raise ValueError(
            f"{env_id} is a {type(env).__name__}; metactl needs a TrainingRunVectorEnv "
            f"(register a vector_entry_point that returns one)"
        )
    return env


def require_own_package(module: str) -> None:
    """Refuses another package that took the name of one of ours; says what to do about it."""
    if module not in _OWN_PACKAGES:
        return
    own = Path(__file__).resolve().parent.parent / module
    spec = find_spec(module)
    origin = spec.origin if spec is not None else None
    found = Path(origin).resolve().parent if origin else None
    if found != own:
        raise ImportError(
            f"metactl needs its own package {module!r} at {own}, but Python finds "
            f"{found or 'a folder without __init__.py'} first. Rename that folder, run from "
            f"another directory, or put {own.parent} before it on sys.path."
        )


@dataclass(frozen=True, kw_only=True)
class Description:
    """What must be known of runs before any is played.

    Args:
        observation_space: Of one run.
        action_space: Of one run.
        observation_names: Of the entries of an observation, in order.
        knobs: Of the runs.
        n_control_steps: Decisions per run.
        horizon: Optimizer steps of a run.
    """

    observation_space: gymnasium.spaces.Box
    action_space: gymnasium.spaces.Box
    observation_names: tuple[str, ...]
    knobs: KnobSet
    n_control_steps: int
    horizon: int


class Shard:
    """One population; what a row of shards can ask of it.

    Args:
        env_id: Gymnasium id, with the module prefix.
        n_envs: Runs in the population.
        options: Keyword arguments of the environment.
    """

    def __init__(self, env_id: str, n_envs: int, options: Mapping[str, Any]) -> None:
        self.env = make_population(env_id, n_envs, options)

    def describe(self) -> Description:
        loop = self.env.loop
        observation_space, action_space = spaces_of(loop)
        return Description(
            observation_space=observation_space,
            action_space=action_space,
            observation_names=loop.codec.names,
            knobs=loop.knobs,
            n_control_steps=loop.config.n_control_steps,
            horizon=loop.run.horizon,
        )

    def descriptors(self, task_seeds: Sequence[int]) -> FloatArray:
        """What is known of tasks before they are trained, `[n_tasks, n_descriptors]`."""
        loop = self.env.loop
        told = [loop.run.descriptors(seed, loop.config.split) for seed in task_seeds]
        return np.array([list(each.values()) for each in told]).reshape(len(told), -1)

    def set_reward_scale(self, scale: float) -> None:
        self.env.loop.reward = ImprovementReward(scale=scale)

    def reset(self, seed: int | list[int | None]) -> np.ndarray:
        return self.env.reset(seed=seed)[0]

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        return self.env.step(actions)

    def play(
        self, planned: Sequence[PlannedRun], between: Between | None = None
    ) -> list[PlayedRun]:
        return play(self.env.loop, planned, between=between)

    def state_dict(self) -> dict[str, Any]:
        return self.env.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.env.load_state_dict(state)

    def close(self) -> None:
        self.env.close()


class ShardRow:
    """Several shards of equal size, advanced together.

    Args:
        env_id: Gymnasium id, with the module prefix.
        n_envs: Runs per shard.
        options: Keyword arguments of the environment.
        n_workers: Worker processes, one shard each; 0 keeps one shard in this process.
        variants: What workers change in the options, one set of changes each in turn.
        spawn: What makes a worker, of what builds its shard: a process of this machine by default.

    Raises:
        ValueError: If the runs of some workers have other knobs than those of the first.
    """

    def __init__(
        self,
        env_id: str,
        n_envs: int,
        options: Mapping[str, Any],
        n_workers: int,
        variants: Sequence[Mapping[str, Any]] = (),
        spawn: Callable[[Build, tuple[Any, ...]], Worker] = ProcessWorker,
    ) -> None:
        self.n_envs = n_envs
        self.n_shards = max(1, n_workers)
        self._unlike = len(variants) > 1
        self._local: Shard | None = None
        self._workers: list[Worker] = []
        if n_workers == 0:
            self._local = Shard(env_id, n_envs, options)
            return
        try:
            changes = [variants[i % len(variants)] if variants else {} for i in range(n_workers)]
            for each in changes:
                self._workers.append(spawn(Shard, (env_id, n_envs, {**options, **each})))
            for worker in self._workers:
                worker.require_ready()
            self._require_likeness()
        except BaseException:
            for worker in self._workers:
                worker.kill()
            raise

    def _require_likeness(self) -> None:
        """One policy for all: the same knobs, and as many decisions."""
        first, *others = self.call_all("describe")
        for other in others:
            ours, theirs = ([k.name for k in about.knobs] for about in (first, other))
            if ours != theirs:
                raise ValueError(
                    f"All variants must have the same knobs, got {', '.join(ours)} and "
                    f"{', '.join(theirs)}"
                )
            if first.observation_names != other.observation_names:
                apart = set(first.observation_names) ^ set(other.observation_names)
                raise ValueError(
                    f"All variants must see the same signals, but not all have "
                    f"{', '.join(sorted(apart))}"
                )
            if first.n_control_steps != other.n_control_steps:
                raise ValueError(
                    f"All variants must have the same n_control_steps, got "
                    f"{first.n_control_steps} and {other.n_control_steps}"
                )

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls a method of every shard, with its own arguments; answers in order."""
        if self._local is not None:
            return [getattr(self._local, method)(*arguments[0])]
        for worker, args in zip(self._workers, arguments, strict=True):
            worker.send(method, *args)
        return [worker.receive() for worker in self._workers]

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of every shard with the same arguments."""
        return self.call(method, [args] * self.n_shards)

    def describe(self) -> Description:
        """What the runs of the first shard are; all have the same knobs and observations."""
        described: Description = self.call_all("describe")[0]
        return described

    @property
    def knobs(self) -> KnobSet:
        """Those of the runs."""
        return self.describe().knobs

    def play(
        self,
        planned: Sequence[PlannedRun],
        on_done: Callable[[int], None] | None = None,
        between: Between | None = None,
    ) -> list[PlayedRun]:
        """Plays whole training runs; results in the order in which they are planned.

        A planned run goes to whichever shard is free, so all must be alike.

        Args:
            planned: Any number; split into populations and handed to whichever shard is free.
            on_done: Called with the number of runs finished since the last call.
            between: What happens to the runs of a population between its control steps.
        """
        if self._unlike:
            raise ValueError("Runs are paired where all runs are alike; these shards are not")
        chunks = [planned[i : i + self.n_envs] for i in range(0, len(planned), self.n_envs)]
        results: list[list[PlayedRun]] = [[] for _ in chunks]
        for index, answer in self.play_chunks(chunks, between):
            results[index] = answer
            if on_done is not None:
                on_done(len(answer))
        return [result for chunk in results for result in chunk]

    def play_chunks(
        self, chunks: Sequence[Sequence[PlannedRun]], between: Between | None
    ) -> Iterator[tuple[int, list[PlayedRun]]]:
        """Plays populations, each on one shard; place and results, as they come."""
        if self._local is not None:
            for i, chunk in enumerate(chunks):  # copies, as workers get them
                yield i, self._local.play(deepcopy(list(chunk)), between)
            return
        waiting = list(enumerate(chunks))[::-1]
        busy: dict[Worker, int] = {}
        idle = list(self._workers)
        while waiting or busy:
            while waiting and idle:
                index, chunk = waiting.pop()
                worker = idle.pop()
                worker.send("play", chunk, between)
                busy[worker] = index
            for worker in self._workers[0].wait(list(busy)):
                yield busy.pop(worker), worker.receive()
                idle.append(worker)

    def close(self) -> None:
        if self._local is not None:
            self._local.close()
        for worker in self._workers:
            worker.send("close")
        for worker in self._workers:
            worker.close()
        self._workers = []

    def __enter__(self) -> "ShardRow":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def default_workers() -> int:
    """One worker per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
