"""What would refuse a sweep does so before anything starts."""

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from metactl.config import ConfigError
from metactl.knobs import KnobSet
from metactl.policy import Policy
from metactl.shards import Description, ShardRow
from metactl.sweep.config import SweepConfig, Trial, described
from metactl.sweep.score import runs_of
from metactl.sweep.searcher import require_searcher
from metactl.vec_env import check_pairs


def check_sweep(config: SweepConfig, trials: Sequence[Trial]) -> None:
    """Refuses a sweep that one of its trials, its searcher or its scheduler would refuse.

    Raises:
        ConfigError: With the words of whatever refuses it.
    """
    require_searcher(config)
    if config.mean_of > len(trials):
        raise ConfigError(
            f"mean_of must be at most {len(trials)}, the number of trials, got {config.mean_of}"
        )
    elsewhere = config.resources.gpu > 0
    abouts = check_trials(trials, elsewhere=elsewhere)
    if config.mean_of > 1:
        _require_alike(trials, abouts)
    if not config.is_population:
        return
    if config.scheduler == "pb2" and find_spec("sklearn") is None:
        raise ConfigError("scheduler 'pb2' needs scikit-learn: pip install scikit-learn")
    about = abouts[0]
    if config.every >= about.n_control_steps:
        raise ConfigError(
            f"every must be below the {about.n_control_steps} control steps of a run, else "
            f"nothing is ever taken over; got {config.every}"
        )
    try:
        position_bounds(config, about.knobs)
    except ValueError as error:
        raise ConfigError(f"space: {error}") from error


def _require_alike(trials: Sequence[Trial], abouts: Sequence[Description]) -> None:
    """Policies have a mean only if they see and move the same and are of one shape."""
    found: list[dict[str, Any]] = []
    for trial, about in zip(trials, abouts, strict=True):
        assert trial.recipe is not None
        found.append(
            {
                "knobs": about.knobs.knobs,
                "observation_names": about.observation_names,
                "n_control_steps": about.n_control_steps,
                "hidden": trial.recipe.ppo.hidden,
            }
        )
        for name, value in found[-1].items():
            if value != found[0][name]:
                raise ConfigError(
                    f"trial {trial.name} ({described(trial.changes)}): mean_of needs policies of "
                    f"one kind, and this one's {name} differ from the first one's"
                )


def position_bounds(config: SweepConfig, knobs: KnobSet) -> dict[str, tuple[float, float]]:
    """By knob: between which positions a sweep moves it."""
    bounds = {}
    for name, values in config.space.items():
        ends = values.uniform or values.loguniform
        assert ends is not None
        low, high = (float(knobs[name].position(end)) for end in ends)
        bounds[name] = (low, high)
    return bounds


def check_trials(trials: Sequence[Trial], *, elsewhere: bool = False) -> list[Description]:
    """Builds one of each kind of run, so that what refuses it does so before anything starts.

    Args:
        trials: The trials.
        elsewhere: They will run where there are GPUs, which this machine may not have.

    Returns:
        What each trial's runs say of themselves, of the last kind that it has.

    Raises:
        ConfigError: With the trial, and the words of whatever refuses it.
    """
    built: dict[str, Description] = {}
    abouts = []
    for trial in trials:
        try:
            for env_id, options in _runs_of(trial):
                key = json.dumps([env_id, options], sort_keys=True, default=str)
                if key not in built:
                    built[key] = _about_one(env_id, options, elsewhere=elsewhere)
                _require_deciders(trial, built[key])
                if trial.sets_knobs:
                    built[key].knobs.positions(trial.changes, 1)
            abouts.append(built[key])
        except (ValueError, TypeError) as error:
            where = f"trial {trial.name} ({described(trial.changes)})"
            raise ConfigError(f"{where}: {error}") from error
    return abouts


def _require_deciders(trial: Trial, about: Description) -> None:
    """A policy decides as often as its runs have control steps."""
    if trial.recipe is None:
        decides = Policy.load(trial.policy).card.n_control_steps
        if about.n_control_steps != decides:
            raise ValueError(
                f"the policy decides {decides} times per run, got "
                f"n_control_steps={about.n_control_steps}"
            )


def about_runs(trial: Trial, *, elsewhere: bool = False) -> Description:
    """What a trial's runs say of themselves, of a kind that has one sort of them."""
    ((env_id, options),) = _runs_of(trial)
    return _about_one(env_id, options, elsewhere=elsewhere)


def _about_one(env_id: str, options: dict[str, Any], *, elsewhere: bool) -> Description:
    """Builds one run to see; `elsewhere` without the GPU that it will have."""
    if elsewhere and "device" in options:
        options = options | {"device": "cpu"} | {k: False for k in options if k == "compile"}
    with ShardRow(env_id, 1, options, 0) as run:
        return run.describe()


def _runs_of(trial: Trial) -> Iterator[tuple[str, dict[str, Any]]]:
    """Environment and options of each kind of run that a trial has."""
    if trial.recipe is None:
        yield runs_of(Policy.load(trial.policy), trial.options)
        return
    environment = trial.recipe.environment
    check_pairs(environment.n_envs, trial.recipe.ppo.paired_runs)
    for variant in environment.variants or ({},):
        yield environment.id, {**environment.options, **variant}
