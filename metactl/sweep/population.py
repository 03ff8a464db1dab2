"""Takeovers on Ray Tune: how its PBT and PB2 move knobs, and how trials follow them.

Between stretches a bad trial starts again from a better one's checkpoint, at other knobs. Tune
carries no weights for that: its checkpoints say whose runs they are and how far these were, and the
runs are in that trial's own folder. All trials are kept at the same control step.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from metactl.checkpoint import newest_step
from metactl.knobs import KnobSet
from metactl.sweep.check import position_bounds
from metactl.sweep.config import SweepConfig, Trial, trial_folder
from metactl.sweep.member import CHECKPOINTS, Going, held_positions

_AT = "at.json"
_SPREAD, _RESAMPLE = 0.15, 0.25  # deviation of a knob's move; how often it is drawn anew
RUNG = "rung"
"""Stretches since this start, the unit of Tune's clock; it stands still in the last one."""


def tune_scheduler(config: SweepConfig, knobs: KnobSet) -> Any:
    """Tune's PBT or PB2, on positions of the knobs in [0, 1]."""
    bounds = position_bounds(config, knobs)
    common: dict[str, Any] = {
        "time_attr": RUNG,
        "metric": "return",
        "mode": "max",
        "perturbation_interval": 1,
        "quantile_fraction": 0.25,
        "synch": True,
        "log_config": False,
    }
    if config.scheduler == "pb2":
        from ray.tune.schedulers.pb2 import PB2

        return PB2(hyperparam_bounds={k: list(b) for k, b in bounds.items()}, **common)
    from ray.tune.schedulers import PopulationBasedTraining

    rng = np.random.default_rng(config.seed)

    def explored(point: dict[str, Any]) -> dict[str, Any]:
        moved = dict(point)
        for knob, (low, high) in bounds.items():
            near = float(np.clip(point[knob] + _SPREAD * rng.standard_normal(), low, high))
            moved[knob] = float(rng.uniform(low, high)) if rng.random() < _RESAMPLE else near
        return moved

    return PopulationBasedTraining(custom_explore_fn=explored, **common)


def starting_points(
    config: SweepConfig, trials: list[Trial], root: Path, knobs: KnobSet
) -> tuple[int, dict[str, dict[str, float]]]:
    """From which control step trials go on together, and at which positions, by trial and knob."""
    begun = 0
    if config.is_population:
        begun = min(newest_step(trial_folder(root, trial.name) / CHECKPOINTS) for trial in trials)
    points = {}
    for trial in trials:
        planned = knobs.positions(trial.changes, 1)[0]
        at = held_positions(root, trial.name, begun) if begun else None
        points[trial.name] = at or {
            name: float(planned[knobs.names.index(name)]) for name in trial.changes
        }
    return begun, points


def going(trial: str, point: dict[str, Any], begun: int | None) -> Going:
    """How a trial goes on, as Tune wants it."""
    from ray import tune

    positions = {name: value for name, value in point.items() if name != "trial"}
    held = tune.get_checkpoint()
    if held is None:
        return Going(positions=positions, from_trial=trial, at_most=begun)
    with held.as_directory() as folder:
        at = json.loads((Path(folder) / _AT).read_text())
    return Going(positions=positions, from_trial=at["trial"], at_most=at["done"])


def report_at(trial: str, done: int, metrics: dict[str, Any]) -> None:
    """Tells Tune how far a trial is, with a checkpoint that others may take over."""
    from ray import tune

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _AT).write_text(json.dumps({"trial": trial, "done": done}))
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
