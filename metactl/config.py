"""Configurations: dataclasses with defaults, read from YAML, changed by flags. No torch here."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from metactl.files import read_bytes
from metactl.refusals import boolean_number, refusal
from metactl.yaml_values import UNREADABLE, load_yaml

STRICT = ConfigDict(extra="forbid")  # an unknown key is refused
_MAX_BYTES = 1 << 20  # of a configuration
SEED_BITS = 15  # of the seeds of trainings
T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the value."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EnvironmentConfig:
    """Which environment, how many runs, and where they live.

    Args:
        id: Gymnasium id with its module prefix.
        options: Keyword arguments of the environment (see its documentation).
        n_envs: Training runs per worker, advanced as one tensor program.
        n_workers: Worker processes with one thread each; -1 is one per core (and variant), 0 none.
        variants: What workers change in the options, one set of changes each in turn, so that
            runs are unlike: other tasks, other models. Knobs must stay the same.
        shards: Where workers live: `"processes"` of this machine, or `"ray"`: actors of a cluster.
        gpus_per_shard: GPUs, or a share of one, of each Ray actor.
    """

    id: str = "envs:AdaptiveTransformer-v0"
    options: dict[str, Any] = field(default_factory=dict)
    n_envs: int = 16
    n_workers: int = -1
    variants: tuple[dict[str, Any], ...] = ()
    shards: Literal["processes", "ray"] = "processes"
    gpus_per_shard: float = 0.0

    def __post_init__(self) -> None:
        for name, held in (("options", self.options), ("variants", self.variants)):
            if where := _not_finite(held):
                raise ValueError(
                    f"{name}{where[0]} must be finite, got {where[1]}: no file holds it; a large "
                    f"number does the same"
                )
        if self.n_envs < 1:
            raise ValueError(f"n_envs must be at least 1 training run, got {self.n_envs}")
        if self.n_workers < -1:
            raise ValueError(f"n_workers must be -1, 0 or more, got {self.n_workers}")
        if not 0 <= self.gpus_per_shard < math.inf:
            raise ValueError(f"gpus_per_shard must be at least 0, got {self.gpus_per_shard}")
        if self.gpus_per_shard and self.shards != "ray":
            raise ValueError("gpus_per_shard is for shards 'ray'; processes share what there is")
        if self.shards == "ray" and self.n_workers == 0:
            raise ValueError("shards 'ray' need n_workers of at least 1 (or -1), got 0")
        if 0 <= self.n_workers < len(self.variants):
            raise ValueError(
                f"n_workers must be at least {len(self.variants)}, one for each variant, "
                f"got {self.n_workers}"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PPOConfig:
    """Proximal policy optimisation (arXiv 1707.06347), Stable-Baselines3's names.

    Args:
        total_timesteps: Control steps to learn from, over all runs.
        n_steps: Control steps of each run between updates.
        batch_size: Control steps per minibatch.
        n_epochs: Passes over what was collected.
        learning_rate: Of Adam, decaying linearly to 0.
        gamma: Discount per control step.
        gae_lambda: Trace of the advantage estimate.
        clip_range: Of the probability ratio.
        ent_coef: Weight of the entropy bonus.
        log_std_init: Log deviation of the exploration at the start (with gSDE: of its weights).
        hidden: Units of the hidden layers.
        use_sde: Explore by smooth, state-dependent noise that lasts for a whole rollout (gSDE,
            arXiv 2005.05719) instead of independent noise in every control step.
        paired_runs: Runs that share their episodes and are rewarded relative to each other.
        bound_cost: Reward that a control step loses where a knob's bound blocks a whole move, in
            units of how far paired runs end apart. A policy that pushes on at a bound moves the
            knob no more, whatever it explores.
        signals: Those that the actor sees beside its knobs, such as `[progress]`; all by default. A
            policy that does not see the run is the measure of one that does.
    """

    total_timesteps: int = 50_000
    n_steps: int = 40
    batch_size: int = 256
    n_epochs: int = 6
    learning_rate: float = 7e-4
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.3
    ent_coef: float = 0.0
    log_std_init: float = -0.7
    hidden: tuple[int, ...] = (64, 64)
    use_sde: bool = False
    paired_runs: int = 4
    bound_cost: float = 0.02
    signals: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        counts = ("total_timesteps", "n_steps", "batch_size", "n_epochs", "paired_runs")
        for name in counts:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 control steps, got {self.batch_size}")
        if any(units < 1 for units in self.hidden):
            raise ValueError(f"hidden must be units of at least 1, got {list(self.hidden)}")
        if not 0 <= self.bound_cost < math.inf:
            raise ValueError(f"bound_cost must be at least 0, got {self.bound_cost}")
        for name in ("ent_coef", "log_std_init", "clip_range"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        for name in ("clip_range", "ent_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "gamma", "gae_lambda"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Training a meta-controller.

    Args:
        environment: What it learns on.
        ppo: How it learns.
        seed: Determines tasks, runs and learning.
        checkpoint_every: Updates between checkpoints.
        policy_every: Control steps between policies kept along the way, `policies/STEPS` in the run
            directory, for a learning curve; 0 keeps none.
        set_point_runs: Runs under static settings from which the set-points of homeostasis are
            estimated in the end; 0 leaves them out.
    """

    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    seed: int = 0
    checkpoint_every: int = 1
    policy_every: int = 0
    set_point_runs: int = 64

    def __post_init__(self) -> None:
        lowest = {"seed": 0, "checkpoint_every": 1, "policy_every": 0, "set_point_runs": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.seed >= 1 << SEED_BITS:
            raise ValueError(
                f"seed must be below {1 << SEED_BITS} (others share tasks), got {self.seed}"
            )


def _not_finite(value: Any) -> tuple[str, float] | None:
    """Where among plain values a number is not finite, and which."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ("", value)
    held = value if isinstance(value, Mapping) else {}
    held = dict(enumerate(value)) if isinstance(value, list | tuple) else held
    for key, each in held.items():
        if found := _not_finite(each):
            return f".{key}{found[0]}", found[1]
    return None


def read_config(kind: type[T], path: str | Path | None, changes: Mapping[str, Any]) -> T:
    """A configuration from a YAML file (or the defaults) with some keys changed.

    Args:
        kind: The dataclass.
        path: YAML that holds what differs from the defaults.
        changes: Dotted keys and values, such as `{"ppo.learning_rate": 3e-4}`; they win.

    Raises:
        ConfigError: For an unreadable file, an unknown key or a value out of range.
    """
    values: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    source = "the flags" if path is None else f"{path} with the flags" if changes else str(path)
    _put(values, changes, source)
    return parse(kind, values, source)


def changed(config: T, changes: Mapping[str, Any]) -> T:
    """A configuration with some keys changed; see `read_config`."""
    values = dump(config)
    _put(values, changes, "the changes")
    return parse(type(config), values, "the changes")


def _put(values: dict[str, Any], changes: Mapping[str, Any], source: str) -> None:
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = values
        for depth, parent in enumerate(parents, start=1):
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                where = ".".join(parents[:depth])
                raise ConfigError(f"{source}: {where} must hold keys and values, got {node!r}")
        node[leaf] = deepcopy(value)  # a later key may change what is inside


def parse(kind: type[T], values: Mapping[str, Any], source: str) -> T:
    """Validates plain values; errors name the key, the file and what was received."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: a configuration must hold keys and values, got {values!r}")
    if where := boolean_number(kind, values):
        raise ConfigError(f"{source}: {where[0]} must be a number, got {where[1]}")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {refusal(kind, error, values)}") from error


