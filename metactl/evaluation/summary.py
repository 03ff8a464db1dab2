"""What an evaluation says: means, paired differences with intervals, and how runs got there."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metactl.arrays import six_digits
from metactl.evaluation.arms import Results
from metactl.homeostasis import SetPoints, control_effort, homeostasis_index
from metactl.knobs import FloatArray
from metactl.rollout import PlayedRun
from metactl.signals import INTERNAL_NAMES
from metactl.statistics import (
    Interval,
    gap_closed,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
    worst_decile,
)

_PER_TASK = ("final_test_per_task", "best_checkpoint_test_per_task")
_LEAST = 1e-12  # nats: a loss may be 0
_EPOCHS = (0.0, 1.0, 10.0, np.inf)  # of the unique data by the end of a run: bounds of the groups


def summarise(
    results: Results,
    *,
    oracle_name: str | None = None,
    set_points: SetPoints | None = None,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Means per arm and paired differences to the policy, as JSON values (nats per token).

    Args:
        results: Of all arms, `"policy"` among them.
        oracle_name: The arm that bounds the gap to `"best static"`, if there are both.
        set_points: Of healthy runs, for the homeostasis index.
        names: Of the observations' entries.
    """
    arms = {arm: _figures(runs, set_points, names) for arm, runs in results.items()}
    differences = {
        arm: _differences(results["policy"], runs)
        for arm, runs in results.items()
        if arm != "policy"
    }
    summary: dict[str, Any] = {"arms": arms, "policy_minus": differences}
    if oracle_name is not None:
        policy, static, oracle = (
            column(results[arm], "final_test") for arm in ("policy", "best static", oracle_name)
        )
        summary["gap"] = plain(paired_difference(static, oracle))
        summary["gap_closed"] = plain(gap_closed(policy, static, oracle))
    return summary


def column(runs: Sequence[PlayedRun], name: str) -> FloatArray:
    """One number of every run."""
    return np.array([getattr(run, name) for run in runs], dtype=np.float64)


def _figures(
    runs: Sequence[PlayedRun], set_points: SetPoints | None, names: Sequence[str]
) -> dict[str, Any]:
    figures = {
        "final_test": float(column(runs, "final_test").mean()),
        "final_test_iqm": interquartile_mean(column(runs, "final_test")),
        "best_checkpoint_test": float(column(runs, "best_test").mean()),
        "flops": finite_mean(np.array([run.flops[-1] for run in runs])),
        "diverged": int(column(runs, "diverged").sum()),
        "control_effort": float(control_effort(np.stack([run.positions for run in runs])).mean()),
        "final_knobs": final_knobs(runs),
        **{
            key: column(runs, name).tolist()
            for key, name in zip(_PER_TASK, ("final_test", "best_test"), strict=True)
        },
    }
    inside = [name for name in INTERNAL_NAMES if f"signal/{name}" in names]
    if inside:
        figures["mean_signals"] = {name: _mean_signal(runs, names, name) for name in inside}
    if set_points is not None:
        drive = drive_of(runs, set_points, names)
        figures["homeostasis_index"] = float(homeostasis_index(drive).mean())
        figures["mean_drive"] = finite_mean(drive)
    return figures


def final_knobs(runs: Sequence[PlayedRun]) -> dict[str, dict[str, float]]:
    """Where each knob ends: median, 10th and 90th percentile, and the share of runs at a bound."""
    ends = np.stack([run.positions[-1] for run in runs])
    found = {}
    for i, name in enumerate(runs[0].values):
        values = np.array([run.values[name][-1] for run in runs])
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
        bounds = {"at_lowest": ends[:, i] <= 0, "at_highest": ends[:, i] >= 1}
        shares = {bound: float(there.mean()) for bound, there in bounds.items()}
        spread = {"median": float(middle), "tenth": float(low), "ninetieth": float(high)}
        found[name] = spread | shares
    return found


def _mean_signal(runs: Sequence[PlayedRun], names: Sequence[str], name: str) -> float | None:
    """Over all runs and control steps in which it was measured."""
    value, flag = (list(names).index(f"{part}/{name}") for part in ("signal", "has"))
    seen = np.concatenate([run.observations[1:] for run in runs])
    return finite_mean(seen[seen[:, flag] > 0, value])


def drive_of(runs: Sequence[PlayedRun], set_points: SetPoints, names: Sequence[str]) -> FloatArray:
    """Drive after each control step, `[n_runs, n_control_steps]`; infinite once a run diverged."""
    drive = set_points.drive(np.stack([run.observations[1:] for run in runs]), names)
    finite = np.stack([np.isfinite(run.probe_loss[1:]) for run in runs])
    return np.where(np.logical_and.accumulate(finite, axis=1), drive, np.inf)


