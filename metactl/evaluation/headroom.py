"""What could be gained at all, before anybody claims a gain: how much room settings leave.

A setting is chosen by the probe loss of one run of a task and scored by the test loss of another,
with other weights, batches and noise. So what is reported belongs to the setting: the best of many
settings on one run also has that run's luck.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from metactl.deployment import for_task
from metactl.evaluation.arms import Results, play_arms, static_arm, static_grid
from metactl.evaluation.place import RunCounter, Where
from metactl.evaluation.search import Search, best_schedule
from metactl.evaluation.summary import column
from metactl.knobs import FloatArray
from metactl.progress import Progress
from metactl.statistics import paired_difference

_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of one knob alone, in its range
_DEFAULT = "static 0"


def by_family(where: Where, families: Sequence[str]) -> dict[str, Where]:
    """The same place for every family of tasks.

    Raises:
        ConfigError: If one cannot be built: before any is played.
    """
    places = {
        name: replace(where, options=for_task(where.env_id, where.options, name))
        for name in families
    }
    for place in places.values():
        replace(place, n_envs=1, n_workers=0, folder=None).open().close()
    return places


def headroom(
    where: Where,
    *,
    n_tasks: int,
    grid_points: int,
    schedule_runs: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How far settings are apart: on average, by task, by knob, and over a run.

    Args:
        where: The environment.
        n_tasks: Paired tasks, each with two runs of every setting.
        grid_points: Static settings over all knobs, the default among them.
        schedule_runs: Budget of the search for the best open-loop schedule, which begins at the
            best static setting; 0 leaves it out.
        seed: Of tasks and runs.
        progress: Told about finished runs.

    Returns:
        JSON values; losses in nats per token, differences with 95 % intervals over tasks, negative
        where there is something to gain. `run_to_run` is how far two runs of the best static
        setting on one task lie apart on average.
    """
    with where.open() as shards:
        about = shards.describe()
        knobs = about.knobs
        default = knobs.default_positions(1)[0]
        points = {f"static {i}": p for i, p in enumerate(static_grid(knobs, grid_points))}
        alone = {name: _one_knob(name, i, default) for i, name in enumerate(knobs.names)}
        for levels in alone.values():
            points |= levels
        arms = [static_arm(name, point) for name, point in points.items()]
        repeated = [replace(arm, other_seed=True) for arm in arms]
        total = n_tasks * (2 * len(arms) + (schedule_runs > 0)) + schedule_runs
        count = RunCounter(total, progress)
        chosen_on = play_arms(shards, arms, n_tasks, seed, count)
        scored_on = play_arms(shards, repeated, n_tasks, seed, count)
        best = _best_on_average(chosen_on, list(points))
        if schedule_runs:
            with where.open(split="meta_train") as training:
                search = Search(
                    shards=training,
                    positions=points[best],
                    n_runs=schedule_runs,
                    seed=seed,
                    on_done=count,
                )
                schedule = replace(best_schedule(search), other_seed=True)
            scored_on |= play_arms(shards, [schedule], n_tasks, seed, count)

    same, other = (  # by setting, the test losses of the run that chose, and of the other
        {name: column(runs, "final_test") for name, runs in played.items()}
        for played in (chosen_on, scored_on)
    )

    def setting(name: str) -> dict[str, float]:
        return {knob: float(v[0]) for knob, v in knobs.values(points[name][None]).items()}

    found: dict[str, Any] = {
        "n_tasks": n_tasks,
        "settings": len(points),
        "seed": seed,
        "horizon": about.horizon,
        "default": float(other[_DEFAULT].mean()),
        "best_static_setting": setting(best),
        "run_to_run": float(np.abs(same[best] - other[best]).mean()),
        "best static minus default": _minus(other[best], other[_DEFAULT]),
        "per-task best minus best static": _minus(
            per_task_best(chosen_on, scored_on, list(points)), other[best]
        ),
        "the same by the run that chose": _minus(
            per_task_best(chosen_on, chosen_on, list(points)), same[best]
        ),
    }
    if schedule_runs:
        found["best schedule minus best static"] = _minus(other["best schedule"], other[best])
    found["knobs"] = {}
    for knob, levels in alone.items():
        names = [_DEFAULT, *levels]
        best_level = _best_on_average(chosen_on, names)
        found["knobs"][knob] = {
            "best_value": setting(best_level)[knob],
            "best value minus default": _minus(other[best_level], other[_DEFAULT]),
            "per-task best minus best value": _minus(
                per_task_best(chosen_on, scored_on, names), other[best_level]
            ),
        }
    return found


def _one_knob(name: str, index: int, default: FloatArray) -> dict[str, FloatArray]:
    """Settings that differ from the default in one knob."""
    points = {}
    for level in _LEVELS:
        point = default.copy()
        point[index] = level
        points[f"{name} at {level:g}"] = point
    return points


def _best_on_average(results: Results, names: Sequence[str]) -> str:
    return min(names, key=lambda name: float(column(results[name], "final_probe").mean()))


def per_task_best(chosen_on: Results, scored_on: Results, names: Sequence[str]) -> FloatArray:
    """Test loss of the setting that was best for each task, `[n_tasks]`."""
    probes = np.stack([column(chosen_on[name], "final_probe") for name in names])
    tests = np.stack([column(scored_on[name], "final_test") for name in names])
    return np.take_along_axis(tests, probes.argmin(axis=0)[None], axis=0)[0]


def _minus(left: FloatArray, right: FloatArray) -> dict[str, float]:
    return asdict(paired_difference(left, right))
