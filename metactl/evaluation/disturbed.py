"""Runs that something befalls: how far they are thrown, and how soon they are back."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from metactl.evaluation.arms import Results
from metactl.evaluation.summary import drive_of, finite_mean, plain, summarise
from metactl.homeostasis import SetPoints, settling_steps
from metactl.knobs import FloatArray
from metactl.rollout import PlayedRun
from metactl.statistics import paired_difference

_REACHED = (
    *("share_of_run_to_its_final_loss", "share_of_flops_to_its_final_loss"),
    "saved_share_of_run",
)


def disturbed_summary(
    disturbed: Results, undisturbed: Results, set_points: SetPoints | None, names: Sequence[str]
) -> dict[str, Any]:
    """Final losses of disturbed runs, and what each arm lost to the disturbance.

    Args:
        disturbed: By arm.
        undisturbed: The same arms' twins, on the same tasks and seeds, with nothing befalling them.
        set_points: Of healthy runs; without them nothing is said of the drive.
        names: Of the observations' entries.
    """
    summary = summarise(disturbed, set_points=set_points, names=names)
    excess = {
        arm: np.array([_excess(*pair) for pair in zip(runs, undisturbed[arm], strict=True)])
        for arm, runs in disturbed.items()
    }
    for arm, runs in disturbed.items():
        figures = summary["arms"][arm]
        for name in ("best_checkpoint_test", "best_checkpoint_test_per_task"):
            del figures[name]  # it may be of the task that a run has left
        figures["excess_loss_area"] = float(excess[arm].mean())
        if arm in summary["policy_minus"]:
            minus = summary["policy_minus"][arm]
            for name in ("best_checkpoint_test", *_REACHED):
                minus.pop(name, None)  # likewise
            minus["excess_loss_area"] = plain(paired_difference(excess["policy"], excess[arm]))
        if set_points is None:
            continue
        onsets = [_onset(run) for run in runs]
        drive, twins = (
            [(d, onset) for d, onset in zip(each, onsets, strict=True) if onset is not None]
            for each in (
                drive_of(runs, set_points, names),
                drive_of(undisturbed[arm], set_points, names),
            )
        )
        if drive:
            figures["settling_time"] = _settling(drive)
            figures["settling_time_undisturbed"] = _settling(twins)  # from the same steps on
            figures["peak_drive"] = finite_mean(np.array([d[onset:].max() for d, onset in drive]))
    return summary


def _settling(befallen: Sequence[tuple[FloatArray, int]]) -> float:
    """Mean time from each onset until a run has settled, as a share of the run."""
    return float(np.mean([settling_steps(drive, onset) / len(drive) for drive, onset in befallen]))


def _onset(run: PlayedRun) -> int | None:
    """Index of the control step in which the disturbance began."""
    return int(run.disturbed.argmax()) if run.disturbed.any() else None


def _excess(run: PlayedRun, twin: PlayedRun) -> float:
    """Area between the probe losses of a run and its twin since the onset, in nats times share of
    the whole run.
    """
    onset = _onset(run)
    if onset is None:
        return 0.0
    ours, theirs = (_known(each)[onset + 1 :] for each in (run, twin))
    return float((ours - theirs).sum() / len(run.train_loss))


def _known(run: PlayedRun) -> FloatArray:
    """Probe losses; a run that diverged counts as never trained."""
    return np.where(np.isfinite(run.probe_loss), run.probe_loss, run.probe_loss[0])
