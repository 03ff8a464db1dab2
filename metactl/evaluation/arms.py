"""The arms of a comparison: what moves the knobs, from where, on tasks that all arms share."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np

from metactl.config import ConfigError
from metactl.controllers import (
    BaseController,
    GapDriven,
    Guard,
    Learned,
    Plateau,
    RandomMoves,
    Replay,
    Responsive,
    Schedule,
    Static,
    Together,
    WithSignalsOf,
)
from metactl.episodes import Episode
from metactl.knobs import FloatArray, KnobSet
from metactl.policy import Policy
from metactl.rollout import PlannedRun, PlayedRun
from metactl.shards import ShardRow
from metactl.signals import GROUPS, INTERNAL_NAMES, UNIVERSAL

SWAPPED_GROUPS = ("train_loss", *GROUPS)
_TASK_STREAM = 0xE7A1  # keeps the tasks of evaluation apart from those of training
_ALIKE = 1e-9
_YOKED = 0x70C3  # turns a run's seed into another's

Results = dict[str, list[PlayedRun]]
"""By arm: one result per task, in the order of the tasks."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is compared, on every task.

    Args:
        name: For the table.
        positions: Where the knobs begin, `[n_knobs]` in [0, 1].
        controllers: Who moves them: one for all tasks, or one for each.
        other_seed: Live through the same tasks with other weights, batches and noise (but with what
            else belongs to a task, such as its peak learning rate).
        available: Which knobs can be moved, `[n_knobs]` of 0 and 1; all by default.
    """

    name: str
    positions: FloatArray
    controllers: Sequence[BaseController]
    other_seed: bool = False
    available: FloatArray | None = None


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


def known_of_tasks(shards: ShardRow, n_tasks: int, seed: int) -> FloatArray:
    """What is known beforehand of the tasks that `play_arms` plays: `[n_tasks, n_descriptors]`."""
    seeds = [episode.task_seed for episode in paired_episodes(n_tasks, seed, np.zeros(0))]
    known: FloatArray = shards.call_all("descriptors", seeds)[0]
    return known


def spread_of(known: FloatArray) -> FloatArray:
    """Deviation of each descriptor over tasks, to measure others by; 1 where all are alike."""
    spread: FloatArray = known.std(axis=0)
    return np.where(spread > _ALIKE, spread, 1.0)


def planned_runs(arms: Sequence[Arm], n_tasks: int, seed: int) -> list[PlannedRun]:
    """Every arm on the same tasks, arm by arm; by controllers that are copies."""
    planned = []
    for arm in arms:
        controllers = [deepcopy(controller) for controller in arm.controllers]
        controllers *= n_tasks if len(controllers) == 1 else 1
        episodes = paired_episodes(n_tasks, seed, arm.positions)
        for controller, episode in zip(controllers, episodes, strict=True):
            chosen = _with_other_seed(episode) if arm.other_seed else episode
            if arm.available is not None:
                chosen = replace(chosen, available=arm.available)
            planned.append(PlannedRun(arm=arm.name, episode=chosen, controller=controller))
    return planned


def play_arms(
    shards: ShardRow,
    arms: Sequence[Arm],
    n_tasks: int,
    seed: int,
    on_done: Callable[[int], None] | None = None,
) -> Results:
    """Plays every arm on the same tasks; their controllers stay as they were.

    Raises:
        ConfigError: If two arms have the same name.
    """
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name!r} is there {names.count(name)} times; once is enough")
    played: Results = {arm.name: [] for arm in arms}
    for result in shards.play(planned_runs(arms, n_tasks, seed), on_done):
        played[result.arm].append(result)
    return played


def _with_other_seed(episode: Episode) -> Episode:
    rng = np.random.default_rng([episode.run_seed, _YOKED])
    return replace(episode, run_seed=int(rng.integers(2**31)))


# What needs no learning ------------------------------------------------------------------------


def static_grid(knobs: KnobSet, n_points: int, seed: int = 0) -> list[FloatArray]:
    """Static settings over all knobs: the default and scrambled Sobol points."""
    points: list[FloatArray] = [knobs.default_positions(1)[0]]
    if n_points > 1:
        from scipy.stats import qmc  # here: a second of import

        drawn = qmc.Sobol(len(knobs), seed=seed).random_base2((n_points - 2).bit_length())
        points += list(drawn[: n_points - 1])
    return points


def static_arm(name: str, positions: FloatArray) -> Arm:
    """Knobs that stay where they are."""
    return Arm(name=name, positions=positions, controllers=(Static(),))


def chosen_arm(knobs: KnobSet, setting: Mapping[str, float]) -> Arm:
    """A static setting that somebody chose; knobs not named are at their defaults."""
    name = "static " + ", ".join(f"{knob}={value:g}" for knob, value in setting.items())
    return static_arm(name, knobs.positions(setting, 1)[0])


def rule_arms(knobs: KnobSet, positions: FloatArray, *, further: bool = False) -> list[Arm]:
    """Rules: by the loss, and what practitioners do by hand where the run has the knob for it.

    Args:
        knobs: Of the run.
        positions: Where they begin, `[n_knobs]` in [0, 1].
        further: Also by single losses, without patience; and a span that warms up.
    """
    plateau, gap = Plateau("learning_rate_multiplier"), GapDriven("dropout")
    rules: dict[str, tuple[BaseController, *tuple[str, ...]]] = {
        "responsive rule": (Responsive(),),
        "plateau rule (learning rate)": (plateau, plateau.knob),
        "gap rule (dropout)": (gap, gap.knob),
        "plateau and gap rules": (Together(plateau, gap), plateau.knob, gap.knob),
    }
    if further:
        hasty = Responsive(patience=1, smoothing=1.0, tolerance=0.0)
        rules["responsive rule, no smoothing"] = (hasty,)
    arms = [
        Arm(name=name, positions=positions, controllers=(rule,))
        for name, (rule, *needed) in rules.items()
        if set(needed) <= set(knobs.names)
    ]
    if further and "attention_span" in knobs.names:
        arms.append(_window_warm_up(knobs, positions))
    return arms


def _window_warm_up(knobs: KnobSet, positions: FloatArray) -> Arm:
    """A span that grows over the first half of a run, from its smallest to where it is set."""
    narrow = positions.copy()
    narrow[knobs.names.index("attention_span")] = 0.0
    schedule = Schedule(np.array([0.0, 0.5, 1.0]), np.stack([narrow, positions, positions]))
    return Arm(name="window warm-up (span)", positions=narrow, controllers=(schedule,))


def random_arm(positions: FloatArray, n_tasks: int, seed: int) -> Arm:
    """Knobs that move without looking, in each task in its own way."""
    controllers = [RandomMoves(seed * 100_003 + task) for task in range(n_tasks)]
    return Arm(name="random moves", positions=positions, controllers=controllers)


# The policy, and what tells feedback from a schedule ---------------------------------------------


def policy_arm(policy: Policy, positions: FloatArray) -> Arm:
    """The policy as users get it: guarded."""
    return Arm(name="policy", positions=positions, controllers=(_guarded(policy),))


def unguarded_arm(policy: Policy, positions: FloatArray) -> Arm:
    """The policy alone: what its guard adds, or takes."""
    return Arm(name="policy without its guard", positions=positions, controllers=(Learned(policy),))


def from_arm(policy: Policy, name: str, positions: FloatArray) -> Arm:
    """The policy where somebody has set the knobs before."""
    return replace(policy_arm(policy, positions), name=name)


def knob_arms(policy: Policy, knobs: KnobSet, positions: FloatArray) -> list[Arm]:
    """The policy with every knob alone, and with every knob left out; the others stay."""
    if len(knobs) < 2:
        return []
    arms = []
    for i, knob in enumerate(knobs.names):
        alone = np.eye(len(knobs))[i]
        for label, available in ((f"{knob} alone", alone), (f"without {knob}", 1 - alone)):
            arm = policy_arm(policy, positions)
            arms.append(replace(arm, name=f"policy, {label}", available=available))
    return arms


def _guarded(policy: Policy, controller: BaseController | None = None) -> Guard:
    inside = Learned(policy) if controller is None else controller
    return Guard(inside)


def other_seed_arm(policy: Policy, positions: FloatArray) -> Arm:
    """The policy on the same tasks, with other weights, batches and noise."""
    return Arm(
        name="policy, other seeds",
        positions=positions,
        controllers=(_guarded(policy),),
        other_seed=True,
    )


def replay_arm(of_policy: Sequence[PlayedRun], positions: FloatArray) -> Arm:
    """The policy's own mean trajectory, whatever the run does."""
    mean_trajectory = np.mean([result.positions for result in of_policy], axis=0)
    return Arm(name="replay", positions=positions, controllers=(Replay(mean_trajectory),))


