"""One trial: train a policy (or take one), score it, and leave the result in its folder.

A trial that was killed goes on from its newest checkpoint, and one that is finished is not done
again; so whoever starts trials may fail at any moment, and start all of them again.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from metactl.checkpoint import load_newest_checkpoint
from metactl.config import ConfigError
from metactl.deployment import deployment
from metactl.evaluation import play_arms, policy_arm, static_arm, summarise
from metactl.files import write_atomically
from metactl.knobs import KnobSet
from metactl.policy import Policy
from metactl.shards import ShardRow
from metactl.sweep.config import SweepConfig, Trial, described, trial_folder
from metactl.sweep.result import RESULT, read_result
from metactl.sweep.searcher import placed
from metactl.train import train
from metactl.vec_env import check_pairs

_N_ENVS = 16
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
        trial trained on; its interval; and what the trial varied.
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
    else:
        policy = Policy.load(trial.policy)
    score = _score(config, policy, trial.options)
    result = {"trial": trial.name, "changes": trial.changes, **score}
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / RESULT, text.encode())
    return result


def check_trials(trials: Sequence[Trial], *, elsewhere: bool = False) -> None:
    """Builds one of each kind of run, so that what refuses it does so before anything starts.

    Args:
        trials: The trials.
        elsewhere: They will run where there are GPUs, which this machine may not have.

    Raises:
        ConfigError: With the trial, and the words of whatever refuses it.
    """
    built: set[str] = set()
    for trial in trials:
        try:
            for env_id, options in _runs_of(trial):
                if elsewhere and "device" in options:
                    options |= {"device": "cpu"} | {k: False for k in options if k == "compile"}
                key = json.dumps([env_id, options], sort_keys=True, default=str)
                if key not in built:
                    ShardRow(env_id, 1, options, 0).close()
                built.add(key)
        except ValueError as error:
            where = f"trial {trial.name} ({described(trial.changes)})"
            raise ConfigError(f"{where}: {error}") from error


def _runs_of(trial: Trial) -> Iterator[tuple[str, dict[str, Any]]]:
    """Environment and options of each kind of run that a trial has."""
    if trial.recipe is None:
        yield deployment(Policy.load(trial.policy), **trial.options)
        return
    environment = trial.recipe.environment
    check_pairs(environment.n_envs, trial.recipe.ppo.paired_runs)
    for variant in environment.variants or ({},):
        yield environment.id, {**environment.options, **variant}


def _score(config: SweepConfig, policy: Policy, options: dict[str, Any]) -> dict[str, Any]:
    """Paired runs at default knobs and under the policy.

    The text is that of meta-training: what a sweep chooses by, its winner's report must not see.
    """
    env_id, deployed = deployment(policy, **options)
    if "split" in deployed:
        deployed["split"] = "meta_train"
    with ShardRow(env_id, min(_N_ENVS, 2 * config.n_tasks), deployed, 0) as shards:
        default = KnobSet(shards.describe()["knobs"]).default_positions(1)[0]
        arms = [
            static_arm("default", default),
            policy_arm(policy, default),
        ]
        summary = summarise(play_arms(shards, arms, config.n_tasks, config.seed))
    difference = summary["policy_minus"]["default"]["final_test"]
    return {
        "score": -difference["estimate"],
        "score_low": -difference["high"],
        "score_high": -difference["low"],
        "default_loss": summary["arms"]["default"]["final_test"],
        "policy_loss": summary["arms"]["policy"]["final_test"],
    }
