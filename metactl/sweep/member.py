"""One trial of kind `"knobs"`: runs on all tasks of a sweep, under knobs that they share.

The runs are the rows of one population, and go on stretch by stretch. Between stretches whoever
started the trial may let it take over the runs of another and go on at other knobs; so trials
under population-based training differ from static ones only by who starts them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metactl.checkpoint import from_tensors, load_newest_checkpoint, save_checkpoint, to_tensors
from metactl.env import ControlLoop
from metactl.evaluation import paired_episodes
from metactl.evaluation.summary import column
from metactl.files import write_atomically
from metactl.knobs import FloatArray
from metactl.policy import Policy
from metactl.shards import make_population
from metactl.sweep.config import SweepConfig, Trial, trial_folder
from metactl.sweep.result import read_result, write_result
from metactl.sweep.score import gain, play_pair, runs_of

CHECKPOINTS = "checkpoints"
_REFERENCE = "reference.json"

MemberReport = Callable[[int, int, float], None]
"""Called with the control steps done, how many there are, and minus the mean probe loss; it may
raise to stop."""


@dataclass(frozen=True, kw_only=True)
class Going:
    """How a trial goes on.

    Args:
        positions: By knob, for those that the sweep varies: where it is, in [0, 1].
        from_trial: Whose runs it goes on with.
        done: Control steps that these have done; by default whatever is there.
    """

    positions: Mapping[str, float]
    from_trial: str
    done: int | None = None


def run_member(
    config: SweepConfig, trial: Trial, root: Path, going: Going, report: MemberReport
) -> dict[str, Any]:
    """Does a trial, or what is left of it, at given knobs.

    Args:
        config: The sweep.
        trial: Which.
        root: The sweep's directory, with the reference.
        going: Where it goes on, and at which knobs.
        report: Told after every stretch but the last.

    Returns:
        `changes`: where it began; `score`: what its setting gains over default knobs, in nats per
        token; its interval; `merit`: minus the final probe loss; `test_loss` per task; and
        `schedule`: values of the knobs, by name, per control step.
    """
    folder = trial_folder(root, trial.name)
    done = read_result(folder)
    if done is not None:
        return done
    torch.set_num_threads(max(1, int(config.resources.cpu)))
    env_id, options = runs_of(Policy.load(trial.policy), trial.options)
    env = make_population(env_id, config.n_tasks, options)
    try:
        runs = _Runs(config, env.loop)
        held = load_newest_checkpoint(
            trial_folder(root, going.from_trial) / CHECKPOINTS, going.done
        )
        if held is None:
            runs.begin()
        else:
            runs.load_state_dict(held[0])
        if going.done is not None and runs.done != going.done:
            raise OSError(
                f"Trial {going.from_trial} has no intact checkpoint of control step {going.done}"
            )
        runs.move(going.positions)
        if going.from_trial != trial.name:
            _save(runs, folder, going.positions)
        while not runs.over:
            runs.advance(config.every)
            _save(runs, folder, going.positions)
            if not runs.over:
                report(runs.done, len(runs.trace), -float(runs.probe_loss.mean()))
        default = np.array(read_reference(root)["default"])
        loss = runs.test_loss()
        result = {
            "trial": trial.name,
            "changes": trial.changes,
            "merit": -float(runs.probe_loss.mean()),
            **gain(default, loss),
            "test_loss": loss.tolist(),
            "schedule": runs.schedule(),
        }
    finally:
        env.close()
    write_result(folder, result)
    return result


def _save(runs: "_Runs", folder: Path, positions: Mapping[str, float]) -> None:
    save_checkpoint(
        folder / CHECKPOINTS, runs.done, runs.state_dict(), {"positions": dict(positions)}
    )


def held_positions(root: Path, trial: str, done: int) -> dict[str, float]:
    """At which knobs a trial was after so many control steps, of which it has a checkpoint."""
    held = load_newest_checkpoint(trial_folder(root, trial) / CHECKPOINTS, done)
    assert held is not None
    return dict(held[1]["positions"])


class _Runs:
    """The runs of one trial: where they are, and what befell them.

    Args:
        config: The sweep, which says on which tasks.
        loop: A population of as many runs as there are tasks, new.
    """

    def __init__(self, config: SweepConfig, loop: ControlLoop) -> None:
        self.config, self.loop = config, loop
        n_control_steps = loop.config.n_control_steps
        self.untrained = np.zeros(loop.run.n_runs)
        self.lost = np.zeros(loop.run.n_runs)
        self.trace = np.zeros((n_control_steps, len(loop.knobs)))
        self.probe_loss: FloatArray = np.zeros(loop.run.n_runs)

    def begin(self) -> None:
        """As every arm of an evaluation does, at default knobs."""
        default = self.loop.knobs.default_positions(1)[0]
        episodes = paired_episodes(self.config.n_tasks, self.config.seed, default)
        self.loop.reset(list(range(len(episodes))), episodes)
        self.untrained = self.loop.run.evaluate("test")

    def move(self, positions: Mapping[str, float]) -> None:
        for name, position in positions.items():
            self.loop.positions[:, self.loop.knobs.names.index(name)] = position

    @property
    def done(self) -> int:
        """Control steps; all runs are side by side."""
        return int(self.loop.control_step[0])

    @property
    def over(self) -> bool:
        return self.done >= self.loop.config.n_control_steps

    def advance(self, n: int) -> None:
        """So many control steps, or what is left of them, at the same knobs."""
        still = np.zeros((self.loop.run.n_runs, len(self.loop.knobs)))
        for _ in range(min(n, self.loop.config.n_control_steps - self.done)):
            self.trace[self.done] = self.loop.positions[0]
            measurement = self.loop.step(still).measurement
            self.lost = np.maximum(self.lost, measurement.diverged)
            loss = measurement.judged_loss
            self.probe_loss = np.where(self.lost > 0, self.loop.start_loss, loss)

    def test_loss(self) -> FloatArray:
        """At the end, `[n_tasks]`; a run that diverged counts as never trained."""
        return np.where(self.lost > 0, self.untrained, self.loop.run.evaluate("test"))

    def schedule(self) -> dict[str, list[float]]:
        return {name: v.tolist() for name, v in self.loop.knobs.values(self.trace).items()}

    def state_dict(self) -> dict[str, Tensor]:
        own = {f"member/{name}": getattr(self, name) for name in self._own}
        return to_tensors({**self.loop.state_dict(), **own})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        plain = from_tensors(state)
        for name in self._own:
            setattr(self, name, plain.pop(f"member/{name}"))
        self.loop.load_state_dict(plain)

    _own = ("untrained", "lost", "trace", "probe_loss")


# What members are compared with ------------------------------------------------------------------


def make_reference(config: SweepConfig, trial: Trial, root: Path) -> None:
    """Plays default knobs and the policy on the tasks of a sweep, once."""
    if read_reference(root):
        return
    torch.set_num_threads(max(1, int(config.resources.cpu)))
    pair = play_pair(config, Policy.load(trial.policy), trial.options)
    losses = {arm: column(results, "final_test").tolist() for arm, results in pair.items()}
    write_atomically(root / _REFERENCE, json.dumps(losses, allow_nan=False).encode())


def read_reference(root: Path) -> dict[str, list[float]]:
    """Test losses by arm, one per task; empty where there are none yet."""
    try:
        found = json.loads((root / _REFERENCE).read_text())
        return {arm: [float(loss) for loss in found[arm]] for arm in ("default", "policy")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
