"""Runs that no policy was trained on: other text, larger models, longer runs, other families.

And how benchmarks play there, and what they say of it.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metactl.deployment import deployment
from metactl.evaluation import Results, Where
from metactl.evaluation.summary import column, plain
from metactl.policy import Policy
from metactl.shards import default_workers
from metactl.statistics import paired_difference


@dataclass(frozen=True, kw_only=True)
class Place:
    """Runs of one kind.

    Args:
        n_tasks: How many.
        grid: Static settings that a policy is compared with there.
        options: Of the environment.
        data: Text to learn; the Python standard library by default.
    """

    n_tasks: int = 32
    grid: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    data: Path | None = None


def _inside(package: str, *path: str) -> Path:
    """A file or folder of an installed package."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent.joinpath(*path)


_PROSE, _CPP = _inside("pydoc_data", "topics.py"), _inside("torch", "include", "c10")

PLACES = {
    "default": Place(n_tasks=64, options={"horizon": 240}),
    "english": Place(n_tasks=64, options={"horizon": 240}, data=_PROSE),
    "cpp": Place(n_tasks=64, options={"horizon": 240}, data=_CPP),
    "480": Place(options={"horizon": 480}),
    "960": Place(grid=32, options={"horizon": 960}),
    "d64": Place(options={"horizon": 240, "d_model": 64}),
    "d64_480": Place(grid=32, options={"horizon": 480, "d_model": 64}),
    "d128": Place(grid=16, options={"horizon": 240, "d_model": 128, "n_layers": 3}),
}
FAMILIES = {
    task: Place(options={"horizon": 240, "context": 64, "task": task})
    for task in ("recall", "waves", "digits")
}


def named(names: Sequence[str]) -> dict[str, Place]:
    """The places of these names.

    Raises:
        ValueError: For one that is unknown.
    """
    places = PLACES | FAMILIES
    if unknown := sorted(set(names) - set(places)):
        raise ValueError(f"places must be of {', '.join(places)}, got {', '.join(unknown)}")
    return {name: places[name] for name in names}


def where_of(policy: Policy, place: Place) -> Where:
    """The environment of a place, as a policy is put to work there."""
    options = {**place.options, "compile": True}
    env_id, options = deployment(policy, options, data=place.data)
    return Where(env_id=env_id, options=options, n_envs=16, n_workers=default_workers())


def differences(played: Results, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Mean test losses of all arms, and paired differences of some, at the end and at the best
    checkpoint: JSON values.
    """
    found: dict[str, Any] = {"n_tasks": len(next(iter(played.values())))}
    for which in ("final_test", "best_test"):
        losses = {name: column(runs, which) for name, runs in played.items()}
        found[which] = {name: float(loss.mean()) for name, loss in losses.items()}
        found[f"{which}_minus"] = {
            f"{one} - {other}": plain(paired_difference(losses[one], losses[other]))
            for one, other in pairs
        }
    return found
