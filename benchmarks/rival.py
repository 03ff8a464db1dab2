r"""Another policy beside the shipped one, the mean of the two, and the default setting.

    metactl evaluate --policy default --linear-runs 2688 ... --run-dir runs/grid
    python -m benchmarks.rival --rival runs/grid/linear --json docs/rival.json

    metactl train --config configs/long.yaml --run-dir runs/long    # benchmarks/policies/long
    python -m benchmarks.rival --rival benchmarks/policies/long \
        --places default english 480 960 --json docs/long.json

The mean acts as both do on average. All are guarded, begin at the default setting and live
through the same runs, those of the evaluations in docs/evidence.md. What is finished is in the file
at once.
"""

import math
import sys
from dataclasses import dataclass
from itertools import combinations, compress
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.places import PLACES, Place, differences, named, where_of
from benchmarks.provenance import write
from metactl.evaluation import play_arms
from metactl.evaluation.arms import from_arm, static_arm
from metactl.evaluation.place import RunCounter
from metactl.evaluation.summary import epoch_groups
from metactl.policy import Policy
from metactl.progress import bar


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which policies, and where."""

    rival: Path
    """Folder of the other policy."""
    json: Path
    """Where the figures go."""
    policy: str = "default"
    """Folder of a policy, or the name of one that ships."""
    places: tuple[str, ...] = tuple(PLACES)
    """Of default, english, cpp, 480, 960, d64, d64_480, d128; recall, waves, digits."""


def compare(policies: dict[str, Policy], place: Place) -> dict[str, Any]:
    """Test losses of all, and how far apart they are: over all tasks, and by epochs of the data."""
    with (
        where_of(policies["policy"], place).open() as shards,
        bar("Paired runs") as progress,
    ):
        default = shards.knobs.default_positions(1)[0]
        arms = [from_arm(each, name, default) for name, each in policies.items()]
        arms.append(static_arm("default", default))
        count = RunCounter(len(arms) * place.n_tasks, progress)
        played = play_arms(shards, arms, place.n_tasks, 0, count)
        names = shards.describe().observation_names
    pairs = list(combinations(played, 2))
    found = differences(played, pairs)
    found["by_epochs"] = []
    for (low, high), inside in epoch_groups(played["policy"], names):
        group = {arm: list(compress(runs, inside)) for arm, runs in played.items()}
        to = high if math.isfinite(high) else None
        found["by_epochs"].append({"from": low, "to": to, **differences(group, pairs)})
    return found


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    try:
        places = named(options.places)
        policy, rival = Policy.load(options.policy), Policy.load(options.rival)
        alike = rival if rival.card.hidden else rival.as_network(policy.card.hidden)
        mean = Policy.mean_of([policy, alike])
    except ValueError as error:
        print(f"rival: {error}", file=sys.stderr)
        sys.exit(2)
    policies = {"mean": mean, "policy": policy, "rival": rival}
    figures: dict[str, Any] = {"places": {}}
    for name, place in places.items():
        figures["places"][name] = found = compare(policies, place)
        write(options.json, figures)
        ends = found["final_test_minus"].items()
        print(name, *(f"{pair} {x['estimate']:+.4f}" for pair, x in ends), flush=True)


if __name__ == "__main__":
    main()
