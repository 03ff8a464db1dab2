"""The contract that a plant fulfils so that metactl can control it: `TrainingRun`.

A `TrainingRun` is N training runs of one shape advanced together. metactl moves their knobs,
lets them take optimizer steps and reads a `Measurement`; it never looks inside. A user's own
training code becomes controllable by fulfilling this contract (`metactl check` says what is
missing), natively for N runs or through `SingleRuns`, which makes N out of one.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metactl.knobs import FloatArray, Knob

DISTURBED = "disturbed"


@dataclass(kw_only=True)
class Measurement:
    """What the runs showed over the last optimizer steps; every array is `[n_runs]`.

    What a run cannot measure is `None`: the signals that need it are masked, with their whole
    group, and the controller is told so (but of `train_loss_std`: the loss's noise then reads 0).
    All losses are in nats per token.

    Args:
        train_loss: Mean minibatch loss, as trained (with dropout).
        train_loss_std: Standard deviation of the minibatch losses.
        probe_loss: Loss on fixed held-out data with dropout off, at the knobs in force.
        gradient_norm: Mean norm of the gradient before clipping.
        update_ratio_median: ||update|| / ||weight|| of the last step, median over tensors.
        update_ratio_max: The same, maximum over tensors.
        diverged: True where a loss, weight or gradient became non-finite.
        tokens_seen: Tokens trained on since the start of the run.
        unique_tokens: Distinct training tokens that the run has.
        n_parameters: Trained parameters.
        flops: Floating-point operations spent since the start of the run.
        relative_cost: Cost of a step at the knobs in force over that at default knobs.
        internal: Further named signals read from inside the model.
            `DISTURBED` is 1 where something has befallen a run, by the plant's own doing.
    """

    train_loss: FloatArray
    diverged: NDArray[np.bool_]
    train_loss_std: FloatArray | None = None
    probe_loss: FloatArray | None = None
    gradient_norm: FloatArray | None = None
    update_ratio_median: FloatArray | None = None
    update_ratio_max: FloatArray | None = None
    tokens_seen: FloatArray | None = None
    unique_tokens: FloatArray | None = None
    n_parameters: FloatArray | None = None
    flops: FloatArray | None = None
    relative_cost: FloatArray | None = None
    internal: Mapping[str, FloatArray] = field(default_factory=dict)

    def arrays(self) -> dict[str, FloatArray | None]:
        """The fields that hold one number per run, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "internal"}

    @property
    def judged_loss(self) -> FloatArray:
        """The loss by which a run is judged: on the probe, where it has one."""
        return self.train_loss if self.probe_loss is None else self.probe_loss


class Diverged(ArithmeticError):
    """Raised by a single run whose loss, weights or gradient became non-finite."""


