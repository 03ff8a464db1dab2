"""Whole training runs under controllers, paired where they share seeds."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from metactl.controllers.base import BaseController
from metactl.env import ControlLoop, Step
from metactl.episodes import Episode
from metactl.knobs import FloatArray
from metactl.run import DISTURBED

Between = Callable[[int, ControlLoop, FloatArray], tuple[list[int], list[int]]]
"""Called with the index of a control step, the loop, and the probe loss of every row; returns rows
whose runs others took over, and those others."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training run to play.

    Runs with the same task and run seed share data, initial weights, batches and noise.

    Args:
        arm: Name of what is compared.
        episode: How it begins.
        controller: Who moves the knobs.
    """

    arm: str
    episode: Episode
    controller: BaseController


@dataclass(frozen=True, kw_only=True)
class PlayedRun:
    """What a training run came to; losses in nats per token.

    A run that diverged counts as never trained: its losses are those before the first step.

    Args:
        arm: Copied from the planned run.
        final_test: Test loss at the end.
        best_test: Test loss at the checkpoint with the best probe loss.
        final_probe: Probe loss at the end.
        best_probe: Best probe loss.
        diverged: Whether it diverged.
        flops: Spent by the end of each control step, `[n_control_steps]`; NaN where nobody counts.
        train_loss: Per control step.
        probe_loss: Before the first and after each control step.
        positions: `[n_control_steps + 1, n_knobs]`, before the first and in each control step.
        observations: `[n_control_steps + 1, n_observations]`, before the first and after each.
        disturbed: Per control step, whether something had befallen the run by then.
        values: By knob name, per control step.
    """

    arm: str
    final_test: float
    best_test: float
    final_probe: float
    best_probe: float
    diverged: bool
    flops: FloatArray
    train_loss: FloatArray
    probe_loss: FloatArray
    positions: FloatArray
    observations: np.ndarray
    disturbed: NDArray[np.bool_]
    values: dict[str, FloatArray] = field(default_factory=dict)


def play(
    loop: ControlLoop,
    planned: Sequence[PlannedRun],
    on_step: Callable[[int, Step], None] | None = None,
    between: Between | None = None,
) -> list[PlayedRun]:
    """Plays runs side by side in one population (spare rows repeat the last run).

    Args:
        loop: At most `loop.run.n_runs` runs fit.
        planned: What to play.
        on_step: Called with the index of each control step and what it returned.
        between: Called after each control step, before the next observation; what it remembers, a
            copy of it does.
    """
    n_rows, n_planned, between = loop.run.n_runs, len(planned), deepcopy(between)
    if not 0 < n_planned <= n_rows:
        raise ValueError(f"play needs 1 to {n_rows} runs, got {n_planned}")
    episodes = [run.episode for run in planned]
    episodes += [episodes[-1]] * (n_rows - n_planned)
    groups = _by_controller(planned)
    for controller, rows in groups:
        controller.keep_pace(loop.config.n_control_steps)
        controller.begin(loop.codec, len(rows))
    observation = loop.reset(list(range(n_rows)), episodes)
    untrained = loop.run.evaluate("test")
    best = BestCheckpoint(loop)
    lost = np.zeros(n_rows, dtype=bool)
    steps: list[Step] = []
    positions, probes = [loop.positions.copy()], [loop.start_loss.copy()]
    observations = [observation]
    for index in range(loop.config.n_control_steps):
        actions = np.zeros((n_rows, len(loop.knobs)))
        for controller, rows in groups:
            actions[rows] = controller.act(observation[rows])
        step = loop.step(actions)
        observation = step.observation
        observations.append(observation)
        steps.append(step)
        positions.append(loop.positions.copy())
        probes.append(step.measurement.judged_loss)
        best.update(probes[-1])
        lost |= step.measurement.diverged
        if between is not None:
            sources, targets = between(index, loop, probes[-1])
            best.copy(sources, targets)
            lost[targets] = lost[sources]
            observation = loop.observe()
        if on_step is not None:
            on_step(index, step)
    final_test = np.where(lost, untrained, loop.run.evaluate("test"))
    best_test = np.where(lost, untrained, best.evaluate("test"))
    probe_curve = np.stack(probes, axis=1)
    nobody = np.full(n_rows, np.nan)
    counts = [step.measurement.flops for step in steps]
    flops = np.stack([nobody if count is None else count for count in counts], axis=1)
    return [
        PlayedRun(
            arm=run.arm,
            final_test=float(final_test[row]),
            best_test=float(best_test[row]),
            final_probe=float(probe_curve[row, 0 if lost[row] else -1]),
            best_probe=float(probe_curve[row, 0] if lost[row] else best.loss[row]),
            diverged=bool(lost[row]),
            flops=flops[row],
            train_loss=np.array([step.measurement.train_loss[row] for step in steps]),
            probe_loss=probe_curve[row],
            positions=np.stack(positions)[:, row],
            observations=np.stack([seen[row] for seen in observations]),
            disturbed=np.array([_befallen(step, row) for step in steps]),
            values={
                name: np.array([step.values[name][row] for step in steps])
                for name in loop.knobs.names
            },
        )
        for row, run in enumerate(planned)
    ]


def _befallen(step: Step, row: int) -> bool:
    befallen = step.measurement.internal.get(DISTURBED)
    return befallen is not None and bool(befallen[row])


def _by_controller(planned: Sequence[PlannedRun]) -> list[tuple[BaseController, list[int]]]:
    """Rows of each distinct controller object; it acts for all of them at once."""
    groups: dict[int, tuple[BaseController, list[int]]] = {}
    for row, run in enumerate(planned):
        groups.setdefault(id(run.controller), (run.controller, []))[1].append(row)
    return list(groups.values())


class BestCheckpoint:
    """Keeps the state of each run where its probe loss was lowest."""

    def __init__(self, loop: ControlLoop) -> None:
        self._run = loop.run
        self._rows = list(range(loop.run.n_runs))
        self._state = loop.run.state_dict(self._rows)
        self.loss = loop.start_loss.copy()

    def update(self, loss: FloatArray) -> None:
        better = np.flatnonzero((loss < self.loss) & (loss != 0)).tolist()  # 0: a failed report
        if better:
            for name, value in self._run.state_dict(better).items():
                self._state[name][better] = value
            self.loss[better] = loss[better]

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Gives runs the checkpoints of those that they took over."""
        if targets:
            for value in self._state.values():
                value[targets] = value[sources]
            self.loss[targets] = self.loss[sources]

    def evaluate(self, split: str) -> FloatArray:
        """Loss of the best checkpoints; the runs themselves stay as they are."""
        now = self._run.state_dict(self._rows)
        self._run.load_state_dict(self._rows, self._state)
        loss = self._run.evaluate(split)
        self._run.load_state_dict(self._rows, now)
        return loss
