"""A training run with known answers: N noisy descents whose best rate drifts, numpy only."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from metactl.env import TrainingRunEnv, TrainingRunVectorEnv
from metactl.episodes import split_options
from metactl.knobs import Knob
from metactl.run import Diverged, Measurement, TrainingRun

RATE = Knob(name="rate", low=0.0, high=1.0, default=0.5, max_move=4.0)
WIDTH = Knob(name="width", low=1.0, high=16.0, default=4.0, scale="log2", max_move=4.0)
NOISE = 0.05
N_DECISIONS = 8  # of the row that tests share
DEFAULT = np.array([0.5, 0.5])  # positions


class ToyPlant(TrainingRun):
    """Each row's distance from its optimum shrinks, fastest where `rate` meets a drifting best.

    probe loss = 1 + distance; test loss = probe loss + 0.25.

    Args:
        n_runs: Rows.
        horizon: Optimizer steps.
        diverge_above: A row whose rate is above this has a NaN loss.
        probes: Whether the probe loss is part of a measurement.
        farther: Factor of the distance at the start.
        dies: Whether the process ends when it is to advance.
    """

    def __init__(
        self,
        n_runs: int = 1,
        horizon: int = 40,
        diverge_above: float = np.inf,
        probes: bool = True,
        farther: float = 1.0,
        dies: bool = False,
    ) -> None:
        self.dies = dies
        self.n_runs, self.horizon, self.farther = n_runs, horizon, farther
        self.diverge_above, self.probes = diverge_above, probes
        self.state = {
            "seed": np.zeros(n_runs, dtype=np.int64),
            "step": np.zeros(n_runs, dtype=np.int64),
            "distance": np.ones(n_runs),
            "diverged": np.zeros(n_runs, dtype=bool),
            "rate": np.full(n_runs, RATE.default),
            "width": np.full(n_runs, WIDTH.default),
        }
        self.evaluated: list[str] = []
        self.closed = False

    @property
    def knobs(self) -> Sequence[Knob]:
        return (RATE, WIDTH)

    def sample_task(self, seed: int, split: str = "meta_train") -> float:
        return self.farther * float(np.random.default_rng(seed).uniform(2, 4))

    def reset(self, rows: Sequence[int], tasks: Sequence[Any], seeds: Sequence[int]) -> None:
        for row, task, seed in zip(rows, tasks, seeds, strict=True):
            fresh = {"seed": seed, "step": 0, "distance": task, "diverged": False}
            for name, value in {**fresh, "rate": RATE.default, "width": WIDTH.default}.items():
                self.state[name][row] = value

    def apply(self, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            self.state[name][:] = value

    def advance(self, n_steps: int) -> Measurement:
        if self.dies:
            os._exit(9)
        state = self.state
        batches = [self._optimizer_step() for _ in range(n_steps)]
        state["diverged"] |= state["rate"] > self.diverge_above
        train = np.where(state["diverged"], np.nan, np.mean(batches, axis=0))
        return Measurement(
            train_loss=train,
            train_loss_std=np.std(batches, axis=0),
            probe_loss=self.losses("probe") if self.probes else None,
            gradient_norm=state["distance"].copy(),
            diverged=state["diverged"].copy(),
            flops=state["step"] * 10.0,
            relative_cost=state["width"] / WIDTH.default,
        )

    def _optimizer_step(self) -> np.ndarray:
        state = self.state
        best = 0.2 + 0.6 * state["step"] / self.horizon
        state["distance"] *= 1 - 0.1 * np.exp(-4 * (state["rate"] - best) ** 2)
        pairs = zip(state["seed"].tolist(), state["step"].tolist(), strict=True)
        noise = np.array([np.random.default_rng(pair).normal() for pair in pairs])
        state["step"] += 1
        return 1 + state["distance"] + NOISE * noise

    def losses(self, split: str) -> np.ndarray:
        loss = 1 + self.state["distance"] + (0.25 if split == "test" else 0.0)
        return np.where(self.state["diverged"], np.nan, loss)

    def evaluate(self, split: str, rows: Sequence[int] | None = None) -> np.ndarray:
        self.evaluated.append(split)
        return self.losses(split)[slice(None) if rows is None else list(rows)]

    def state_dict(self, rows: Sequence[int]) -> dict[str, Any]:
        return {name: value[list(rows)].copy() for name, value in self.state.items()}

    def load_state_dict(self, rows: Sequence[int], state: Mapping[str, Any]) -> None:
        for name, value in self.state.items():
            value[list(rows)] = np.asarray(state[name])

    def export(self, row: int) -> float:
        return float(self.state["distance"][row])

    def close(self) -> None:
        self.closed = True


class Overfitting(ToyPlant):
    """Its probe loss is lowest at 60 % of the run, while its test loss rises all the time."""

    def losses(self, split: str) -> np.ndarray:
        progress = self.state["step"] / self.horizon
        loss = 3 + progress if split == "test" else 2 + (progress - 0.6) ** 2
        return np.where(self.state["diverged"], np.nan, loss)


class Exploding(ToyPlant):
    """One run that raises `Diverged` where others report it."""

    def advance(self, n_steps: int) -> Measurement:
        measurement = super().advance(n_steps)
        if measurement.diverged[0]:
            raise Diverged
        return measurement


def make_environment(render_mode: str | None = None, **options: Any) -> TrainingRunEnv:
    plant, control = split_options(options)
    return TrainingRunEnv(ToyPlant(1, **plant), control, render_mode)


def make_vector_environment(
    num_envs: int = 1, render_mode: str | None = None, **options: Any
) -> TrainingRunVectorEnv:
    plant, control = split_options(options)
    return TrainingRunVectorEnv(ToyPlant(num_envs, **plant), control, render_mode)


gymnasium.register(
    id="Toy-v0",
    entry_point="toy_plant:make_environment",
    vector_entry_point="toy_plant:make_vector_environment",
)
TOY = "toy_plant:Toy-v0"
