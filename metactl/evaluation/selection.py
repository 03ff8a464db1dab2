"""Static settings that are chosen: on the tasks themselves, and beforehand on others.

Each choice is made twice, by the probe loss at the end and by the lowest: the arm ends as the first
does, and its best checkpoint is that of the second.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from metactl.evaluation.arms import Results, spread_of
from metactl.evaluation.summary import column, epoch_groups
from metactl.knobs import FloatArray
from metactl.rollout import PlayedRun

_NEAREST = 4  # the nearest of so many training tasks tell what is best
_FEWEST = 8  # but at least so many tasks

Choice = Callable[[FloatArray], Sequence[int]]
"""From probe losses `[n_settings, n_tasks]` to a setting for every task that is to be played."""


def chosen_here(
    results: Results, grid: Sequence[str], further: Sequence[str], names: Sequence[str]
) -> Results:
    """Replaces the grid by the default and by what is best: on average, by how often a run sees its
    data, and for each task. With further settings the best of the grid alone is an arm, too.

    Args:
        results: Of all arms.
        grid: Settings of the grid, the default first; they are not arms of their own any more.
        further: Settings that are.
        names: Of the observations' entries.
    """
    settings = [results[name] for name in (*grid, *further)]
    n = len(settings[0])
    selected = {"default": settings[0], "best static": _picked(settings, settings, _on_average(n))}
    if further:
        alone = settings[: len(grid)]
        selected["best static of the grid"] = _picked(alone, alone, _on_average(n))
    groups = [inside for _, inside in epoch_groups(settings[0], names)]
    if len(groups) > 1 and np.any(groups, axis=0).all():

        def by_group(losses: FloatArray) -> Sequence[int]:
            picks = np.zeros(n, dtype=int)
            for inside in groups:
                picks[inside] = losses[:, inside].mean(axis=1).argmin()
            return picks.tolist()

        selected["best static by epochs"] = _picked(settings, settings, by_group)
    each = _picked(settings, settings, lambda losses: losses.argmin(axis=0).tolist())
    kept = {name: runs for name, runs in results.items() if name not in grid}
    return {**selected, "per-task best static": each, **kept}


def chosen_beforehand(
    training: Results, known_there: FloatArray, played: Results, known_here: FloatArray
) -> Results:
    """Static settings that are chosen on other tasks: one for all, and one for each task by what
    is known of it: the one that was best on the quarter of those tasks that are most alike.

    Args:
        training: By setting: its runs on the tasks to choose by.
        known_there: Descriptors of those tasks, `[n_tasks, n_descriptors]`.
        played: The same settings' runs on the tasks of the evaluation.
        known_here: Descriptors of these. Without descriptors there is no second arm.
    """
    there, here = list(training.values()), [played[name] for name in training]
    n = len(here[0])
    chosen = {"best static of training tasks": _picked(there, here, _on_average(n))}
    if not known_here.shape[1]:
        return chosen
    apart = (known_here[:, None] - known_there) / spread_of(known_there)
    distance = np.linalg.norm(apart, axis=2)
    n_nearest = min(len(known_there), max(_FEWEST, len(known_there) // _NEAREST))
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :n_nearest]

    def by_likeness(losses: FloatArray) -> Sequence[int]:
        return losses[:, nearest].mean(axis=2).argmin(axis=0).tolist()

    chosen["the same, told the task"] = _picked(there, here, by_likeness)
    return chosen


def _on_average(n_tasks: int) -> Choice:
    return lambda losses: [int(losses.mean(axis=1).argmin())] * n_tasks


def _picked(
    judged: Sequence[Sequence[PlayedRun]], played: Sequence[Sequence[PlayedRun]], choose: Choice
) -> list[PlayedRun]:
    """Runs of the settings that are chosen by the probe losses of `judged`, out of `played`."""
    at_end, at_best = (
        choose(np.stack([column(runs, loss) for runs in judged]))
        for loss in ("final_probe", "best_probe")
    )
    return [
        _composed(played[end][task], played[best][task])
        for task, (end, best) in enumerate(zip(at_end, at_best, strict=True))
    ]


def _composed(run: PlayedRun, other: PlayedRun) -> PlayedRun:
    """A run, with the best checkpoint of another."""
    return replace(run, best_test=other.best_test, best_probe=other.best_probe)
