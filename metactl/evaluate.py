"""Is a policy worth having? Paired comparison with static settings, a rule and its own replay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import qmc

from metactl.config import ConfigError
from metactl.controllers import BaseController, Guard, Learned, Replay, Responsive, Static
from metactl.env import Episode
from metactl.knobs import FloatArray, KnobSet
from metactl.policy import Policy
from metactl.progress import Progress
from metactl.rollout import Trial, TrialResult
from metactl.shards import ShardRow
from metactl.statistics import Interval, gap_closed, paired_difference, probability_of_improvement

_TASK_STREAM = 0xE7A1  # keeps the tasks of evaluation apart from those of training


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is compared, on every task.

    Args:
        name: For the table.
        positions: Where the knobs begin, `[n_knobs]` in [0, 1].
        controller: Who moves them.
    """

    name: str
    positions: FloatArray
    controller: BaseController


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation measured.

    Args:
        results: By arm: one result per task, in the order of the tasks.
        summary: What the report says, as JSON values.
    """

    results: dict[str, list[TrialResult]]
    summary: dict[str, Any]


def paired_episodes(n_tasks: int, seed: int, positions: FloatArray) -> list[Episode]:
    """Episodes that all arms share but for where their knobs begin."""
    rng = np.random.default_rng([seed, _TASK_STREAM])
    first, *run_seeds = (int(x) for x in rng.integers(0, 2**31, size=n_tasks + 1))
    return [
        Episode(
            task_seed=(first + i) % 2**31,
            run_seed=run_seed,
            positions=positions,
            available=np.ones(len(positions)),
        )
        for i, run_seed in enumerate(run_seeds)
    ]


def static_grid(knobs: KnobSet, n_points: int, seed: int = 0) -> list[FloatArray]:
    """Static settings over all knobs: the default and scrambled Sobol points."""
    n_sobol = max(0, n_points - 1)
    points: list[FloatArray] = [knobs.default_positions(1)[0]]
    if n_sobol:
        sampler = qmc.Sobol(len(knobs), seed=seed)
        drawn = sampler.random_base2(int(np.ceil(np.log2(max(n_sobol, 1)))))
        points += list(drawn[:n_sobol])
    return points


def policy_arm(policy: Policy, positions: FloatArray) -> Arm:
    """The policy as users get it: guarded."""
    guard = Guard(Learned(policy), n_control_steps=policy.card.n_control_steps)
    return Arm(name="policy", positions=positions, controller=guard)


def play_arms(
    shards: ShardRow,
    arms: Sequence[Arm],
    n_tasks: int,
    seed: int,
    on_done: Callable[[int], None] | None = None,
) -> dict[str, list[TrialResult]]:
    """Plays every arm on the same tasks."""
    trials = [
        Trial(arm=arm.name, episode=episode, controller=arm.controller)
        for arm in arms
        for episode in paired_episodes(n_tasks, seed, arm.positions)
    ]
    played: dict[str, list[TrialResult]] = {arm.name: [] for arm in arms}
    for result in shards.play(trials, on_done):
        played[result.arm].append(result)
    return played


def evaluate(
    policy: Policy,
    shards: ShardRow,
    *,
    n_tasks: int,
    grid_points: int,
    seed: int,
    settings: Sequence[Mapping[str, float]] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Compares a policy with everything that needs no learning.

    Arms: the default setting; a grid of static settings over all knobs, of which the best on
    average (SBS) and the best for each task (VBS) are chosen on the probe and scored on test; the
    responsive rule; the replay of the policy's own mean trajectory; the policy. All start from
    the default setting, but for the grid.

    Args:
        policy: Who is judged.
        shards: Where runs are played, on tasks that training never drew.
        n_tasks: Paired tasks.
        grid_points: Static settings, the default among them.
        seed: Of the tasks and runs.
        settings: Further static settings by knob name, in the grid and as arms of their own.
        progress: Told about finished runs.
    """
    about = shards.describe()
    if about["n_control_steps"] != policy.card.n_control_steps:
        raise ConfigError(
            f"The policy decides {policy.card.n_control_steps} times per run; the runs have "
            f"n_control_steps={about['n_control_steps']}"
        )
    knobs = KnobSet(about["knobs"])
    default = knobs.default_positions(1)[0]
    static = Static()
    grid = [
        Arm(name=f"static {i}", positions=point, controller=static)
        for i, point in enumerate(static_grid(knobs, grid_points))
    ]
    chosen = [
        Arm(
            name="static " + ", ".join(f"{name}={value:g}" for name, value in setting.items()),
            positions=knobs.positions(setting, 1)[0],
            controller=static,
        )
        for setting in settings
    ]
    rule = Arm(name="responsive rule", positions=default, controller=Responsive())
    total, done = n_tasks * (len(grid) + len(chosen) + 3), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, "")

    arms = [policy_arm(policy, default), rule, *grid, *chosen]
    results = play_arms(shards, arms, n_tasks, seed, report)
    mean_trajectory = np.mean([r.positions for r in results["policy"]], axis=0)
    replay = Arm(name="replay", positions=default, controller=Replay(mean_trajectory))
    results |= play_arms(shards, [replay], n_tasks, seed, report)
    grid_names, chosen_names = ([arm.name for arm in group] for group in (grid, chosen))
    results = _select_static(results, grid_names, chosen_names)
    summary = {
        "n_tasks": n_tasks,
        "grid_points": len(grid) + len(chosen),
        "seed": seed,
        "horizon": about["horizon"],
        "n_control_steps": about["n_control_steps"],
        **summarise(results, default_name="default", oracle_name="per-task best static"),
    }
    best = {name: float(v[0]) for name, v in results["best static"][0].values.items()}
    return Evaluation(results=results, summary={**summary, "best_static_setting": best})


