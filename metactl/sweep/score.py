"""What a sweep's trials are scored by: paired runs that no trial trained on.

The text is that of meta-training: what a sweep chooses by, its winner's report must not see.
"""

import math
from dataclasses import replace
from typing import Any

from metactl.deployment import deployment, kinds_of_runs
from metactl.evaluation import Results, play_arms, policy_arm, static_arm
from metactl.knobs import FloatArray
from metactl.policy import Policy
from metactl.shards import ShardRow
from metactl.statistics import paired_difference
from metactl.sweep.config import SweepConfig

_N_ENVS = 16


def runs_of(policy: Policy, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Environment id and options of the runs that score a trial.

    Args:
        policy: Who moves the knobs, or whose runs they are.
        options: Of the environment; beside them `data`, and `environment`, its id, where it is not
            ours (see `deployment`).
    """
    changes = dict(options)
    apart = {name: changes.pop(name, None) for name in ("data", "environment")}
    env_id, deployed = deployment(policy, changes, **apart)
    return env_id, {**deployed, "split": "meta_train"}


def play_pair(config: SweepConfig, policy: Policy, options: dict[str, Any]) -> Results:
    """The same tasks at default knobs and under a policy: arms `"default"` and `"policy"`."""
    env_id, deployed = runs_of(policy, options)
    with ShardRow(env_id, min(_N_ENVS, 2 * config.n_tasks), deployed, 0) as shards:
        default = shards.knobs.default_positions(1)[0]
        arms = [static_arm("default", default), policy_arm(policy, default)]
        return play_arms(shards, arms, config.n_tasks, config.seed)


def play_kinds(config: SweepConfig, policy: Policy) -> Results:
    """The same on every kind of run that a policy learned on, in equal shares: a policy chosen on
    one kind may be poor on another.
    """
    kinds, own = kinds_of_runs(policy), policy.card.training["config"]["environment"]["id"]
    share = replace(config, n_tasks=max(2, math.ceil(config.n_tasks / len(kinds))))
    played = [
        play_pair(replace(share, seed=config.seed + i), policy, {**kind, "environment": own})
        for i, kind in enumerate(kinds)
    ]
    return {arm: [run for pair in played for run in pair[arm]] for arm in played[0]}


def gain(default: FloatArray, loss: FloatArray) -> dict[str, float]:
    """What a trial gains over default knobs, in nats per token; from test losses, `[n_tasks]`."""
    difference = paired_difference(default, loss)
    return {
        "score": difference.estimate,
        "score_low": difference.low,
        "score_high": difference.high,
        "default_loss": float(default.mean()),
        "loss": float(loss.mean()),
    }
