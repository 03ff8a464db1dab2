"""One trial: train a policy (or take one), score it, and leave the result in its folder.

A trial that was killed goes on from its newest checkpoint, and one that is finished is not done
again; so whoever starts trials may fail at any moment, and start all of them again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metactl.checkpoint import load_newest_checkpoint
from metactl.evaluation.summary import column
from metactl.policy import Policy
from metactl.sweep.check import check_trials
from metactl.sweep.config import SweepConfig, Trial, trial_folder
from metactl.sweep.result import read_result, write_result
from metactl.sweep.score import gain, play_kinds, play_pair
from metactl.sweep.searcher import placed
from metactl.train import train

Report = Callable[[int, float], None]
"""Called with the control steps learned from, and the mean return of the runs that ended."""


def run_trial(config: SweepConfig, trial: Trial, root: Path, report: Report) -> dict[str, Any]:
    """Does a trial, or what is left of it.

    Args:
        config: The sweep.
        trial: Which.
        root: The sweep's directory.
        report: Told about learning; it may raise to stop the trial.

    Returns:
        `score`: what the policy gains over default knobs, in nats per token on paired runs that no
        trial trained on, of every kind that this one learned on; its interval; and what the trial
        varied.
    """
    folder = trial_folder(root, trial.name)
    done = read_result(folder)
    if done is not None:
        return done
    torch.set_num_threads(max(1, int(config.resources.cpu)))
    folder.mkdir(parents=True, exist_ok=True)
    trial = placed(config, trial, root, check=lambda moved: check_trials([moved]))
    if trial.recipe is not None:
        begun = load_newest_checkpoint(folder / "checkpoints") is not None
        policy = train(trial.recipe, folder, resume=begun, report=report)
        pair = play_kinds(config, policy)
    else:
        pair = play_pair(config, Policy.load(trial.policy), trial.options)
    default, loss = (column(pair[arm], "final_test") for arm in ("default", "policy"))
    result = {"trial": trial.name, "changes": trial.changes, **gain(default, loss)}
    write_result(folder, result)
    return result
