"""Where a policy is put to work: the environment it was trained in, on what it never saw."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metactl.config import TrainConfig, parse
from metactl.policy import Policy, PolicyError
from metactl.rundir import resolve_data

_TRAINING_ONLY = ("random_start", "freeze", "hide", "disturb", "reward_scale")
_OURS = "envs"  # the package of our own environments
_OF_TEXT, _TEXT = ("data", "other_data"), "text"  # options, and the family of tasks that has them
_EVERYTHING = 1 << 40  # bytes; cut to what the data has


def deployment(
    policy: Policy,
    changes: Mapping[str, Any] | None = None,
    *,
    data: Path | None = None,
    whole: bool = False,
    environment: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """Environment id and options of new runs for a policy.

    On the data it was trained on, runs draw from the held-out part; on other data, from all of it.

    Args:
        policy: Its card says where it was trained.
        changes: Options that differ from training; a value of `None` changes nothing.
        data: File or folder of other text.
        whole: Learn all of `data` in every run, instead of pieces as in training.
        environment: The id of the environment that the policy was trained in, where it is not ours:
            a card alone never says which module is imported.

    Raises:
        PolicyError: If the card does not say where the policy was trained, or names somebody
            else's environment, and nobody vouches for it.
        ConfigError: If the data does not exist.
    """
    recipe = _recipe(policy)
    if recipe is None:
        raise PolicyError("The policy's card does not say in which environment it was trained")
    trained = recipe.environment
    if not _is_ours(trained.id) and trained.id != environment:
        raise PolicyError(
            f"The policy was trained in {trained.id!r}, and a card may not choose which code runs "
            f"here; if you trust that module, name it: --environment {trained.id} (of a sweep, "
            f"among its options)"
        )
    options = {k: v for k, v in trained.options.items() if k not in _TRAINING_ONLY}
    options |= {"split": "meta_test", "n_control_steps": policy.card.n_control_steps}
    if data is not None:
        resolved = resolve_data({"data": str(data)})["data"]
        places = (trained.options, *trained.variants)
        seen = [place.get(name) for place in places for name in _OF_TEXT]
        if resolved not in seen:
            options["split"] = "all"
        options["data"] = resolved
        if whole:
            options["unique_bytes"] = [_EVERYTHING, _EVERYTHING]
    changed = {k: v for k, v in (changes or {}).items() if v is not None}
    if "task" in changed and data is None:
        options = for_task(trained.id, options, changed["task"])
    return trained.id, options | resolve_data(changed)


def for_task(environment: str, options: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Options of the runs of another family of tasks; of ours, all but text make their own data."""
    makes_its_own = _is_ours(environment) and task != _TEXT
    unwanted = _OF_TEXT if makes_its_own else ()
    return {k: v for k, v in options.items() if k not in unwanted} | {"task": task}


def flag_for(environment: str) -> str:
    """What a command needs to use a policy that was trained in an environment; ends in a space."""
    return "" if _is_ours(environment) else f"--environment {shlex.quote(environment)} "


def _is_ours(environment: str) -> bool:
    return environment.partition(":")[0] == _OURS


def kinds_of_runs(policy: Policy) -> list[dict[str, Any]]:
    """By kind of run that a policy learned on: what it changes in the options."""
    recipe = _recipe(policy)
    variants = () if recipe is None else recipe.environment.variants
    found = [{k: v for k, v in each.items() if k not in _TRAINING_ONLY} for each in variants]
    return found or [{}]


def n_training_runs(policy: Policy) -> int | None:
    """How many runs it took to train a policy; `None` if its card does not say."""
    recipe = _recipe(policy)
    if recipe is None:
        return None
    runs = policy.card.members * recipe.ppo.total_timesteps / policy.card.n_control_steps
    return round(runs)


def _recipe(policy: Policy) -> TrainConfig | None:
    held = policy.card.training.get("config")
    return None if held is None else parse(TrainConfig, held, "the policy's card")
