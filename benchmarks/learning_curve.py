"""How soon meta-training pays: policies from along the way, on the tasks of an evaluation.

    metactl sweep --config configs/sweep_default.yaml --run-dir runs/sweep_default
    metactl evaluate ... --json docs/evaluation_first.json
    python -m benchmarks.learning_curve --trainings runs/sweep_default/trials/* \
        --evaluation docs/evaluation_first.json --json FILE --figure FILE

The gap is that of the evaluation, between its best static setting and its best for each task, on
the tasks that are played here: its first ones. Default knobs are played too and must end as they
did there, so that nothing is compared with other tasks.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.provenance import write
from metactl.config import parse_assignment
from metactl.deployment import deployment
from metactl.evaluation import Where, play_arms, static_arm
from metactl.evaluation.arms import from_arm
from metactl.evaluation.place import RunCounter
from metactl.evaluation.summary import column, plain
from metactl.knobs import FloatArray
from metactl.policy import Policy
from metactl.progress import bar
from metactl.report import panels
from metactl.shards import default_workers
from metactl.statistics import gap_closed, paired_difference

_SAME = 0.01  # nats per token on average: the default setting, played twice


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which trainings, and what their policies are measured by."""

    trainings: tuple[Path, ...]
    """Run directories of trainings with `policy_every`, alike but for their seeds."""
    evaluation: Path
    """What `metactl evaluate --json` wrote about a policy of theirs."""
    json: Path
    """Where the figures go."""
    figure: Path | None = None
    """Where the picture goes, as PNG."""
    n_tasks: int = 32
    """Of the evaluation's tasks, the first."""
    every: int = 1
    """Of the policies from along the way, every so many-th; the first and the last are in."""
    set: list[str] = field(default_factory=lambda: ["compile=true"])
    """Options of the environment, as in the evaluation."""
    run_dir: Path | None = None
    """Keep what was played here."""


def main(options: Options) -> None:
    before = json.loads(options.evaluation.read_text(encoding="utf-8"))
    held = {
        name: np.array(before["arms"][name]["final_test_per_task"][: options.n_tasks])
        for name in ("default", "best static", "per-task best static")
    }
    policies = {training: kept_policies(training, options.every) for training in options.trainings}
    losses = _played(options, policies, before, held["default"])
    curves = []
    for training, kept in policies.items():
        minutes = minutes_at(training)
        points = []
        for steps in kept:
            loss = losses[f"{training} {steps}"]
            closed = gap_closed(loss, held["best static"], held["per-task best static"])
            point = {
                "control_steps": steps,
                "minutes": minutes(steps),
                "final_test": float(loss.mean()),
                "minus_best_static": plain(paired_difference(loss, held["best static"])),
                "gap_closed": plain(closed),
            }
            points.append(point)
        seed = kept[max(kept)].card.training["config"]["seed"]
        curves.append({"seed": seed, "points": points, "whole_gap": _first(points)})
    figures = {
        "n_tasks": len(held["default"]),
        "losses": {name: float(loss.mean()) for name, loss in held.items()},
        "curves": curves,
    }
    write(options.json, figures)
    for curve in curves:
        last, first = curve["points"][-1], curve["whole_gap"]
        end = f"seed {curve['seed']}: ends at {_percent(last)} of the gap"
        if first is None:
            print(f"{end}, the whole of it never")
        else:
            print(f"{end}, the whole of it after {first['control_steps']} control steps")
    if options.figure is not None:
        draw(options.figure, curves)


def kept_policies(training: Path, every: int = 1) -> dict[int, Policy]:
    """By control steps, what a training kept along the way and what it ended with."""
    folders = sorted((training / "policies").iterdir())[::every]
    kept = {int(folder.name): Policy.load(folder) for folder in folders}
    last = Policy.load(training / "policy")
    kept[last.card.training["config"]["ppo"]["total_timesteps"]] = last
    return dict(sorted(kept.items()))


