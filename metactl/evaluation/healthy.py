"""Healthy runs: those of the best static settings, from which set-points are estimated."""

import numpy as np

from metactl.evaluation.arms import play_arms, static_arm, static_grid
from metactl.evaluation.summary import column
from metactl.homeostasis import SetPoints, estimate
from metactl.shards import ShardRow

_SHARE = 4  # the best of so many settings count as healthy


def healthy_set_points(shards: ShardRow, n_runs: int, seed: int) -> SetPoints | None:
    """Set-points from runs under static settings, on tasks that the shards draw.

    As many settings (the default among them) as tasks are tried, and the runs of the best quarter
    of the settings, by final probe loss, are the healthy ones.

    Args:
        shards: Where runs are played.
        n_runs: About how many.
        seed: Of the tasks and runs.

    Returns:
        Set-points, or `None` where all of these runs diverged.
    """
    about = shards.describe()
    n = max(2, int(np.sqrt(n_runs)))
    arms = [static_arm(str(i), point) for i, point in enumerate(static_grid(about.knobs, n))]
    results = list(play_arms(shards, arms, n, seed).values())
    losses = [column(runs, "final_probe").mean() for runs in results]
    best = np.argsort(losses)[: max(1, n // _SHARE)]
    healthy = [run for i in best for run in results[i] if not run.diverged]
    if not healthy:
        return None
    return estimate(np.stack([run.observations[1:] for run in healthy]), about.observation_names)