def yoked_arm(of_other_seeds: Sequence[PlayedRun], positions: FloatArray) -> Arm:
    """In each task the moves that the policy made there with another seed."""
    replays = [Replay(result.positions) for result in of_other_seeds]
    return Arm(name="yoked", positions=positions, controllers=replays)


def swapped_arms(
    policy: Policy,
    of_policy: Sequence[PlayedRun],
    positions: FloatArray,
    names: Sequence[str],
    *,
    each: bool,
) -> list[Arm]:
    """The policy with signals of another task's run in place of its own: are they used?

    All signals but progress, by the entries' `names`; with `each`, every group of the universal
    ones alone too. The knobs it sees are its own.
    """
    groups = {
        group: [f"signal/{signal.name}" for signal in UNIVERSAL if signal.group == group]
        for group in SWAPPED_GROUPS
    }
    inside = [f"signal/{name}" for name in INTERNAL_NAMES]
    everything = [name for group in groups.values() for name in group]
    everything += [name for name in inside if name in names]
    swaps = {"all signals": everything}
    if each:
        swaps |= {group.replace("_", " "): own for group, own in groups.items()}
    n = len(of_policy)
    recorded = [of_policy[(task + 1) % n].observations for task in range(n)]
    return [
        Arm(
            name=f"another run's {label}",
            positions=positions,
            controllers=[
                _guarded(policy, WithSignalsOf(Learned(policy), swapped, record))
                for record in recorded
            ],
        )
        for label, swapped in swaps.items()
    ]