def finite_mean(values: FloatArray) -> float | None:
    """Mean of what is finite, if anything is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _differences(policy: Sequence[PlayedRun], other: Sequence[PlayedRun]) -> dict[str, Any]:
    ours, theirs = column(policy, "final_test"), column(other, "final_test")
    best_ours, best_theirs = column(policy, "best_test"), column(other, "best_test")
    return {
        "final_test": plain(paired_difference(ours, theirs)),
        "best_checkpoint_test": plain(paired_difference(best_ours, best_theirs)),
        "probability_of_improvement": probability_of_improvement(ours, theirs),
        "iqm": interquartile_mean(ours - theirs),
        "worst_decile_regret": worst_decile(ours / np.maximum(theirs, _LEAST) - 1),
        "within_2_percent": float((ours <= 1.02 * theirs).mean()),
        **cost_to_reach(policy, other),
    }


def by_epochs(results: Results, names: Sequence[str]) -> list[dict[str, Any]]:
    """Differences of the policy to every arm, by how often the runs saw their data.

    Below one epoch nothing can be learned by heart; with many, regularisation pays.

    Args:
        results: Of all arms, `"policy"` among them.
        names: Of the observations' entries.

    Returns:
        By group that has tasks: `from` and `to` (epochs, `None` without end), `n_tasks`, and
        `policy_minus` by arm, final test losses in nats per token. Tasks that do not say how much
        data they have are in none.
    """
    runs = results["policy"]
    groups = []
    for (low, high), inside in epoch_groups(runs, names):
        ours = column(runs, "final_test")[inside]
        minus = {
            arm: plain(paired_difference(ours, column(others, "final_test")[inside]))
            for arm, others in results.items()
            if arm != "policy"
        }
        end = high if np.isfinite(high) else None
        group = {"from": low, "to": end, "n_tasks": int(inside.sum()), "policy_minus": minus}
        groups.append(group)
    return groups


def epoch_groups(
    runs: Sequence[PlayedRun], names: Sequence[str]
) -> list[tuple[tuple[float, float], NDArray[np.bool_]]]:
    """Bounds in epochs, and who ends between them, `[n_runs]`; of groups that have any."""
    entries = [list(names).index(name) for name in ("has/unique_tokens", "signal/epochs")]
    seen = np.array([run.observations[:, entries].max(axis=0) for run in runs], dtype=np.float64)
    known, epochs = seen[:, 0] > 0, 10 ** seen[:, 1] - 1
    groups = [
        (ends, known & (epochs >= ends[0]) & (epochs < ends[1])) for ends in pairwise(_EPOCHS)
    ]
    return [(ends, inside) for ends, inside in groups if inside.any()]


def cost_to_reach(policy: Sequence[PlayedRun], other: Sequence[PlayedRun]) -> dict[str, Any]:
    """What the policy needs to reach the other arm's final probe loss.

    Returns:
        Medians over tasks: the share of its run's control steps, and its FLOPs as a share of all
        that the other spent (`None` where nobody counts them). And `saved_share_of_run`, a mean
        with its interval: how much earlier than the other arm itself, which may be there before it
        ends. A run that never gets there counts as 2 runs.
    """
    steps, flops, saved = [], [], []
    for ours, theirs in zip(policy, other, strict=True):
        reached = np.flatnonzero(ours.probe_loss <= theirs.final_probe)
        first = int(reached[0]) if len(reached) else None
        steps.append(2.0 if first is None else first / len(ours.flops))
        own = np.flatnonzero(theirs.probe_loss <= theirs.final_probe)[0] / len(theirs.flops)
        saved.append(own - steps[-1])
        spent = 2.0 * theirs.flops[-1] if first is None else (0.0, *ours.flops)[first]
        flops.append(spent / theirs.flops[-1])
    counted = np.isfinite(flops).all()
    return {
        "share_of_run_to_its_final_loss": float(np.median(steps)),
        "share_of_flops_to_its_final_loss": float(np.median(flops)) if counted else None,
        "saved_share_of_run": plain(paired_difference(np.array(saved), np.zeros(len(saved)))),
    }


def break_even(summary: dict[str, Any], n_training_runs: int) -> dict[str, float | None]:
    """By arm, after how many runs a training has paid for itself, in optimizer steps.

    A run under the policy may stop where it reaches the arm's final loss, so it saves what the arm
    itself takes beyond that.

    Args:
        summary: Of an evaluation.
        n_training_runs: What training the policy cost, in runs of the same size.

    Returns:
        Runs; `None` where nothing is saved on average.
    """
    saved = {
        arm: difference["saved_share_of_run"]["estimate"]
        for arm, difference in summary["policy_minus"].items()
    }
    return {arm: n_training_runs / share if share > 0 else None for arm, share in saved.items()}


def moves_explained_by_progress(runs: Sequence[PlayedRun]) -> FloatArray:
    """R^2 of each knob's moves on the control step alone: 1 for a schedule; 0 where none moves."""
    moves = np.diff(np.stack([run.positions for run in runs]), axis=1)
    total = moves.var(axis=(0, 1))
    by_step = moves.mean(axis=0).var(axis=0)
    return np.divide(by_step, total, out=np.zeros_like(total), where=total > 0)


def plain(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON values; what is unbounded is null."""
    return {k: v if np.isfinite(v) else None for k, v in asdict(interval).items()}


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation that belong on a policy's card: no lists, and six digits."""
    arms = {
        arm: {name: value for name, value in figures.items() if name not in _PER_TASK}
        for arm, figures in summary["arms"].items()
    }
    short = {**summary, "arms": arms}
    for part in ("disturbed", "begun_at_best_static"):
        if part in summary:
            short[part] = headline(summary[part])
    rounded: dict[str, Any] = six_digits(short)
    return rounded
