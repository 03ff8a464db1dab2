"""Is a policy worth having, is it feedback, does it hold when something goes wrong?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from metactl.config import ConfigError
from metactl.deployment import n_training_runs
from metactl.evaluation.arms import (
    SWAPPED_GROUPS,
    Arm,
    Results,
    chosen_arm,
    from_arm,
    knob_arms,
    known_of_tasks,
    other_seed_arm,
    play_arms,
    policy_arm,
    random_arm,
    replay_arm,
    rule_arms,
    static_arm,
    static_grid,
    swapped_arms,
    unguarded_arm,
    yoked_arm,
)
from metactl.evaluation.bandit import promising
from metactl.evaluation.disturbed import disturbed_summary
from metactl.evaluation.pbt import Explore, check_populations, perturbed, play_pbt
from metactl.evaluation.place import RunCounter, Where
from metactl.evaluation.search import (
    Search,
    best_linear_policy,
    best_schedule,
    best_told_schedule,
)
from metactl.evaluation.selection import chosen_beforehand, chosen_here
from metactl.evaluation.summary import (
    break_even,
    by_epochs,
    column,
    moves_explained_by_progress,
    summarise,
)
from metactl.knobs import FloatArray
from metactl.policy import Policy
from metactl.progress import Progress
from metactl.shards import Description, ShardRow
from metactl.worker import ShardError

_TUNING = 0x7A5C  # added to the seed: other tasks and runs, whatever the split


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is compared, and how often.

    Args:
        n_tasks: Paired tasks.
        grid_points: Static settings over all knobs, the default among them.
        seed: Of the tasks and runs.
        settings: Further static settings by knob name, in the grid and as arms of their own.
        rivals: Other policies, as arms of these names.
        controls: Random moves, yoked runs, signals of another run, no guard, and further rules:
            what tells feedback apart.
        each_group: Swap every group of signals alone too.
        each_knob: Give the policy every knob alone, and leave every knob out.
        beforehand: Also choose static settings on as many tasks of meta-training, told what is
            known of a task and not; begin all that moves knobs at the best of them, too, and the
            policy at the worst.
        population: Members of population-based training on each task, by PBT and again by PB2; 0
            leaves them out.
        disturbed: Play the main arms again, with something befalling every run.
        schedule_runs: Budget, in runs, of the search for the best open-loop schedule on tasks of
            meta-training, and again for one that is told the task; 0 leaves them out.
        linear_runs: The same for the best linear policy, on what the policy sees.
    """

    n_tasks: int
    grid_points: int
    seed: int = 0
    settings: Sequence[Mapping[str, float]] = ()
    rivals: Mapping[str, Policy] = field(default_factory=dict)
    controls: bool = False
    each_group: bool = False
    each_knob: bool = False
    beforehand: bool = False
    population: int = 0
    disturbed: bool = False
    schedule_runs: int = 0
    linear_runs: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation measured.

    Args:
        results: By arm: one result per task, in the order of the tasks.
        summary: What the report says, as JSON values.
        linear: The linear policy that was found, where one was searched for.
    """

    results: Results
    summary: dict[str, Any]
    linear: Policy | None = None


def evaluate(
    policy: Policy, where: Where, plan: EvaluationPlan, progress: Progress | None = None
) -> Evaluation:
    """Compares a policy with everything that needs no learning, and with itself made blind.

    Arms: the default setting; a grid of static settings over all knobs, of which the best on
    average (SBS) and the best for each task (VBS) are chosen on the probe and scored on test; the
    responsive rule; the replay of the policy's own mean trajectory; the policy; and what the plan
    adds. What moves knobs starts from the default setting (but for a span that warms up, and all
    but one member of a population); with `beforehand` again from the static setting that is best on
    tasks of meta-training.

    Args:
        policy: Who is judged.
        where: The environment.
        plan: What is compared.
        progress: Told about finished runs.

    Raises:
        ConfigError: If the policy decides more or less often than the runs do.
    """
    n = plan.n_tasks
    _require_feasible(plan, where)
    with where.open() as shards:
        about = shards.describe()
        for name, each in {"policy": policy, **plan.rivals}.items():
            if about.n_control_steps != each.card.n_control_steps:
                raise ConfigError(
                    f"The {name} decides {each.card.n_control_steps} times per run; the runs have "
                    f"n_control_steps={about.n_control_steps}"
                )
        knobs, names = about.knobs, about.observation_names
        default = knobs.default_positions(1)[0]
        points = static_grid(knobs, plan.grid_points)
        grid = [static_arm(f"static {i}", point) for i, point in enumerate(points)]
        chosen = [chosen_arm(knobs, setting) for setting in plan.settings]
        single = knob_arms(policy, knobs, default) if plan.each_knob else []
        movers = _Movers(policy=policy, plan=plan, shards=shards, about=about)
        known = known_of_tasks(shards, n, plan.seed)
        n_settings, is_known = len(grid) + len(chosen), bool(known.shape[1])
        searches = plan.schedule_runs * (1 + is_known) + plan.linear_runs
        total = _n_runs(plan, movers, n_settings, len(single), told=is_known) + searches
        count = RunCounter(total, progress)
        found, linear = _searched(policy, where, plan, default, known, count)
        results = play_arms(shards, [*grid, *chosen, *single], n, plan.seed, count)
        begun, blind = movers.play(default, found, count)
        results |= begun
        if plan.controls:
            played = results["policy"]
            swapped = swapped_arms(policy, played, default, names, each=plan.each_group)
            results |= play_arms(shards, swapped, n, plan.seed, count)
        there: Results = {}
        if plan.beforehand:
            results |= _tuned_beforehand(where, plan, [*grid, *chosen], results, known, count)
            tuned = results["best static of training tasks"]
            there, _ = movers.play(tuned[0].positions[0], found, count)
            there["best static of training tasks"] = tuned
            results["policy from there"] = there["policy"]
            losses = [column(results[arm.name], "final_probe").mean() for arm in grid]
            worst = grid[int(np.argmax(losses))].positions
            bad = from_arm(policy, "policy from the worst static", worst)
            results |= play_arms(shards, [bad], n, plan.seed, count)
    grid_names, chosen_names = ([arm.name for arm in group] for group in (grid, chosen))
    results = chosen_here(results, grid_names, chosen_names, names)
    summary = {**_summary(policy, about, results), "n_tasks": n, "seed": plan.seed}
    summary["grid_points"] = len(grid) + len(chosen)
    if there:
        summary["begun_at_best_static"] = summarise(
            there, set_points=policy.card.set_points, names=names
        )
    if plan.disturbed:
        arms = [*movers.arms(default), *blind, *found]
        arms.append(static_arm("best static", results["best static"][0].positions[0]))
        with where.open(disturb=1.0) as shards:
            befallen = play_arms(shards, arms, n, plan.seed, count)
        summary["disturbed"] = disturbed_summary(befallen, results, policy.card.set_points, names)
    return Evaluation(results=results, summary=summary, linear=linear)


@dataclass(frozen=True, kw_only=True)
class _Movers:
    """All that moves knobs, wherever they begin: the policy, rules, replays, populations.

    Args:
        policy: Who is judged.
        plan: What is compared.
        shards: Where runs are played.
        about: What their environment says of itself.
    """

    policy: Policy
    plan: EvaluationPlan
    shards: ShardRow
    about: Description

    def arms(self, start: FloatArray) -> list[Arm]:
        """What sees its run: the policy, the rules, the rivals."""
        knobs = self.about.knobs
        controls = self.plan.controls
        arms = [policy_arm(self.policy, start), *rule_arms(knobs, start, further=controls)]
        if controls:
            arms.append(unguarded_arm(self.policy, start))
        return arms + [from_arm(rival, name, start) for name, rival in self.plan.rivals.items()]

    def play(
        self, start: FloatArray, found: Sequence[Arm], count: RunCounter
    ) -> tuple[Results, list[Arm]]:
        """Results of all, and the arms that do the same whatever befalls a run.

        Args:
            start: Where the knobs begin, `[n_knobs]` in [0, 1].
            found: What searches came to; played from here, too.
            count: Told about finished runs.
        """
        n, seed = self.plan.n_tasks, self.plan.seed
        first = self.arms(start) + [replace(arm, positions=start) for arm in found]
        if self.plan.controls:
            first += [random_arm(start, n, seed), other_seed_arm(self.policy, start)]
        results = play_arms(self.shards, first, n, seed, count)
        blind = [replay_arm(results["policy"], start)]
        if self.plan.controls:
            blind.append(yoked_arm(results.pop("policy, other seeds"), start))
        results |= play_arms(self.shards, blind, n, seed, count)
        if self.plan.population:
            kinds: dict[str, Explore] = {"PBT": perturbed, "PB2": promising}
            for kind, explore in kinds.items():
                size = self.plan.population
                best = play_pbt(self.shards, size, n, seed, start, count, explore)
                results[f"{kind}, best of {size}"] = best
        return results, blind


def _n_runs(
    plan: EvaluationPlan, movers: _Movers, n_settings: int, n_single: int, *, told: bool
) -> int:
    """How many runs an evaluation plays, but for its searches."""
    n_seeing = len(movers.arms(np.zeros(len(movers.about.knobs))))
    n_blind = 1 + plan.controls
    n_found = (1 + told) * (plan.schedule_runs > 0) + (plan.linear_runs > 0)
    n_movers = n_seeing + n_blind + n_found + 2 * plan.controls + 2 * plan.population
    n_swaps = (1 + len(SWAPPED_GROUPS) * plan.each_group) if plan.controls else 0
    n_arms = n_settings + n_single + n_movers + n_swaps
    n_arms += plan.beforehand * (n_settings + n_movers + 1)
    n_arms += plan.disturbed * (n_seeing + n_blind + n_found + 1)
    return plan.n_tasks * n_arms


def _summary(policy: Policy, about: Description, results: Results) -> dict[str, Any]:
    """What the undisturbed runs say of a policy, as JSON values."""
    knobs, names = about.knobs.names, about.observation_names
    explained = moves_explained_by_progress(results["policy"])
    best_setting = {name: float(v[0]) for name, v in results["best static"][0].values.items()}
    summary = {
        "horizon": about.horizon,
        "n_control_steps": about.n_control_steps,
        **summarise(
            results,
            oracle_name="per-task best static",
            set_points=policy.card.set_points,
            names=names,
        ),
        "by_epochs": by_epochs(results, names),
        "moves_explained_by_progress": dict(zip(knobs, explained.tolist(), strict=True)),
        "best_static_setting": best_setting,
    }
    paid = n_training_runs(policy)
    if paid is not None:
        summary |= {"training_runs": paid, "break_even": break_even(summary, paid)}
    return summary


def _tuned_beforehand(
    where: Where,
    plan: EvaluationPlan,
    settings: Sequence[Arm],
    results: Results,
    known: FloatArray,
    count: RunCounter,
) -> Results:
    """The static settings that are best on as many tasks of meta-training."""
    tasks = (plan.n_tasks, plan.seed + _TUNING)
    with where.open(split="meta_train") as training:
        played = play_arms(training, settings, *tasks, count)
        known_there = known_of_tasks(training, *tasks)
    return chosen_beforehand(played, known_there, results, known)


def _searched(
    policy: Policy,
    where: Where,
    plan: EvaluationPlan,
    start: FloatArray,
    known: FloatArray,
    count: RunCounter,
) -> tuple[list[Arm], Policy | None]:
    """What searches on the tasks of meta-training come to, and the linear policy among it."""
    found: list[Arm] = []
    linear = None
    if not (plan.schedule_runs or plan.linear_runs):
        return found, linear
    with where.open(split="meta_train") as training:

        def search(n_runs: int) -> Search:
            return Search(
                shards=training, positions=start, n_runs=n_runs, seed=plan.seed, on_done=count
            )

        if plan.schedule_runs:
            found.append(best_schedule(search(plan.schedule_runs)))
            if known.shape[1]:
                found.append(best_told_schedule(search(plan.schedule_runs), found[0], known))
        if plan.linear_runs:
            linear = best_linear_policy(search(plan.linear_runs), policy)
            found.append(from_arm(linear, "linear policy", start))
    return found, linear


def _require_feasible(plan: EvaluationPlan, where: Where) -> None:
    """Refuses what would fail after everything else was played."""
    if plan.population:
        check_populations(where.n_envs, plan.population)
    if plan.beforehand or plan.schedule_runs or plan.linear_runs:
        where.open(split="meta_train").close()
    if plan.disturbed:
        try:
            where.open(disturb=1.0).close()
        except (ValueError, ShardError) as error:
            raise ConfigError(
                f"Runs of {where.env_id} cannot be disturbed: they have no option 'disturb'; "
                f"leave out --disturbed and --suite full"
            ) from error