def dump(config: Any) -> dict[str, Any]:
    """A configuration as plain values, the reverse of `parse`."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = load_yaml(read_bytes(path, _MAX_BYTES).decode())
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"Config {str(path)!r} cannot be read: {reason}") from error
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Config {str(path)!r} is not YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"Config {str(path)!r} must hold keys and values, got {values!r}")
    return values


def find_config(name: str) -> Path:
    """A YAML file by path, or a packaged recipe by its name.

    Raises:
        ConfigError: If there is neither; the message lists the recipes.
    """
    path = Path(name or "none")
    if path.is_file():
        return path
    here = Path(__file__).resolve().parent
    folders = [here / "configs", here.parent / "configs"]  # in a wheel; in a checkout
    recipes = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for folder in folders
        for file in sorted(folder.rglob("*.yaml"))
    }
    known = path.as_posix().removesuffix(".yaml").removesuffix(".yml")
    found = recipes.get(known.removeprefix("configs/"))
    if found is None:
        raise ConfigError(
            f"Config {name!r} is neither a file nor a recipe. "
            f"Recipes: {', '.join(name for name in recipes if '/' not in name)}, and "
            f"variants/NAME for each rotation"
        )
    return found


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` from the command line; the value as YAML reads it.

    Raises:
        ConfigError: If it is not of that form.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set takes KEY=VALUE, got {text!r}")
    try:
        parsed = load_yaml(value)
    except UNREADABLE as error:
        shown = value if len(value) < 80 else f"{value[:80]}..."
        raise ConfigError(f"--set {key}: {shown!r} is not a YAML value") from error
    return key, parsed


def parse_setting(text: str) -> dict[str, float]:
    """`dropout=0,attention_span=8` as numbers by name.

    Raises:
        ConfigError: If it is not of that form.
    """
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError as error:
        raise ConfigError(f"--static takes KNOB=NUMBER[,KNOB=NUMBER...], got {text!r}") from error
