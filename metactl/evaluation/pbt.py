"""Population-based training (arXiv 1711.09846): the members of a population share a task.

At regular times the worst members take over the weights and optimizer of better ones, and get other
knobs: near those of the better one (PBT), or what promises most so far (PB2). Members are rows of
one population, so a takeover is a copy of rows. Its cost is that of all members, for one model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from metactl.controllers import Static
from metactl.env import ControlLoop
from metactl.episodes import Episode
from metactl.evaluation.arms import paired_episodes
from metactl.evaluation.bandit import Stretch
from metactl.knobs import FloatArray
from metactl.rollout import PlannedRun, PlayedRun
from metactl.shards import ShardRow

_ARM = "PBT"
_MEMBERS, _TAKEOVERS = 0xB7, 0x7A


Explore = Callable[[Sequence[Stretch], FloatArray, FloatArray, np.random.Generator], FloatArray]
"""From what a population did so far, the knobs of those that others take over from,
`[n_new, n_knobs]`, and of those that go on: the knobs of those that take over."""


def perturbed(
    stretches: Sequence[Stretch],
    better: FloatArray,
    going_on: FloatArray,
    rng: np.random.Generator,
    *,
    resample: float = 0.25,
) -> FloatArray:
    """Knobs near those of the better member, or with probability `resample` anywhere: PBT."""
    return near_or_anew(better, 0.0, 1.0, rng, resample=resample)


def near_or_anew(
    positions: FloatArray,
    low: FloatArray | float,
    high: FloatArray | float,
    rng: np.random.Generator,
    *,
    spread: float = 0.15,
    resample: float = 0.25,
) -> FloatArray:
    """Positions that deviate by `spread`, or with probability `resample` lie anywhere in range."""
    near = positions + spread * rng.standard_normal(positions.shape)
    anew = low + (high - low) * rng.random(positions.shape)
    drawn = rng.random(positions.shape) < resample
    return np.where(drawn, anew, near).clip(low, high)


@dataclass(kw_only=True)
class Takeovers:
    """What happens between the control steps of populations, each of neighbouring rows.

    It remembers what they did: a new one for every run of a row.

    Args:
        n_members: Runs that share a task.
        seed: Of the random changes.
        explore: Where a member that takes over from another puts the knobs.
        every: Control steps between takeovers; none in the last such stretch.
        share: Of the members that are replaced, and of those that replace them.
    """

    n_members: int
    seed: int
    explore: Explore = perturbed
    every: int = 4
    share: float = 0.25
    _began: FloatArray | None = field(default=None, repr=False)
    _stretches: list[Stretch] = field(default_factory=list, repr=False)

    def __call__(
        self, index: int, loop: ControlLoop, probe_loss: FloatArray
    ) -> tuple[list[int], list[int]]:
        """After the control step of an index: the worst members take over from the best.

        Returns:
            The rows taken over, and the rows that took over.
        """
        last = loop.config.n_control_steps - self.every
        if (index + 1) % self.every or index + 1 > last:
            return [], []
        sources: list[int] = []
        targets: list[int] = []
        loss = np.where(np.isfinite(probe_loss), probe_loss, np.inf)
        began = loop.start_loss if self._began is None else self._began
        with np.errstate(invalid="ignore"):  # of who had diverged before
            gain = np.where(np.isfinite(loss), began - loss, -np.inf)
        self._stretches.append(Stretch(loop.positions.copy(), gain))
        n_replaced = max(1, round(self.share * self.n_members))
        for first in range(0, loop.run.n_runs - self.n_members + 1, self.n_members):
            own = int(loop.run_seeds[first])  # the task's, wherever it is played
            rng = np.random.default_rng([self.seed, _TAKEOVERS, index, own])
            members = slice(first, first + self.n_members)
            order = first + loss[members].argsort(kind="stable")
            going_on, worst = order[:-n_replaced], order[-n_replaced:]
            better = rng.choice(order[:n_replaced], n_replaced)
            loop.run.copy_rows(better.tolist(), worst.tolist())
            sources += better.tolist()
            targets += worst.tolist()
            past = [Stretch(s.positions[members], s.gain[members]) for s in self._stretches]
            positions = loop.positions
            positions[worst] = self.explore(past, positions[better], positions[going_on], rng)
        self._began = loss.copy()
        self._began[targets] = loss[sources]
        return sources, targets


def check_populations(n_envs: int, n_members: int) -> None:
    """Refuses populations that do not fit side by side."""
    if n_envs % n_members:
        raise ValueError(
            f"populations of {n_members} need a multiple of {n_members} runs per worker, "
            f"got {n_envs}"
        )


def play_pbt(
    shards: ShardRow,
    n_members: int,
    n_tasks: int,
    seed: int,
    default: FloatArray,
    on_done: Callable[[int], None] | None = None,
    explore: Explore = perturbed,
) -> list[PlayedRun]:
    """The best member, by its final probe loss, of one population per task.

    Args:
        shards: Where runs are played; whole populations must fit side by side.
        n_members: Of a population. The first begins as all other arms do, the others with random
            knobs, weights and batches.
        n_tasks: Those of all other arms.
        seed: Of tasks and runs.
        default: Where the knobs of the first member begin, `[n_knobs]` in [0, 1].
        on_done: Called with the number of runs finished since the last call.
        explore: Where a member that takes over from another puts the knobs.

    Returns:
        One result per task, with the FLOPs of all members.

    Raises:
        ValueError: If a shard's runs are no whole number of populations.
    """
    check_populations(shards.n_envs, n_members)
    planned = [
        PlannedRun(arm=_ARM, episode=member, controller=Static())
        for episode in paired_episodes(n_tasks, seed, default)
        for member in _members(episode, n_members)
    ]
    takeovers = Takeovers(n_members=n_members, seed=seed, explore=explore)
    played = shards.play(planned, on_done, takeovers)
    best = []
    for first in range(0, len(played), n_members):
        members = played[first : first + n_members]
        winner = min(members, key=lambda result: result.final_probe)
        best.append(replace(winner, flops=np.sum([result.flops for result in members], axis=0)))
    return best


def _members(episode: Episode, n: int) -> list[Episode]:
    rng = np.random.default_rng([episode.run_seed, _MEMBERS])
    others = [
        replace(
            episode,
            run_seed=int(rng.integers(2**31)),
            positions=rng.random(len(episode.positions)),
        )
        for _ in range(n - 1)
    ]
    return [episode, *others]
