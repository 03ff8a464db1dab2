"""What is claimed of a policy, again, on tasks that nobody has looked at while it was made.

    python -m benchmarks.confirm --json docs/confirm.json
    python -m benchmarks.confirm --places default --rival runs/progress/policy --json FILE

Everywhere that docs/evidence.md evaluates, with another seed: other stretches of text, other peak
learning rates, other weights. Against the default setting, a good one, its own replay, its moves in
another run of the task (with that task's peak learning rate), and rivals; and by the task's peak
learning rate, in thirds. What is finished is in the file at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from benchmarks.places import PLACES, Place, differences, named, where_of
from benchmarks.provenance import write
from metactl.evaluation import Results, play_arms
from metactl.evaluation.arms import (
    chosen_arm,
    from_arm,
    known_of_tasks,
    other_seed_arm,
    policy_arm,
    replay_arm,
    static_arm,
    yoked_arm,
)
from metactl.evaluation.place import RunCounter
from metactl.policy import Policy
from metactl.progress import bar
from metactl.rundir import writable

_GOOD = {"dropout": 0.0, "rope_base": 8.0}  # the best of a few that are the same everywhere
_RATE = -1  # of the descriptors


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which policy, and where."""

    json: Path
    """Where the figures go."""
    policy: str = "default"
    """Folder of a policy, or the name of one that ships."""
    rival: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Another policy, by folder or name."""
    places: tuple[str, ...] = tuple(PLACES)
    """Of default, english, cpp, 480, 960, d64, d64_480, d128; recall, waves, digits."""
    seed: int = 1
    """Of the tasks, from 0. Those of 0 have been looked at while policies were made."""


def confirm(policy: Policy, rivals: dict[str, Policy], place: Place, seed: int) -> dict[str, Any]:
    """Paired differences of the policy to all other arms in a place: JSON values."""
    n = place.n_tasks
    with where_of(policy, place).open() as shards, bar("Paired runs") as progress:
        knobs = shards.knobs
        default = knobs.default_positions(1)[0]
        lowest = {name: max(value, knobs[name].low) for name, value in _GOOD.items()}
        arms = [policy_arm(policy, default), static_arm("default", default)]
        arms += [chosen_arm(knobs, lowest), other_seed_arm(policy, default)]
        arms += [from_arm(rival, f"rival {name}", default) for name, rival in rivals.items()]
        count = RunCounter((len(arms) + 2) * n, progress)
        played = play_arms(shards, arms, n, seed, count)
        donors = played.pop("policy, other seeds")
        blind = [replay_arm(played["policy"], default), yoked_arm(donors, default)]
        played |= play_arms(shards, blind, n, seed, count)
        rates = known_of_tasks(shards, n, seed)[:, _RATE]
    found = _against(played)
    if np.ptp(rates) > 0:
        thirds = np.array_split(np.argsort(rates), 3)
        found["by_peak_learning_rate"] = [
            {
                "from": float(10 ** rates[inside].min()),
                "to": float(10 ** rates[inside].max()),
                **_against({arm: [runs[i] for i in inside] for arm, runs in played.items()}),
            }
            for inside in thirds
        ]
    return found


def _against(played: Results) -> dict[str, Any]:
    return differences(played, [("policy", arm) for arm in played if arm != "policy"])


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    try:
        if options.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {options.seed}")
        writable(options.json)
        places = named(options.places)
        policy = Policy.load(options.policy)
        rivals = {name: Policy.load(name) for name in options.rival}
    except ValueError as error:
        print(f"confirm: {error}", file=sys.stderr)
        sys.exit(2)
    figures: dict[str, Any] = {"policy": options.policy, "seed": options.seed, "places": {}}
    for name, place in places.items():
        figures["places"][name] = found = confirm(policy, rivals, place, options.seed)
        write(options.json, figures)
        print(name, *_lines(found), flush=True)


def _lines(found: dict[str, Any]) -> Sequence[str]:
    return [f"{pair} {x['estimate']:+.4f}" for pair, x in found["final_test_minus"].items()]


if __name__ == "__main__":
    main()
