"""What a sweep varies, validated before anything starts; and the trials that it comes to."""

import hashlib
import itertools
import json
import math
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from metactl.config import ConfigError, TrainConfig, find_config, read_config
from metactl.rundir import resolve_data

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Range:
    """Where the values of one key come from; exactly one of these.

    Args:
        grid: Every one of them, combined with those of other grids.
        choice: One of them, drawn evenly.
        uniform: Between two numbers, drawn evenly.
        loguniform: Between two numbers above 0, drawn evenly on a logarithmic scale.
    """

    grid: tuple[Any, ...] | None = None
    choice: tuple[Any, ...] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(_KINDS)}, got {given or 'none'}")
        values = getattr(self, given[0])
        if not values:
            raise ValueError(f"{given[0]} needs at least one value")
        if given[0] in ("uniform", "loguniform"):
            low, high = values
            lowest = 0.0 if given[0] == "loguniform" else -math.inf
            if not lowest < low < high < math.inf:
                raise ValueError(f"{given[0]} needs finite low < high, got {low}, {high}")

    def draw(self, rng: np.random.Generator) -> Any:
        """One value; of a grid none."""
        if self.choice is not None:
            return self.choice[int(rng.integers(len(self.choice)))]
        if self.uniform is not None:
            return float(rng.uniform(*self.uniform))
        assert self.loguniform is not None
        low, high = self.loguniform
        return float(low * (high / low) ** rng.uniform())


_KINDS = ("grid", "choice", "uniform", "loguniform")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Resources:
    """What one trial takes of the cluster.

    Args:
        cpu: Cores; a trial is one process, and one more for each variant of its recipe.
        gpu: GPUs, or a fraction of one; fractions do not limit memory.
    """

    cpu: float = 1.0
    gpu: float = 0.0

    def __post_init__(self) -> None:
        if not (self.cpu > 0 and self.gpu >= 0):
            raise ValueError(f"a trial needs cpu > 0 and gpu >= 0, got {self.cpu}, {self.gpu}")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SweepConfig:
    """A sweep.

    Args:
        kind: `"train"` meta-trains a policy per trial and scores it; `"apply"` scores a policy
            that exists on new runs.
        recipe: For `"train"`: configuration that all trials share, by file or recipe name.
        policy: For `"apply"`: folder of a policy, or the name of one that ships.
        space: By dotted key of the recipe (`"train"`) or option of the environment and `policy`
            (`"apply"`): the values.
        samples: Draws for each combination of the grids.
        n_tasks: Paired tasks by which a policy is scored.
        resources: Of one trial.
        searcher: `"random"`, or `"optuna"`: what is drawn comes from what the finished trials show,
            whatever their grid values.
        scheduler: `"none"`, or `"asha"`: trials that learn slowly stop early (`"train"`).
        max_failures: How often a trial that fails is started again; it goes on where it was.
        seed: Of the draws and of the tasks.
    """

    kind: Literal["train", "apply"] = "train"
    recipe: str = "train"
    policy: str = "default"
    space: dict[str, Range] = field(default_factory=dict)
    samples: int = 1
    n_tasks: int = 16
    resources: Resources = field(default_factory=Resources)
    searcher: Literal["random", "optuna"] = "random"
    scheduler: Literal["none", "asha"] = "none"
    max_failures: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("n_tasks", 2), ("max_failures", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.space:
            raise ValueError("space is empty: name at least one key to vary")
        if self.scheduler == "asha" and self.kind == "apply":
            raise ValueError("scheduler 'asha' compares learning; kind 'apply' learns nothing")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of the space.

    Args:
        name: Says which, and is the same in every start of the same sweep.
        changes: By key: the value.
        recipe: Of kind `"train"`: all that it runs, with absolute paths; a trial may run anywhere.
        options: Of kind `"apply"`: those of the environment.
        policy: Of kind `"apply"`: its absolute folder, or the name of one that ships.
    """

    name: str
    changes: dict[str, Any]
    recipe: TrainConfig | None = None
    options: dict[str, Any] = field(default_factory=dict)
    policy: str = ""


def plan(config: SweepConfig) -> list[Trial]:
    """All trials, in order, each with what it needs; files and keys are checked.

    Raises:
        ConfigError: If a key or value does not fit.
    """
    rng = np.random.default_rng(config.seed)
    grids = {key: r.grid for key, r in config.space.items() if r.grid is not None}
    drawn = {key: r for key, r in config.space.items() if r.grid is None}
    trials: list[Trial] = []
    for point in itertools.product(*grids.values()):
        for _ in range(config.samples if drawn else 1):
            changes = dict(zip(grids, point, strict=True))
            changes |= {key: r.draw(rng) for key, r in drawn.items()}
            trials.append(_trial(config, len(trials), changes))
    return trials


def _trial(config: SweepConfig, index: int, changes: dict[str, Any]) -> Trial:
    text = json.dumps(changes, sort_keys=True, default=str)
    name = f"{index:03d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    try:
        if config.kind == "train":
            return Trial(name=name, changes=changes, recipe=_recipe(config.recipe, changes))
        options = resolve_data(dict(changes))
        policy = Path(options.pop("policy", config.policy))
        located = str(policy.resolve() if policy.is_dir() else policy)
        return Trial(name=name, changes=changes, options=options, policy=located)
    except ConfigError as error:
        raise ConfigError(f"trial {name} ({described(changes)}): {error}") from error


def _recipe(recipe: str, changes: dict[str, Any]) -> TrainConfig:
    """A trial's runs are in its own process, but for variants, which need one each."""
    path = find_config(recipe)
    here: dict[str, Any] = {"environment.shards": "processes"}  # Tune's trials hold the cluster
    variants = read_config(TrainConfig, path, changes | here).environment.variants
    here["environment.n_workers"] = len(variants)
    config = read_config(TrainConfig, path, changes | here)
    options = {"environment.options": resolve_data(config.environment.options)}
    return read_config(TrainConfig, path, changes | here | options)


def described(changes: dict[str, Any]) -> str:
    """`ppo.learning_rate=0.001, seed=3`."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in changes.items()
    )


def trial_folder(root: Path, trial: str) -> Path:
    return root / "trials" / trial
