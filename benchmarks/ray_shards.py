"""What it costs that shards live in Ray actors, and what a learner has to do for many of them.

    python -m benchmarks.ray_shards --json FILE

- `beside`: control steps of the same shards in worker processes and in actors on simulated nodes of
  one core each, in turn; medians, and ratios within each round.
- `crowd`: control steps of many actors that answer after a pause with what a population said: how
  much later than the pause all answers are there.
- `checkpoint`: the same for what they send to the learner at a checkpoint.
- `learner`: PPO over rows that answer at once: seconds of its own per control step and per update.
"""

import json
import logging
import pickle
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from stable_baselines3.common.callbacks import BaseCallback

from benchmarks.provenance import write
from metactl.cluster import use_token
from metactl.config import TrainConfig, changed
from metactl.ray_worker import RayWorker
from metactl.shards import Description, Shard, ShardRow
from metactl.train import build_ppo
from metactl.vec_env import ShardVecEnv

ENV_ID = "envs:AdaptiveTransformer-v0"
_SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "context": 32, "horizon": 240}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    json: Path
    """Where the figures go."""
    rounds: int = 8
    """How often all sides are measured, in turn."""
    steps: int = 5
    """Control steps of a side in each round."""
    n_envs: int = 16
    """Runs of a shard, where shards do work."""
    n_envs_gpu: int = 256
    """Runs of a shard, where it only answers: as many as a GPU would have."""
    crowds: tuple[int, ...] = (1, 4, 16, 32)
    """Actors that only answer."""
    rows: tuple[int, ...] = (1, 4, 16, 64)
    """Shards whose answers a learner learns from."""
    pause: float = 0.05
    """Seconds until an actor of a crowd answers."""


def main(options: Options) -> None:
    use_token()
    import ray
    from ray.cluster_utils import Cluster

    torch.set_num_threads(1)
    head = {"num_cpus": 1, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
    recorded = record(options.n_envs_gpu)
    figures: dict[str, Any] = {"options": _SHAPE}
    parts: dict[str, Callable[[], Any]] = {
        "beside": lambda: beside(options),
        "crowd": lambda: [crowd(options, n, recorded) for n in options.crowds],
        "learner": lambda: [learner(n, options.n_envs_gpu, recorded) for n in options.rows],
    }
    for name, measured in parts.items():
        figures[name] = measured()
        print(name, json.dumps(figures[name]))
        write(options.json, figures)
    ray.shutdown()
    nodes.shutdown()


def beside(options: Options) -> dict[str, float]:
    place = (ENV_ID, options.n_envs, _SHAPE, 2)
    with ShardRow(*place) as processes, ShardRow(*place, spawn=RayWorker) as actors:
        sides = {"processes": ShardVecEnv(processes), "actors": ShardVecEnv(actors)}
        n_knobs = len(processes.knobs)
        rng = np.random.default_rng(0)
        for env in sides.values():
            env.seed(0)
            env.reset()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds + 1):
            for name, env in sides.items():
                moves = rng.uniform(-1, 1, (options.steps, env.num_envs, n_knobs))
                begun = time.perf_counter()
                for move in moves:
                    env.step(move.astype(np.float32))
                seconds[name].append((time.perf_counter() - begun) / options.steps)
    pairs = list(zip(seconds["actors"], seconds["processes"], strict=True))[1:]
    return {
        "processes": statistics.median(seconds["processes"][1:]),
        "actors": statistics.median(seconds["actors"][1:]),
        "ratio": statistics.median(actor / process for actor, process in pairs),
    }


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a population said: of itself, at a reset, after a control step, at a checkpoint."""

    about: Description
    first: np.ndarray
    step: tuple[Any, ...]
    state: dict[str, Any]


def record(n_envs: int) -> Recorded:
    shard = Shard(ENV_ID, n_envs, _SHAPE)
    first = shard.reset(0)
    step = shard.step(np.zeros((n_envs, len(shard.describe().knobs))))
    recorded = Recorded(about=shard.describe(), first=first, step=step, state=shard.state_dict())
    shard.close()
    return recorded


class Answering:
    """A shard that says what another one said, after a pause."""

    def __init__(self, recorded: Recorded, pause: float) -> None:
        self.recorded, self.pause = recorded, pause

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        time.sleep(self.pause)
        return self.recorded.step

    def state_dict(self) -> dict[str, Any]:
        return self.recorded.state

    def close(self) -> None:
        """Has nothing to close."""


def crowd(options: Options, n: int, recorded: Recorded) -> dict[str, Any]:
    spawn = partial(RayWorker, cpus=0.01)
    workers = [spawn(Answering, (recorded, options.pause)) for _ in range(n)]
    for worker in workers:
        worker.require_ready()
    actions = np.zeros((options.n_envs_gpu, len(recorded.about.knobs)), dtype=np.float32)

    def seconds(method: str, *args: Any) -> float:
        begun = time.perf_counter()
        for worker in workers:
            worker.send(method, *args)
        for worker in workers:
            worker.receive()
        return time.perf_counter() - begun

    seconds("step", actions)
    steps = [seconds("step", actions) for _ in range(options.rounds * options.steps)]
    states = [seconds("state_dict") for _ in range(2)]
    for worker in workers:
        worker.kill()
    return {
        "actors": n,
        "step_overhead": statistics.median(steps) - options.pause,
        "checkpoint": min(states),
        "bytes_per_step": len(pickle.dumps((actions, recorded.step))),
        "bytes_per_checkpoint": len(pickle.dumps(recorded.state)),
    }


class AnsweringRow:
    """A row of shards that answer at once; what `ShardVecEnv` needs of one."""

    def __init__(self, n_shards: int, n_envs: int, recorded: Recorded) -> None:
        self.n_shards, self.n_envs, self.recorded = n_shards, n_envs, recorded

    def describe(self) -> Description:
        return self.recorded.about

    def call(self, method: str, arguments: Any) -> list[Any]:
        answer = self.recorded.first if method == "reset" else self.recorded.step
        return [answer] * self.n_shards


class _Clock(BaseCallback):
    """How long rollouts and updates take."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = {"rollout": [], "update": []}
        self.last = 0.0

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        if self.last:
            self.seconds[name].append(now - self.last)
        self.last = now

    def _on_rollout_start(self) -> None:
        self._lap("update")

    def _on_rollout_end(self) -> None:
        self._lap("rollout")

    def _on_step(self) -> bool:
        return True


def learner(n_shards: int, n_envs: int, recorded: Recorded) -> Mapping[str, float]:
    total = n_shards * n_envs
    config = changed(TrainConfig(), {"ppo.batch_size": total, "environment.n_envs": n_envs})
    row: Any = AnsweringRow(n_shards, n_envs, recorded)
    model = build_ppo(config, ShardVecEnv(row, config.ppo.paired_runs))
    clock = _Clock()
    model.learn(3 * config.ppo.n_steps * total, callback=clock)
    rollout, update = (statistics.median(clock.seconds[k]) for k in ("rollout", "update"))
    return {
        "shards": n_shards,
        "runs": total,
        "seconds_per_control_step": rollout / config.ppo.n_steps,
        "seconds_per_update": update,
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
