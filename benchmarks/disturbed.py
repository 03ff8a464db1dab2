"""What a run loses to each kind of disturbance, and how much of that knobs could win back at all.

    python -m benchmarks.disturbed --json docs/disturbed.json

On the held-out tasks of docs/evidence.md, each kind befalls every run in turn, under the best
static setting and under the policy. `told` arms know what no controller does: when a raised
learning rate or noise in the labels begins, how large it is and when it ends. From that control
step on they bring the learning rate down as fast as the knob moves, by the factor of the
disturbance (for noise to the knob's end), and up again afterwards. What they lose is what is left
to the speed of the knob; `told late` arms hear of it one control step later, as who looks at the
run does.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.provenance import write
from envs.disturbances import KINDS, Disturbances
from metactl.config import parse_setting
from metactl.controllers import BaseController, Guard, Learned, Static
from metactl.deployment import deployment
from metactl.evaluation import Where, play_arms
from metactl.evaluation.arms import Arm, Results, paired_episodes, policy_arm, static_arm
from metactl.evaluation.disturbed import disturbed_summary
from metactl.evaluation.place import RunCounter
from metactl.knobs import FloatArray, KnobSet
from metactl.policy import Policy
from metactl.progress import bar
from metactl.shards import ShardRow, default_workers
from metactl.signals import Codec

RATE = "learning_rate_multiplier"
_SHOWN = ("final_test", "excess_loss_area", "settling_time", "homeostasis_index")
_TOLD = ("learning_rate", "labels")  # the kinds that last and end


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which policy, where."""

    json: Path
    """Where the figures go."""
    policy: str = "default"
    """Folder of a policy, or the name of one that ships."""
    static: str = "rope_base=3076.9,dropout=0.0515,learning_rate_multiplier=1.546"
    """The setting beside it: the best of 35 in docs/evidence.md."""
    n_tasks: int = 64
    """Runs per arm and kind."""
    optimizer_steps: int = 240
    """Per run."""


class Told(BaseController):
    """Acts as another does, but counters a disturbance of the learning rate that it is told of.

    Args:
        inner: Who acts before, and after.
        begins: Share of the run after which the disturbance begins.
        ends: And ends.
        factor: By which to lower the learning rate; infinity for as low as it goes.
        delay: Control steps by which it hears of both too late.
    """

    def __init__(
        self,
        inner: BaseController,
        begins: float,
        ends: float,
        factor: float,
        delay: int = 0,
    ) -> None:
        self.inner, self.factor = inner, factor
        self.begins, self.ends, self.delay = begins, ends, delay

    def keep_pace(self, n_control_steps: int) -> None:
        super().keep_pace(n_control_steps)
        self.inner.keep_pace(n_control_steps)
        # The control steps of which some part is disturbed.
        self.first = int(self.begins * n_control_steps) + self.delay
        self.last = int(np.ceil(self.ends * n_control_steps)) - 1 + self.delay

    def begin(self, codec: Codec, n_runs: int) -> None:
        super().begin(codec, n_runs)
        self.inner.begin(codec, n_runs)
        self._index, self._home = 0, np.zeros(n_runs)
        self._away = False

    def act(self, observation: np.ndarray) -> np.ndarray:
        actions = self.inner.act(observation)
        positions = self.codec.positions(observation)
        i = self.codec.knobs.names.index(RATE)
        if self._index == self.first:
            self._home, self._away = positions[:, i].copy(), True
        if self._away:
            target = positions.copy()
            target[:, i] = self._home - self._depth(i) * (self._index <= self.last)
            back = self.towards(np.clip(target, 0, 1), observation)
            actions[:, i] = back[:, i]
            arrives = np.abs(target[:, i] - positions[:, i]) < 1e-9
            self._away = self._index <= self.last or not bool(arrives.all())
        self._index += 1
        return actions

    def _depth(self, index: int) -> float:
        knob = self.codec.knobs.knobs[index]
        return min(float(np.log(self.factor) / np.log(knob.high / knob.low)), 1.0)


def told_arms(kind: str, arm: Arm, inner: BaseController, n_tasks: int, steps: int) -> list[Arm]:
    """An arm whose controllers are told what befalls each run; none for what cannot be undone."""
    if kind not in _TOLD:
        return []
    lot = Disturbances((kind,), 1.0, n_tasks, torch.device("cpu"))
    seeds = [episode.run_seed for episode in paired_episodes(n_tasks, 0, arm.positions)]
    lot.draw(range(n_tasks), seeds, steps)
    rows = {name: tensor.tolist() for name, tensor in lot.rows.items()}
    found = []
    for delay, name in enumerate(("told", "told late")):
        controllers = [
            Told(
                inner,
                rows["disturbance_begins"][task] / steps,
                rows["disturbance_ends"][task] / steps,
                rows["disturbance_size"][task] if kind == "learning_rate" else float("inf"),
                delay,
            )
            for task in range(n_tasks)
        ]
        found.append(replace(arm, name=f"{arm.name}, {name}", controllers=controllers))
    return found


def measured(
    kind: str, played: Results, undisturbed: Results, policy: Policy, names: Iterable[str]
) -> dict[str, Any]:
    """The figures of each arm; a told arm's twin is that of the arm itself."""
    twins = {arm: undisturbed[arm.partition(",")[0]] for arm in played}
    summary = disturbed_summary(played, twins, policy.card.set_points, tuple(names))
    arms = {
        arm: {name: figures[name] for name in _SHOWN if name in figures}
        for arm, figures in summary["arms"].items()
    }
    shown = (f"{arm} {figures['excess_loss_area']:.4f}" for arm, figures in arms.items())
    print(kind, *shown, flush=True)
    return arms


def compare(policy: Policy, setting: dict[str, float], options: Options) -> dict[str, Any]:
    """By kind, what each arm came to."""
    n, steps = options.n_tasks, options.optimizer_steps
    env_id, recipe = deployment(policy, {"horizon": steps, "compile": True})
    where = Where(env_id=env_id, options=recipe, n_envs=16, n_workers=default_workers())

    def play(shards: ShardRow, arms: list[Arm]) -> Results:
        with bar("Runs") as progress:
            return play_arms(shards, arms, n, 0, RunCounter(len(arms) * n, progress))

    with where.open() as shards:
        about = shards.describe()
        knobs = about.knobs
        arms: dict[str, tuple[Arm, BaseController]] = {
            "static": (static_arm("static", position(knobs, setting)), Static()),
            "policy": (
                policy_arm(policy, knobs.default_positions(1)[0]),
                Guard(Learned(policy)),
            ),
        }
        plain = [arm for arm, _ in arms.values()]
        undisturbed = play(shards, plain)
    found: dict[str, Any] = {}
    for kind in KINDS:
        told = [
            told_arm
            for arm, inner in arms.values()
            for told_arm in told_arms(kind, arm, inner, n, steps)
        ]
        with where.open(disturb=1.0, disturbances=[kind]) as shards:
            played = play(shards, [*plain, *told])
        found[kind] = measured(kind, played, undisturbed, policy, about.observation_names)
    return found


def position(knobs: KnobSet, setting: dict[str, float]) -> FloatArray:
    return np.asarray(knobs.positions(dict(setting), 1)[0])


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    try:
        policy, setting = Policy.load(options.policy), parse_setting(options.static)
        kinds = compare(policy, setting, options)
    except ValueError as error:
        print(f"disturbed: {error}", file=sys.stderr)
        sys.exit(2)
    about = {"n_tasks": options.n_tasks, "horizon": options.optimizer_steps, "static": setting}
    write(options.json, {**about, "kinds": kinds})


if __name__ == "__main__":
    main()