def minutes_at(training: Path) -> Callable[[int], float]:
    """Minutes of training by control steps, from its board."""
    board = EventAccumulator(str(training / "tb"), size_guidance={"scalars": 0})
    board.Reload()
    steps, seconds, before = [0], [0.0], 0.0
    for event in board.Scalars("time/time_elapsed"):  # begins anew where a training was resumed
        seconds.append(seconds[-1] + event.value - (before if event.value >= before else 0.0))
        steps.append(event.step)
        before = event.value
    return lambda at: float(np.interp(at, steps, seconds)) / 60


def _percent(point: dict[str, Any]) -> str:
    share = point["gap_closed"]["estimate"]
    return "nothing" if share is None else f"{100 * share:.0f} %"


def _played(
    options: Options,
    policies: dict[Path, dict[int, Policy]],
    before: dict[str, Any],
    default_before: FloatArray,
) -> dict[str, FloatArray]:
    """Test losses by training and control steps, `[n_tasks]`."""
    (first, *_) = (policy for kept in policies.values() for policy in kept.values())
    changes = {"horizon": before["horizon"], **dict(parse_assignment(s) for s in options.set)}
    env_id, environment = deployment(first, changes)
    if options.run_dir is not None:
        options.run_dir.mkdir(parents=True, exist_ok=True)
    where = Where(
        env_id=env_id,
        options=environment,
        n_envs=16,
        n_workers=default_workers(),
        folder=options.run_dir,
    )
    with where.open() as shards, bar("Policies from along the way") as progress:
        default = shards.knobs.default_positions(1)[0]
        arms = [static_arm("default", default)]
        for training, kept in policies.items():
            arms += [from_arm(p, f"{training} {steps}", default) for steps, p in kept.items()]
        n = len(default_before)
        played = play_arms(shards, arms, n, before["seed"], RunCounter(n * len(arms), progress))
    losses = {name: column(runs, "final_test") for name, runs in played.items()}
    apart = float(np.abs(losses["default"] - default_before).mean())
    if apart > _SAME:
        raise SystemExit(
            f"{options.evaluation} is about other runs: default knobs end {apart:.3f} nats apart "
            f"on average (at most {_SAME} would be rounding)"
        )
    return losses


def _first(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Where the whole gap is closed, and stays so at the next point."""
    closed = [(point["gap_closed"]["estimate"] or 0.0) >= 1 for point in points]
    for i, point in enumerate(points):
        if all(closed[i : i + 2]):
            return {name: point[name] for name in ("control_steps", "minutes")}
    return None


def draw(path: Path, curves: Sequence[dict[str, Any]]) -> None:
    """The share of the gap that each training closes, by its control steps."""
    all_points = [curve["points"] for curve in curves]
    steps = [point["control_steps"] for point in all_points[0]]
    found = [[p["gap_closed"]["estimate"] for p in points] for points in all_points]
    shares = np.array(found, dtype=np.float64)  # NaN where there is no gap
    with panels(path, "", 1, 1, figsize=(7, 4)) as ((axis,),):
        beside, lowest = 1.01 * steps[-1], -np.inf
        for i in shares[:, -1].argsort():
            axis.plot(steps, 100 * shares[i], color="tab:blue", alpha=0.4, lw=1, marker=".")
            lowest = max(100 * shares[i, -1], lowest + 8)  # names of curves that end together
            axis.text(beside, lowest, f"seed {curves[i]['seed']}", fontsize=7, va="center")
        mean = 100 * shares.mean(axis=0)
        axis.plot(steps, mean, color="tab:blue", lw=2.5, label="mean of trainings")
        axis.axhline(100, color="grey", lw=1, ls="--", label="best static setting for each task")
        axis.axhline(0, color="grey", lw=1, ls=":", label="best static setting")
        axis.set_xlabel("control steps of training")
        axis.set_ylabel("share of the gap closed (%)")
        axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main(tyro.cli(Options))
