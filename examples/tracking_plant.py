"""A training run of one's own as a plant; own_training_run.py learns on it.

`metactl check tracking_plant:Tracking` says what is missing in yours.
"""

import gymnasium
import numpy as np

from metactl import Knob, Measurement, TrainingRun
from metactl.env import TrainingRunVectorEnv
from metactl.episodes import split_options


class Tracking(TrainingRun):
    """N noisy descents to targets in 8 dimensions, one per row."""

    knobs = (Knob(name="learning_rate", low=1e-3, high=1.0, default=0.1, scale="log2"),)

    def __init__(self, n_runs=1, horizon=200):
        self.n_runs, self.horizon = n_runs, horizon
        self.state = {"x": np.zeros((n_runs, 8)), "target": np.zeros((n_runs, 8))}
        self.state |= {"noise": np.zeros(n_runs, dtype=np.int64), "rate": np.zeros(n_runs)}

    def reset(self, rows, tasks, seeds):
        for row, seed in zip(rows, seeds, strict=True):
            self.state["x"][row], self.state["noise"][row] = 0, seed
            self.state["target"][row] = 3 * np.random.default_rng(seed).normal(size=8)

    def apply(self, values):
        self.state["rate"][:] = values["learning_rate"]

    def advance(self, n_steps):
        s = self.state
        for _ in range(n_steps):
            noise = [np.random.default_rng(seed).normal(size=8) for seed in s["noise"]]
            s["noise"] += 1
            s["x"] -= s["rate"][:, None] * (s["x"] - s["target"] + 3 * np.stack(noise))
        loss = self.evaluate("probe")
        return Measurement(train_loss=loss, probe_loss=loss, diverged=~np.isfinite(loss))

    def evaluate(self, split, rows=None):
        distance = np.square(self.state["x"] - self.state["target"]).mean(axis=1)
        return (0.1 + distance)[slice(None) if rows is None else list(rows)]

    def state_dict(self, rows):
        return {name: value[list(rows)].copy() for name, value in self.state.items()}

    def load_state_dict(self, rows, state):
        for name, value in self.state.items():
            value[list(rows)] = state[name]


def make(num_envs=1, render_mode=None, **options):
    plant, control = split_options(options)
    return TrainingRunVectorEnv(Tracking(num_envs, **plant), control, render_mode)


gymnasium.register("Tracking-v0", vector_entry_point="tracking_plant:make")
