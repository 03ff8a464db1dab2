"""Where a policy is put to work: the environment it was trained in, on what it never saw."""

from pathlib import Path
from typing import Any

from metactl.config import TrainConfig, parse
from metactl.policy import Policy, PolicyError
from metactl.rundir import resolve_data

_TRAINING_ONLY = ("random_start", "freeze", "hide", "disturb", "reward_scale")
_EVERYTHING = 1 << 40  # bytes; cut to what the data has


def deployment(
    policy: Policy, *, data: Path | None = None, whole: bool = False, **changes: Any
) -> tuple[str, dict[str, Any]]:
    """Environment id and options of new runs for a policy.

    On the data it was trained on, runs draw from the held-out part; on other data, from all of it.

    Args:
        policy: Its card says where it was trained.
        data: File or folder of other text.
        whole: Learn all of `data` in every run, instead of pieces as in training.
        changes: Options that differ from training; `None` changes nothing.

    Raises:
        PolicyError: If the card does not say where the policy was trained.
        ConfigError: If the data does not exist.
    """
    if "config" not in policy.card.training:
        raise PolicyError("The policy's card does not say in which environment it was trained")
    trained = parse(TrainConfig, policy.card.training["config"], "the policy's card").environment
    options = {k: v for k, v in trained.options.items() if k not in _TRAINING_ONLY}
    options |= {"split": "meta_test", "n_control_steps": policy.card.n_control_steps}
    if data is not None:
        resolved = resolve_data({"data": str(data)})["data"]
        if resolved != trained.options.get("data"):
            options["split"] = "all"
        options["data"] = resolved
        if whole:
            options["unique_bytes"] = [_EVERYTHING, _EVERYTHING]
    return trained.id, options | {k: v for k, v in changes.items() if v is not None}
