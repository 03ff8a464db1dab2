"""Takeovers on Ray Tune: how its PBT and PB2 move knobs, and how trials follow them.

Between stretches a bad trial starts again from a better one's checkpoint, at other knobs. Tune
carries no weights for that: its checkpoints say whose runs they are and how far these were, and the
runs are in that trial's own folder. All trials are kept at the same control step.
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from metactl.checkpoint import intact_steps
from metactl.evaluation.pbt import near_or_anew
from metactl.knobs import KnobSet
from metactl.sweep.check import position_bounds
from metactl.sweep.config import SweepConfig, Trial, trial_folder
from metactl.sweep.member import CHECKPOINTS, Going, held_positions

logger = logging.getLogger(__name__)
_AT = "at.json"
RUNG = "rung"
"""Stretches since this start, the unit of Tune's clock; the last one is not counted."""


def tune_scheduler(config: SweepConfig, knobs: KnobSet) -> Any:
    """Tune's PBT or PB2, on positions of the knobs in [0, 1]."""
    from ray.tune.schedulers import PopulationBasedTraining

    bounds = position_bounds(config, knobs)
    rng = np.random.default_rng(config.seed)

    low, high = np.array(list(bounds.values())).T

    def explored(point: dict[str, Any]) -> dict[str, Any]:
        there = np.array([point[knob] for knob in bounds])
        moved = near_or_anew(there, low, high, rng)
        return {**point, **dict(zip(bounds, moved.tolist(), strict=True))}

    common: dict[str, Any] = {
        "time_attr": RUNG,
        "metric": "return",
        "mode": "max",
        "perturbation_interval": 1,
        "quantile_fraction": 0.25,
        "synch": True,
        "log_config": False,
    }
    if config.scheduler == "pbt":
        return _without_the_lost(PopulationBasedTraining)(custom_explore_fn=explored, **common)
    from ray.tune.schedulers.pb2 import PB2

    class Exploring(PB2):
        """Until there is something to learn from, PB2 copies the knobs, too; twins show nothing."""

        def _get_new_config(self, trial: Any, trial_to_clone: Any) -> Any:
            chosen, operations = super()._get_new_config(trial, trial_to_clone)
            same = all(chosen[knob] == trial_to_clone.config[knob] for knob in bounds)
            return (explored(chosen) if same else chosen), operations

    ends = {knob: list(ends) for knob, ends in bounds.items()}
    return _without_the_lost(Exploring)(hyperparam_bounds=ends, **common)


def _without_the_lost(kind: Any) -> Any:
    """A scheduler that waits for no member that has failed for good; Tune's own wait forever."""

    class InStep(kind):
        def choose_trial_to_run(self, tune_controller: Any) -> Any:
            live = tune_controller.get_live_trials()
            live -= {trial for trial in live if trial.is_finished()}  # the controller's own set
            chosen = super().choose_trial_to_run(tune_controller)
            if chosen is None and live and all(trial.status == "PAUSED" for trial in live):
                self._next_perturbation_sync += self._perturbation_interval
                chosen = super().choose_trial_to_run(tune_controller)
            return chosen

    return InStep


def starting_points(
    config: SweepConfig, trials: list[Trial], root: Path, knobs: KnobSet
) -> tuple[int, dict[str, dict[str, float]]]:
    """From which control step trials go on together, and at which positions, by trial and knob."""
    begun = _common_step(trials, root) if config.is_population else 0
    points = {}
    for trial in trials:
        planned = knobs.positions(trial.changes, 1)[0]
        points[trial.name] = (
            held_positions(root, trial.name, begun)
            if begun
            else {name: float(planned[knobs.names.index(name)]) for name in trial.changes}
        )
    return begun, points


def _common_step(trials: list[Trial], root: Path) -> int:
    """The last control step of which all members have a checkpoint."""
    held = [intact_steps(trial_folder(root, trial.name) / CHECKPOINTS) for trial in trials]
    common = max(set.intersection(*held), default=0)
    if not common and any(held):
        logger.warning("The members have no control step in common: they begin anew")
    return common


def going(trial: str, point: dict[str, Any], begun: int | None) -> Going:
    """How a trial goes on, as Tune wants it."""
    from ray import tune

    positions = {name: value for name, value in point.items() if name != "trial"}
    held = tune.get_checkpoint()
    if held is None:
        return Going(positions=positions, from_trial=trial, done=begun)
    with held.as_directory() as folder:
        at = json.loads((Path(folder) / _AT).read_text())
    return Going(positions=positions, from_trial=at["trial"], done=at["done"])


def report_at(trial: str, done: int, metrics: dict[str, Any]) -> None:
    """Tells Tune how far a trial is, with a checkpoint that others may take over."""
    from ray import tune

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _AT).write_text(json.dumps({"trial": trial, "done": done}))
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
