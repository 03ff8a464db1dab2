"""What could be had without feedback: search by CMA-ES (arXiv 1604.00772), at a budget of runs."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from metactl.controllers import BaseController, Learned, Schedule
from metactl.evaluation.arms import Arm, play_arms
from metactl.evaluation.summary import column
from metactl.knobs import FloatArray
from metactl.policy import Policy
from metactl.shards import ShardRow

KNOTS = np.array([0.25, 0.5, 0.75, 1.0])  # of a schedule, in progress
_SPREAD = 0.25  # of the first candidates, in ranges of a knob
_GAIN = 0.03  # of the first linear policies: largest moves per deviation of an observation


def search(
    shards: ShardRow,
    make: Callable[[FloatArray], BaseController],
    start: FloatArray,
    positions: FloatArray,
    *,
    spread: float,
    bounds: tuple[float, float],
    n_runs: int,
    n_tasks: int,
    seed: int,
    on_done: Callable[[int], None] | None = None,
) -> FloatArray:
    """The vector whose controller ends with the lowest probe loss, on average over tasks.

    All candidates of a generation live through the same tasks; each generation has new ones.

    Args:
        shards: Where runs are played.
        make: What a vector means.
        start: Mean of the first generation.
        positions: Where the knobs begin, `[n_knobs]` in [0, 1].
        spread: Deviation of the first generation.
        bounds: Of every entry.
        n_runs: Budget; the last generation may exceed it.
        n_tasks: Tasks that a candidate is judged by.
        seed: Of candidates, tasks and runs.
        on_done: Called with the number of runs finished since the last call.

    Returns:
        The mean of the last generation, which varies less than its best member.
    """
    from cmaes import CMA

    limits = np.tile(bounds, (len(start), 1))
    optimizer = CMA(mean=np.array(start), sigma=spread, bounds=limits, seed=seed)
    done, generation = 0, 0
    while done < n_runs:
        candidates = [optimizer.ask() for _ in range(optimizer.population_size)]
        arms = [
            Arm(name=str(i), positions=positions, controllers=(make(candidate),))
            for i, candidate in enumerate(candidates)
        ]
        played = play_arms(shards, arms, n_tasks, seed + generation, on_done)
        losses = [float(column(played[arm.name], "final_probe").mean()) for arm in arms]
        optimizer.tell(list(zip(candidates, losses, strict=True)))
        done += n_tasks * len(candidates)
        generation += 1
    return np.asarray(optimizer.mean).clip(*bounds)


def best_schedule(
    shards: ShardRow,
    positions: FloatArray,
    *,
    n_runs: int,
    seed: int,
    n_tasks: int = 8,
    on_done: Callable[[int], None] | None = None,
) -> Arm:
    """The best open-loop schedule: positions at four points of progress, linear in between.

    Args:
        shards: Where runs are played, on the tasks that policies are trained on.
        positions: Where the knobs begin, `[n_knobs]` in [0, 1].
        n_runs: Budget.
        seed: Of candidates, tasks and runs.
        n_tasks: Tasks that a candidate is judged by.
        on_done: Called with the number of runs finished since the last call.
    """
    n_control_steps = shards.describe()["n_control_steps"]

    def make(vector: FloatArray) -> Schedule:
        knots = np.concatenate((positions[None], vector.reshape(len(KNOTS), -1)))
        return Schedule(np.concatenate(([0.0], KNOTS)), knots, n_control_steps)

    found = search(
        shards,
        make,
        np.tile(positions, len(KNOTS)).clip(0.1, 0.9),
        positions,
        spread=_SPREAD,
        bounds=(0.0, 1.0),
        n_runs=n_runs,
        n_tasks=n_tasks,
        seed=seed,
        on_done=on_done,
    )
    return Arm(name="best schedule", positions=positions, controllers=(make(found),))


def best_linear_policy(
    shards: ShardRow,
    policy: Policy,
    positions: FloatArray,
    *,
    n_runs: int,
    seed: int,
    n_tasks: int = 8,
    on_done: Callable[[int], None] | None = None,
) -> Arm:
    """What search makes of what a policy sees: PPO's rival, on the same observations and knobs.

    Args:
        shards: Where runs are played, on the tasks that policies are trained on.
        policy: Its card and its normaliser are the rival's too.
        positions: Where the knobs begin, `[n_knobs]` in [0, 1].
        n_runs: Budget.
        seed: Of candidates, tasks and runs.
        n_tasks: Tasks that a candidate is judged by.
        on_done: Called with the number of runs finished since the last call.
    """
    card = replace(policy.card, hidden=())
    n_out, n_in = len(card.knobs), len(card.observations)
    normaliser = {name: policy.weights[name] for name in ("mean", "std")}

    def make(vector: FloatArray) -> Learned:
        layer = vector.reshape(n_out, n_in + 1)
        weights = {"weight_0": layer[:, :-1], "bias_0": layer[:, -1]}
        return Learned(Policy(card, normaliser | weights))

    found = search(
        shards,
        make,
        np.zeros(n_out * (n_in + 1)),
        positions,
        spread=_GAIN,
        bounds=(-1.0, 1.0),
        n_runs=n_runs,
        n_tasks=n_tasks,
        seed=seed,
        on_done=on_done,
    )
    return Arm(name="linear policy", positions=positions, controllers=(make(found),))