class TrainingRun(abc.ABC):
    """N training runs of one shape, advanced together.

    `rows` are indices in `range(n_runs)`. A run must depend on its own task, seed and knobs only:
    not on its row, its neighbours or the number of runs.
    """

    n_runs: int
    """How many runs advance together."""
    horizon: int
    """Optimizer steps from the start to the end of every run: at least as many as control steps
    (40), and set by metactl, which rounds it to a multiple of these."""

    @property
    @abc.abstractmethod
    def knobs(self) -> Sequence[Knob]:
        """The knobs that these runs have."""

    @property
    def internal_names(self) -> Sequence[str]:
        """Signals from inside the model that every measurement has (`metactl.signals.INTERNAL`)."""
        return ()

    @abc.abstractmethod
    def reset(self, rows: Sequence[int], tasks: Sequence[Any], seeds: Sequence[int]) -> None:
        """Starts new runs in `rows`: fresh weights and optimizer, the task's data."""

    @abc.abstractmethod
    def apply(self, values: Mapping[str, FloatArray]) -> None:
        """Puts knob values (each `[n_runs]`) in force for the next optimizer steps."""

    @abc.abstractmethod
    def advance(self, n_steps: int) -> Measurement:
        """Takes optimizer steps in all runs and says what was seen."""

    @abc.abstractmethod
    def evaluate(self, split: str, rows: Sequence[int] | None = None) -> FloatArray:
        """Loss on the `"probe"` or `"test"` split, nats per token, `[rows]` (all by default).

        With dropout off and the knobs in force.
        """

    @abc.abstractmethod
    def state_dict(self, rows: Sequence[int]) -> dict[str, Any]:
        """All that determines how `rows` go on: arrays or tensors with a leading row
        dimension, by name.
        """

    @abc.abstractmethod
    def load_state_dict(self, rows: Sequence[int], state: Mapping[str, Any]) -> None:
        """Puts a state from `state_dict` of as many rows in force."""

    def sample_task(self, seed: int, split: str = "meta_train") -> Any:
        """A task drawn from the run's task family.

        Args:
            seed: Determines the task.
            split: `"meta_train"` or `"meta_test"`, whose tasks never share data, or `"all"` of it.
        """
        return None

    def descriptors(self, seed: int, split: str = "meta_train") -> Mapping[str, float]:
        """What is known of a task before it is trained, as numbers by name: always the same names.

        Evaluations tell it to settings and schedules that a policy is compared with.

        Args:
            seed: Of the task.
            split: Where it is drawn from.
        """
        return {}

    def fingerprint(self) -> str:
        """What tells the data that tasks are made of from other data; empty where nobody says."""
        return ""

    def draw_horizon(self, seed: int) -> None:
        """Draws a new horizon where the family varies it; called only between runs."""
        return  # most runs keep theirs

    def cost(self) -> FloatArray:
        """FLOPs of one optimizer step at the knobs in force, or in proportion to it, `[n_runs]`."""
        return np.ones(self.n_runs)

    def copy_rows(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Makes the `target` rows go on exactly as the `source` rows would."""
        self.load_state_dict(target, self.state_dict(source))

    def export(self, row: int) -> Any:
        """The trained model of one run."""
        raise TypeError(f"{type(self).__name__} has no model to export")

    def sample(self, row: int, n_tokens: int) -> str:
        """Something that the trained model of one run produces, as text."""
        raise TypeError(f"{type(self).__name__} cannot sample")

    def close(self) -> None:
        """Releases what the runs hold."""
        return  # memory needs no word


class SingleRuns(TrainingRun):
    """N runs out of N plants that are one run each (`n_runs == 1`), advanced in turn.

    Args:
        build: Makes one plant; it may raise `Diverged` from `advance`.
        n_runs: How many.

    Raises:
        ValueError: If a plant is not one run.
    """

    def __init__(self, build: Callable[[], TrainingRun], n_runs: int) -> None:
        self._runs = [build() for _ in range(n_runs)]
        self.n_runs = n_runs
        for run in self._runs:
            if run.n_runs != 1:
                raise ValueError(f"SingleRuns needs plants of one run each, got {run.n_runs}")

    @property
    def horizon(self) -> int:
        """Of every plant; whoever sets it sets theirs."""
        return self._runs[0].horizon

    @horizon.setter
    def horizon(self, steps: int) -> None:
        for run in self._runs:
            run.horizon = steps

    @property
    def knobs(self) -> Sequence[Knob]:
        return self._runs[0].knobs

    @property
    def internal_names(self) -> Sequence[str]:
        return self._runs[0].internal_names

    def reset(self, rows: Sequence[int], tasks: Sequence[Any], seeds: Sequence[int]) -> None:
        for row, task, seed in zip(rows, tasks, seeds, strict=True):
            self._runs[row].reset([0], [task], [seed])

    def sample_task(self, seed: int, split: str = "meta_train") -> Any:
        return self._runs[0].sample_task(seed, split)

    def descriptors(self, seed: int, split: str = "meta_train") -> Mapping[str, float]:
        return self._runs[0].descriptors(seed, split)

    def fingerprint(self) -> str:
        return self._runs[0].fingerprint()

    def draw_horizon(self, seed: int) -> None:
        for run in self._runs:
            run.draw_horizon(seed)

    def apply(self, values: Mapping[str, FloatArray]) -> None:
        for row, run in enumerate(self._runs):
            run.apply({name: value[row : row + 1] for name, value in values.items()})

    def advance(self, n_steps: int) -> Measurement:
        return join_measurements([_advance_one(run, n_steps) for run in self._runs])

    def evaluate(self, split: str, rows: Sequence[int] | None = None) -> FloatArray:
        chosen = range(self.n_runs) if rows is None else rows
        return np.concatenate([self._runs[row].evaluate(split) for row in chosen])

    def cost(self) -> FloatArray:
        return np.concatenate([run.cost() for run in self._runs])

    def state_dict(self, rows: Sequence[int]) -> dict[str, Any]:
        states = [self._runs[row].state_dict([0]) for row in rows]
        return {key: _stack([state[key] for state in states]) for key in states[0]}

    def load_state_dict(self, rows: Sequence[int], state: Mapping[str, Any]) -> None:
        for i, row in enumerate(rows):
            own = {key: value[i : i + 1] for key, value in state.items()}
            self._runs[row].load_state_dict([0], own)

    def export(self, row: int) -> Any:
        return self._runs[row].export(0)

    def sample(self, row: int, n_tokens: int) -> str:
        return self._runs[row].sample(0, n_tokens)

    def close(self) -> None:
        for run in self._runs:
            run.close()


def _stack(parts: Sequence[Any]) -> Any:
    """Joins arrays or tensors along their leading row dimension."""
    if isinstance(parts[0], np.ndarray | list):
        return np.concatenate([np.asarray(part) for part in parts])
    import torch  # only here: the command line stays quick

    return torch.cat(list(parts))


def _advance_one(run: TrainingRun, n_steps: int) -> Measurement:
    try:
        return run.advance(n_steps)
    except Diverged:
        return Measurement(train_loss=np.array([np.nan]), diverged=np.array([True]))


def join_measurements(parts: Sequence[Measurement]) -> Measurement:
    """One measurement of several groups of runs, in order; NaN where only some measured."""
    sizes = [len(part.train_loss) for part in parts]
    joined: dict[str, Any] = {}
    for name in parts[0].arrays():
        columns = [part.arrays()[name] for part in parts]
        if all(column is None for column in columns):
            joined[name] = None
            continue
        joined[name] = np.concatenate(
            [
                np.full(size, np.nan) if column is None else column
                for size, column in zip(sizes, columns, strict=True)
            ]
        )
    joined["diverged"] = joined["diverged"].astype(bool)
    names = dict.fromkeys(name for part in parts for name in part.internal)
    internal = {
        name: np.concatenate(
            [
                part.internal.get(name, np.full(size, np.nan))
                for size, part in zip(sizes, parts, strict=True)
            ]
        )
        for name in names
    }
    return Measurement(**joined, internal=internal)
