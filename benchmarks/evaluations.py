"""Evaluates a policy wherever docs/evidence.md does, place by place.

    metactl train --config default --set ppo.signals=[progress] --run-dir runs/progress
    python -m benchmarks.evaluations --rival runs/progress/policy
    python -m benchmarks.evaluations --dry-run       # only prints the commands
    python -m benchmarks.evaluations d64 cpp         # some places

Figures go into docs/evaluation_NAME.json, with machine and commit. What was played is kept in
RUN_DIR/NAME: the same command goes on after a stop. All arms in the first place, where rivals are
played, too; elsewhere the main ones.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.places import FAMILIES, PLACES, Place, named
from benchmarks.provenance import write
from metactl.policy import Policy

_FIRST = "default"
_STATICS = ("dropout=0", "dropout=0,rope_base=8")
_UNMOVED = "weight_decay"  # static settings are of this knob, too


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which policy, and where."""

    places: tyro.conf.Positional[tuple[str, ...]] = (*PLACES, *FAMILIES)
    """Of default, english, cpp, 480, 960, d64, d64_480, d128; recall, waves, digits."""
    policy: str = "default"
    """Folder of a policy, or the name of one that ships."""
    rival: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Another policy, in the first place."""
    seed: int = 1
    """Of the tasks. Those of 0 have been looked at while policies were made."""
    run_dir: Path = Path("runs/evaluations")
    """Where what was played is kept."""
    figures: Path = Path("docs")
    """Folder of the figures."""
    dry_run: bool = False
    """Only print the commands."""


def command(options: Options, name: str, place: Place, knobs: Sequence[str]) -> list[str]:
    """Arguments of `metactl` that evaluate a policy in a place."""
    chosen = {**place.options, "knobs": f"[{','.join((*knobs, _UNMOVED))}]", "compile": "true"}
    arguments = ["evaluate", "--policy", options.policy, "--n-tasks", str(place.n_tasks)]
    arguments += ["--grid", str(place.grid), "--optimizer-steps", str(chosen.pop("horizon"))]
    arguments += ["--seed", str(options.seed)]
    for setting in _STATICS:
        arguments += ["--static", setting]
    for option, value in chosen.items():
        arguments += ["--set", f"{option}={value}"]
    if place.data is not None:
        arguments += ["--data", str(place.data)]
    if name == _FIRST:
        arguments += ["--suite", "full"]
        arguments += ["--figure", str(options.figures / f"evaluation_{name}.png")]
        for rival in options.rival:
            arguments += ["--rival", rival]
    arguments += ["--run-dir", str(options.run_dir / name)]
    return [*arguments, "--json", str(options.figures / f"evaluation_{name}.json")]


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    try:
        places = named(options.places)
        knobs = [knob.name for knob in Policy.load(options.policy).card.knobs]
    except ValueError as error:
        print(f"evaluations: {error}", file=sys.stderr)
        return 2
    for name, place in places.items():
        arguments = command(options, name, place, knobs)
        print("metactl", shlex.join(arguments), flush=True)
        if options.dry_run:
            continue
        done = subprocess.run([sys.executable, "-m", "metactl", *arguments], check=False)
        if done.returncode != 0:
            return done.returncode
        path = options.figures / f"evaluation_{name}.json"
        write(path, json.loads(path.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