def _select_static(
    results: dict[str, list[TrialResult]], grid_names: list[str], chosen_names: list[str]
) -> dict[str, list[TrialResult]]:
    """Replaces the grid by the default, the best on average and the best for each task.

    With chosen settings the best of the grid alone is an arm too.
    """
    grid = [results[name] for name in (*grid_names, *chosen_names)]
    probes = np.array([[result.final_probe for result in arm] for arm in grid])
    means = probes.mean(axis=1)
    oracle = probes.argmin(axis=0)
    selected = {"default": grid[0], "best static": grid[int(means.argmin())]}
    if chosen_names:
        selected["best static of the grid"] = grid[int(means[: len(grid_names)].argmin())]
    return {
        **selected,
        "per-task best static": [grid[i][task] for task, i in enumerate(oracle)],
        **{name: arm for name, arm in results.items() if name not in grid_names},
    }


def summarise(
    results: dict[str, list[TrialResult]],
    default_name: str = "default",
    oracle_name: str | None = None,
) -> dict[str, Any]:
    """Means per arm and paired differences to the policy, as JSON values (nats per token)."""

    def column(arm: str, name: str) -> FloatArray:
        return np.array([getattr(result, name) for result in results[arm]])

    arms = {
        arm: {
            "final_test": float(column(arm, "final_test").mean()),
            "best_checkpoint_test": float(column(arm, "best_test").mean()),
            "flops": float(column(arm, "flops").mean()),
            "diverged": int(column(arm, "diverged").sum()),
            "final_test_per_task": column(arm, "final_test").tolist(),
        }
        for arm in results
    }
    differences = {}
    for arm in results:
        if arm == "policy":
            continue
        final = paired_difference(column("policy", "final_test"), column(arm, "final_test"))
        best = paired_difference(column("policy", "best_test"), column(arm, "best_test"))
        wins = probability_of_improvement(column("policy", "final_test"), column(arm, "final_test"))
        differences[arm] = {
            "final_test": _finite(final),
            "best_checkpoint_test": _finite(best),
            "probability_of_improvement": wins,
        }
    summary: dict[str, Any] = {"arms": arms, "policy_minus": differences}
    if oracle_name is not None:
        closed = gap_closed(
            column("policy", "final_test"),
            column("best static", "final_test"),
            column(oracle_name, "final_test"),
        )
        summary["gap_closed"] = _finite(closed)
    return summary


def _finite(interval: Interval) -> dict[str, float | None]:
    """As JSON values; what is unbounded is null."""
    return {k: v if np.isfinite(v) else None for k, v in asdict(interval).items()}


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation that belong on a policy's card: no lists."""
    arms = {
        arm: {name: value for name, value in figures.items() if name != "final_test_per_task"}
        for arm, figures in summary["arms"].items()
    }
    return {**summary, "arms": arms}
