"""What a sweep varies, validated before anything starts; and the trials that it comes to."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass

from metactl.config import (
    STRICT,
    ConfigError,
    TrainConfig,
    changed,
    dump,
    find_config,
    read_config,
)
from metactl.policy import Policy
from metactl.rundir import resolve_data, resolve_data_of

_LEAST_MEMBERS = 4
_OWN = ("environment.shards", "environment.n_workers")  # of every trial: see `resources`


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stop:
    """When to end early.

    Args:
        minutes: Of each start of the sweep; what is not done then is left, and the same command
            goes on.
        patience: Reports of a trial without a better return, after which it is given up; counted
            from its last start. It reports before updates, where runs have ended (`"train"`), or
            `every` so many control steps (`"knobs"`).
    """

    minutes: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("minutes", "patience"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepConfig:
    """A sweep.

    Args:
        kind: `"train"` meta-trains a policy per trial and scores it; `"apply"` scores a policy
            that exists on new runs; `"knobs"` scores settings of the knobs themselves, without a
            policy: what a policy has to beat.
        recipe: For `"train"`: configuration that all trials share, by file or recipe name.
        policy: Folder of a policy, or the name of one that ships: the one that is applied
            (`"apply"`), or whose environment and knobs these are (`"knobs"`).
        options: Of the environment, for all trials of kind `"apply"` and `"knobs"`.
        space: By dotted key of the recipe (`"train"`), by option of the environment and `policy`
            (`"apply"`) or by knob (`"knobs"`): the values.
        samples: Draws for each combination of the grids.
        n_tasks: Paired tasks by which a policy is scored, over all kinds of runs it learned on.
        mean_of: Of kind `"train"`: the policy that a sweep leaves acts as so many of its best do on
            average.
        resources: Of one trial.
        searcher: `"random"`, or `"optuna"`: what is drawn comes from what the finished trials show,
            whatever their grid values.
        scheduler: `"none"`; `"asha"`: trials that learn slowly stop early (`"train"`, `"knobs"`);
            `"pbt"` (arXiv 1711.09846) or `"pb2"` (arXiv 2002.02518): the trials are a population,
            the worst take over the runs of better ones and go on at other knobs (`"knobs"`).
        every: Control steps between takeovers, and between reports of kind `"knobs"`.
        stop: Rules that end it early.
        max_failures: How often a trial that fails is started again; it goes on where it was.
        seed: Of the draws and of the tasks.
    """

    kind: Literal["train", "apply", "knobs"] = "train"
    recipe: str = "train"
    policy: str = "default"
    options: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Range] = field(default_factory=dict)
    samples: int = 1
    n_tasks: int = 16
    mean_of: int = 1
    resources: Resources = field(default_factory=Resources)
    searcher: Literal["random", "optuna"] = "random"
    scheduler: Literal["none", "asha", "pbt", "pb2"] = "none"
    every: int = 4
    stop: Stop = field(default_factory=Stop)
    max_failures: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"samples": 1, "n_tasks": 2, "mean_of": 1, "max_failures": 0, "seed": 0, "every": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.space:
            raise ValueError("space is empty: name at least one key to vary")
        if self.options and self.kind == "train":
            raise ValueError("options are of kinds 'apply' and 'knobs'; a recipe has its own")
        if self.kind != "train" and "split" in {**self.space, **self.options}:
            raise ValueError("split is not to choose: trials are scored on tasks of meta_train")
        for key in self.space:
            for other in (*self.space, *(_OWN if self.kind == "train" else ())):
                if other != key and other.startswith(f"{key}."):
                    raise ValueError(f"{key} holds {other}: name one of them, or their other keys")
        for key in _OWN:
            if self.kind == "train" and key in self.space:
                raise ValueError(f"{key} is not to vary: where a trial runs follows from resources")
        if self.mean_of > 1 and self.kind != "train":
            raise ValueError(f"mean_of is of kind 'train'; kind {self.kind!r} learns no policies")
        if self.kind == "apply" and (self.scheduler != "none" or self.stop.patience):
            raise ValueError(
                f"scheduler {self.scheduler!r} and patience compare learning; kind 'apply' learns "
                f"nothing"
            )
        if self.kind == "knobs" and self.searcher != "random":
            raise ValueError("searcher 'optuna' chooses for kinds 'train' and 'apply'")
        if self.is_population:
            self._require_population()

    @property
    def is_population(self) -> bool:
        """Whether trials take over each other's runs."""
        return self.scheduler in ("pbt", "pb2")

    def _require_population(self) -> None:
        if self.kind != "knobs":
            raise ValueError(f"scheduler {self.scheduler!r} moves knobs: it needs kind 'knobs'")
        if self.samples < _LEAST_MEMBERS:
            raise ValueError(
                f"scheduler {self.scheduler!r} needs samples of at least {_LEAST_MEMBERS}, the "
                f"members of its population, got {self.samples}"
            )
        if self.stop.patience:
            raise ValueError(
                f"patience gives trials up; under scheduler {self.scheduler!r} they take over"
            )
        for key, values in self.space.items():
            if values.uniform is None and values.loguniform is None:
                raise ValueError(
                    f"scheduler {self.scheduler!r} moves within uniform or loguniform; "
                    f"{key} has neither"
                )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of the space.

    Args:
        name: Says which, and is the same in every start of the same sweep.
        changes: By key: the value.
        recipe: Of kind `"train"`: all that it runs, with absolute paths; a trial may run anywhere.
        options: Of kinds `"apply"` and `"knobs"`: those of the environment.
        policy: Of the same kinds: its absolute folder, or the name of one that ships.
        sets_knobs: Whether it is of kind `"knobs"`: its changes are values of knobs.
    """

    name: str
    changes: dict[str, Any]
    recipe: TrainConfig | None = None
    options: dict[str, Any] = field(default_factory=dict)
    policy: str = ""
    sets_knobs: bool = False


def with_rotation(config: SweepConfig, rotation: str) -> SweepConfig:
    """A sweep all of whose trials have a rotation variant."""
    if config.kind == "knobs":
        return replace(config, options={**config.options, "rotation": rotation})
    key = "environment.options.rotation" if config.kind == "train" else "rotation"
    return replace(config, space={**config.space, key: Range(grid=(rotation,))})


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
        varied = changes if config.kind == "apply" else {}
        if "policy" in config.options:
            raise ConfigError("policy is a key of the sweep, not one of its options")
        options = resolve_data({**config.options, **varied})
        chosen = options.pop("policy", config.policy)
        if not isinstance(chosen, str):
            raise ConfigError(f"policy must be a folder or a name, got {chosen!r}")
        policy = Path(os.path.expanduser(chosen))
        located = str(policy.resolve() if policy.is_dir() else policy)
        return Trial(
            name=name,
            changes=changes,
            options=options,
            policy=located,
            sets_knobs=config.kind == "knobs",
        )
    except ConfigError as error:
        raise ConfigError(f"trial {name} ({described(changes)}): {error}") from error


def _recipe(recipe: str, changes: dict[str, Any]) -> TrainConfig:
    """A trial's runs are in its own process, but for variants, which need one each."""
    path = find_config(recipe)
    here: dict[str, Any] = {"environment.shards": "processes"}  # Tune's trials hold the cluster
    variants = read_config(TrainConfig, path, changes | here).environment.variants
    here["environment.n_workers"] = len(variants)
    config = read_config(TrainConfig, path, changes | here)
    return changed(config, resolve_data_of(config.environment))


def resolved(trials: Sequence[Trial]) -> dict[str, Any]:
    """What trials run that their sweep's file only names: the first one's recipe or options, and
    the checksums of all policies. A sweep goes on only if it is the same.

    Raises:
        PolicyError: If there is no such policy.
    """
    first = trials[0]
    if first.recipe is not None:
        return {"recipe": dump(first.recipe)}
    policies = sorted({trial.policy for trial in trials})
    checksums = {policy: Policy.load(policy).card.weights_sha256 for policy in policies}
    return {"options": first.options, "policies": checksums}


def described(changes: dict[str, Any]) -> str:
    """`ppo.learning_rate=0.001, seed=3`."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in changes.items()
    )


def trial_folder(root: Path, trial: str) -> Path:
    return root / "trials" / trial
