"""What could be had without feedback: search by CMA-ES (arXiv 1604.00772), at a budget of runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from metactl.controllers import BaseController, Learned, Schedule
from metactl.evaluation.arms import Arm, known_of_tasks, play_arms, spread_of
from metactl.evaluation.summary import column
from metactl.knobs import FloatArray
from metactl.policy import Policy
from metactl.shards import ShardRow

KNOTS = np.array([0.25, 0.5, 0.75, 1.0])  # of a schedule, in progress
_SPREAD = 0.25  # of the first candidates, in ranges of a knob
_N_KNOWN = 256  # tasks whose descriptors say what is usual
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
        make: Callable[[FloatArray, int], Sequence[BaseController]],
        start: FloatArray,
        *,
        spread: float,
        bounds: tuple[float, float],
    ) -> FloatArray:
        """The vector whose controllers end with the lowest probe loss, on average over tasks.

        All candidates of a generation live through the same tasks; each generation has new ones.

        Args:
            make: The controllers that a vector means on the `n_tasks` tasks of a seed: one for all,
                or one for each.
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
            seed = self.seed + generation
            arms = [
                Arm(name=str(i), positions=self.positions, controllers=make(candidate, seed))
                for i, candidate in enumerate(candidates)
            ]
            played = play_arms(self.shards, arms, self.n_tasks, seed, self.on_done)
            losses = [float(column(played[arm.name], "final_probe").mean()) for arm in arms]
            optimizer.tell(list(zip(candidates, losses, strict=True)))
            done += self.n_tasks * len(candidates)
            generation += 1
        return np.asarray(optimizer.mean).clip(*bounds)


def best_schedule(search: Search) -> Arm:
    """The best open-loop schedule: positions at four points of progress, linear in between."""
    positions = search.positions

    def make(vector: FloatArray) -> Schedule:
        knots = np.concatenate((positions[None], vector.reshape(len(KNOTS), -1)))
        return Schedule(np.concatenate(([0.0], KNOTS)), knots)

    start = np.tile(positions, len(KNOTS)).clip(0.1, 0.9)
    found = search.best(lambda v, _: (make(v),), start, spread=_SPREAD, bounds=(0.0, 1.0))
    return Arm(name="best schedule", positions=positions, controllers=(make(found),))


def best_told_schedule(search: Search, found: Arm, known: FloatArray) -> Arm:
    """The best schedule that is told each task's descriptors, linear in them.

    Args:
        search: Its budget comes on top of what `found` has cost.
        found: The best schedule that is not told; the search begins there.
        known: Descriptors of the tasks that it is for, `[n_tasks, n_descriptors]`.
    """
    (untold,) = found.controllers
    assert isinstance(untold, Schedule)
    usual = known_of_tasks(search.shards, _N_KNOWN, search.seed)
    middle, spread = usual.mean(axis=0), spread_of(usual)

    def make(vector: FloatArray, tasks: FloatArray) -> list[Schedule]:
        knots = vector.reshape(1 + known.shape[1], len(KNOTS), -1)
        told = knots[0] + np.tensordot((tasks - middle) / spread, knots[1:], 1)
        begin = untold.positions[:1]
        told = told.clip(0, 1)
        return [Schedule(untold.progress, np.concatenate((begin, own))) for own in told]

    @cache  # all candidates of a generation ask for the same
    def known_there(seed: int) -> FloatArray:
        return known_of_tasks(search.shards, search.n_tasks, seed)

    def of_seed(vector: FloatArray, seed: int) -> list[Schedule]:
        return make(vector, known_there(seed))

    base = untold.positions[1:].ravel()
    start = np.concatenate((base, np.zeros(known.shape[1] * len(base))))
    best = search.best(of_seed, start, spread=_SPREAD / 2, bounds=(-1.0, 1.0))
    schedules = make(best, known)
    return Arm(name="schedule told the task", positions=search.positions, controllers=schedules)


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

    def make(vector: FloatArray) -> Policy:
        layer = vector.reshape(n_out, n_in + 1)
        weights = {"weight_0": layer[:, :-1], "bias_0": layer[:, -1]}
        return Policy(card, normaliser | weights)

    start = np.zeros(n_out * (n_in + 1))
    found = search.best(lambda v, _: (Learned(make(v)),), start, spread=_GAIN, bounds=(-1.0, 1.0))
    return make(found)
