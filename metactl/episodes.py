"""How episodes begin, drawn from seeds alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass as validated

from metactl.config import STRICT, parse
from metactl.knobs import FloatArray, KnobSet


@validated(frozen=True, kw_only=True, config=STRICT)
class ControlConfig:
    """How an environment is controlled and how its episodes begin.

    Args:
        n_control_steps: Decisions per training run.
        split: Which tasks are drawn: `"meta_train"`, `"meta_test"` or, of text, `"all"`.
        reward_scale: Improvement of a default run, in nats; the reward's unit.
        random_start: Probability that an episode begins with random knob positions.
        freeze: Probability that a knob is frozen (unavailable) in an episode.
        hide: Probability that a group of signals is hidden in an episode, as if the run could not
            measure it.
    """

    n_control_steps: int = 40
    split: str = "meta_train"
    reward_scale: float = 1.0
    random_start: float = 0.0
    freeze: float = 0.0
    hide: float = 0.0

    def __post_init__(self) -> None:
        if self.n_control_steps < 1:
            raise ValueError(f"n_control_steps must be at least 1, got {self.n_control_steps}")
        for name in ("random_start", "freeze", "hide"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], ControlConfig]:
    """Separates the options of a run from those of its control."""
    names = {field.name for field in fields(ControlConfig)}
    control = {key: value for key, value in options.items() if key in names}
    rest = {key: value for key, value in options.items() if key not in names}
    return rest, parse(ControlConfig, control, "the environment")


@dataclass(frozen=True, kw_only=True)
class Episode:
    """How one episode begins.

    Args:
        task_seed: Determines the task.
        run_seed: Determines weights, batches and noise.
        positions: Knob positions `[n_knobs]` in [0, 1].
        available: 1 where a knob may move, `[n_knobs]`.
        hidden: Groups of signals that are not observed.
    """

    task_seed: int
    run_seed: int
    positions: FloatArray
    available: FloatArray
    hidden: tuple[str, ...] = ()


def draw_episode(
    config: ControlConfig, knobs: KnobSet, groups: Sequence[str], seed: int, index: int
) -> Episode:
    """The `index`-th episode of an environment seed.

    Args:
        config: The probabilities.
        knobs: That the run has.
        groups: Of signals, which can be hidden.
        seed: The environment's.
        index: Counts its episodes.
    """
    rng = np.random.default_rng([seed, index])
    run_seed = int(rng.integers(0, 2**31))
    positions = knobs.default_positions(1)[0]
    if rng.random() < config.random_start:
        positions = rng.random(len(knobs))
    available = (rng.random(len(knobs)) >= config.freeze).astype(np.float64)
    if not available.any():
        available[rng.integers(len(knobs))] = 1.0
    return Episode(
        task_seed=spread_seed(index, seed),
        run_seed=run_seed,
        positions=positions,
        available=available,
        hidden=tuple(group for group in groups if rng.random() < config.hide),
    )


def spread_seed(stream: int, place: int) -> int:
    """A task seed; consecutive places of a stream give consecutive seeds.

    Task families spread what they draw evenly over consecutive seeds, so that the tasks played
    side by side are alike as a set, not only on average.
    """
    base = int(np.random.default_rng([stream, 0x5EED]).integers(2**31))
    return (base + place) % 2**31


def horizon_seed(seed: int, episode: int) -> int:
    """Of the horizon that all runs of an environment share from this episode on."""
    return int(np.random.default_rng([seed, episode, 2]).integers(2**31))
