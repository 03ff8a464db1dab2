"""Runs that something befalls: how far they are thrown, and how soon they are back."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from metactl.evaluation.arms import Results
from metactl.evaluation.summary import drive_of, finite_mean, summarise
from metactl.homeostasis import SetPoints, settling_steps
from metactl.knobs import FloatArray
from metactl.rollout import PlayedRun


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
    for arm, runs in disturbed.items():
        figures = summary["arms"][arm]
        del figures["best_checkpoint_test"]  # it may be of the task that a run has left
        if arm in summary["policy_minus"]:
            del summary["policy_minus"][arm]["best_checkpoint_test"]
        twins = undisturbed[arm]
        figures["excess_loss_area"] = float(
            np.mean([_excess(run, twin) for run, twin in zip(runs, twins, strict=True)])
        )
        if set_points is None:
            continue
        drive = drive_of(runs, set_points, names)
        befallen = [(d, _onset(run)) for d, run in zip(drive, runs, strict=True)]
        after = [(d, onset) for d, onset in befallen if onset is not None]
        if after:
            n_control_steps = drive.shape[1]
            settling = [settling_steps(d, onset) / n_control_steps for d, onset in after]
            figures["settling_time"] = float(np.mean(settling))
            figures["peak_drive"] = finite_mean(np.array([d[onset:].max() for d, onset in after]))
    return summary


def _onset(run: PlayedRun) -> int | None:
    """Index of the control step in which the disturbance began."""
    return int(run.disturbed.argmax()) if run.disturbed.any() else None


def _excess(run: PlayedRun, twin: PlayedRun) -> float:
    """Area between the probe losses of a run and its twin since the onset, in nats x progress."""
    onset = _onset(run)
    if onset is None:
        return 0.0
    ours, theirs = (_known(each)[onset + 1 :] for each in (run, twin))
    return float((ours - theirs).sum() / len(run.train_loss))


def _known(run: PlayedRun) -> FloatArray:
    """Probe losses; a run that diverged counts as never trained."""
    return np.where(np.isfinite(run.probe_loss), run.probe_loss, run.probe_loss[0])
