"""What could be had without feedback: search by CMA-ES (arXiv 1604.00772), at a budget of runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from metactl.controllers import BaseController, ContextualSchedule, Learned, Schedule
from metactl.evaluation.arms import Arm, play_arms
from metactl.evaluation.summary import column
from metactl.knobs import FloatArray
from metactl.policy import Policy
from metactl.shards import ShardRow

KNOTS = np.array([0.25, 0.5, 0.75, 1.0])  # of a schedule, in progress
_SPREAD = 0.25  # of the first candidates, in ranges of a knob
_GAIN = 0.03  # of the first linear policies: largest moves per deviation of an observation


@dataclass(frozen=True, kw_only=True)
class Search:
    """Where and how long controllers are searched for.

    Args:
        shards: Where runs are played, on the tasks that policies are trained on.
        positions: Where the knobs begin, `[n_knobs]` in [0, 1].
        n_runs: Budget; the last generation may exceed it.
        seed: Of candidates, tasks and runs.
        n_tasks: Tasks that a candidate is judged by.
        on_done: Called with the number of runs finished since the last call.
    """

    shards: ShardRow
    positions: FloatArray
    n_runs: int
    seed: int
    n_tasks: int = 8
    on_done: Callable[[int], None] | None = None

    def best(
        self,
        name: str,
        make: Callable[[FloatArray], BaseController],
        start: FloatArray,
        *,
        spread: float,
        bounds: tuple[float, float],
    ) -> Arm:
        """The controller that ends with the lowest probe loss, on average over tasks.

        All candidates of a generation live through the same tasks; each generation has new ones.

        Args:
            name: Of the arm.
            make: The controller that a vector means.
            start: Mean of the first generation.
            spread: Deviation of the first generation.
            bounds: Of every entry.

        Returns:
            That of the mean of the last generation, which varies less than its best member.
        """
        from cmaes import CMA

        limits = np.tile(bounds, (len(start), 1))
        optimizer = CMA(mean=np.array(start), sigma=spread, bounds=limits, seed=self.seed)
        done, generation = 0, 0
        while done < self.n_runs:
            candidates = [optimizer.ask() for _ in range(optimizer.population_size)]
            arms = [self._arm(str(i), make(candidate)) for i, candidate in enumerate(candidates)]
            seed = self.seed + generation
            played = play_arms(self.shards, arms, self.n_tasks, seed, self.on_done)
            losses = [float(column(played[arm.name], "final_probe").mean()) for arm in arms]
            optimizer.tell(list(zip(candidates, losses, strict=True)))
            done += self.n_tasks * len(candidates)
            generation += 1
        return self._arm(name, make(np.asarray(optimizer.mean).clip(*bounds)))

    def _arm(self, name: str, controller: BaseController) -> Arm:
        return Arm(name=name, positions=self.positions, controllers=(controller,))


def best_schedule(search: Search) -> Arm:
    """The best open-loop schedule: positions at four points of progress, linear in between."""
    n_control_steps = search.shards.describe()["n_control_steps"]
    positions = search.positions

    def make(vector: FloatArray) -> Schedule:
        knots = np.concatenate((positions[None], vector.reshape(len(KNOTS), -1)))
        return Schedule(np.concatenate(([0.0], KNOTS)), knots, n_control_steps)

    start = np.tile(positions, len(KNOTS)).clip(0.1, 0.9)
    return search.best("best schedule", make, start, spread=_SPREAD, bounds=(0.0, 1.0))


def best_contextual_schedule(search: Search, found: Arm) -> Arm:
    """The best schedule that is told the task's data pressure, linear in it.

    Args:
        search: Its budget comes on top of what `found` has cost.
        found: The best schedule that is not told; the search begins there.
    """
    (untold,) = found.controllers
    assert isinstance(untold, Schedule)
    n_control_steps = round(1 / untold.share)
    rest = np.zeros((1, len(search.positions)))  # nothing is known before the first step

    def make(vector: FloatArray) -> ContextualSchedule:
        base, slopes = vector.reshape(2, len(KNOTS), -1)
        knots = np.concatenate((untold.positions[:1], base))
        schedule = Schedule(untold.progress, knots, n_control_steps)
        return ContextualSchedule(schedule, np.concatenate((rest, slopes)))

    base = untold.positions[1:].ravel()
    start = np.concatenate((base, np.zeros_like(base)))
    name = "schedule told the data size"
    return search.best(name, make, start, spread=_SPREAD / 2, bounds=(-1.0, 1.0))


def best_linear_policy(search: Search, policy: Policy) -> Policy:
    """What search makes of what a policy sees: PPO's rival, on the same observations and knobs.

    It is searched for as policies are trained: without a guard.

    Args:
        search: On tasks of meta-training.
        policy: Its card and its normaliser are the rival's too.
    """
    policy = policy.member(0)
    card = replace(policy.card, hidden=())
    n_out, n_in = len(card.knobs), len(card.observations)
    normaliser = {name: policy.weights[name] for name in ("mean", "std")}

    def make(vector: FloatArray) -> Learned:
        layer = vector.reshape(n_out, n_in + 1)
        weights = {"weight_0": layer[:, :-1], "bias_0": layer[:, -1]}
        return Learned(Policy(card, normaliser | weights))

    start = np.zeros(n_out * (n_in + 1))
    found = search.best("linear", make, start, spread=_GAIN, bounds=(-1.0, 1.0))
    (learned,) = found.controllers
    assert isinstance(learned, Learned)
    return learned.policy
