"""What to try next, learned from the trials that are finished.

Nobody keeps a study: every trial that starts reads what the others left in the sweep's directory,
asks Optuna's TPE sampler (arXiv 2304.11127) once, and writes its own point down before anything
else. So trials may start anywhere, in any order, and start again after any kill at the same point.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from metactl.config import ConfigError, changed
from metactl.files import write_atomically
from metactl.sweep.config import Range, SweepConfig, Trial, trial_folder
from metactl.sweep.result import STOPPED, read_result

POINT = "point.json"
_RANDOM_FIRST = 8  # trials: until then their results say too little
_PLACES = ("data", "policy", "environment", "options", "variants", "shards", "n_workers")


def require_searcher(config: SweepConfig) -> None:
    """Refuses what cannot search.

    Raises:
        ConfigError: If a package is missing, or there is nothing to choose.
    """
    if config.searcher != "optuna":
        return
    if find_spec("optuna") is None:
        raise ConfigError("searcher 'optuna' needs optuna: pip install optuna")
    if not _drawn(config):
        raise ConfigError("searcher 'optuna' has nothing to choose: space holds grids alone")
    for key, values in _drawn(config).items():
        if key.rpartition(".")[2] in _PLACES:
            raise ConfigError(f"searcher 'optuna' cannot choose {key!r}; make it a grid")
        for choice in values.choice or ():
            if _as_json(choice) != choice:
                raise ConfigError(
                    f"searcher 'optuna' needs choices that JSON knows, got {choice!r}"
                )


def placed(
    config: SweepConfig, trial: Trial, root: Path, *, check: Callable[[Trial], object]
) -> Trial:
    """A trial at the point where it belongs: as planned, or where the searcher puts it.

    Args:
        config: The sweep.
        trial: As planned.
        root: The sweep's directory.
        check: Refuses a point whose values do not fit together; the trial then stays as planned.
    """
    if config.searcher != "optuna":
        return trial
    folder = trial_folder(root, trial.name)
    chosen = read_point(folder)
    if chosen is None:
        chosen = _suggested(config, trial, root)
        try:
            check(_moved(trial, chosen))
        except ConfigError:
            chosen = {key: trial.changes[key] for key in chosen}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / POINT, json.dumps(chosen).encode())
    return _moved(trial, chosen)


def _moved(trial: Trial, chosen: dict[str, Any]) -> Trial:
    changes = {**trial.changes, **chosen}
    if trial.recipe is not None:
        return replace(trial, changes=changes, recipe=changed(trial.recipe, chosen))
    return replace(trial, changes=changes, options={**trial.options, **chosen})


def _drawn(config: SweepConfig) -> dict[str, Range]:
    return {key: values for key, values in config.space.items() if values.grid is None}


def _suggested(config: SweepConfig, trial: Trial, root: Path) -> dict[str, Any]:
    """The first are as planned; then TPE, of results and of what is under way.

    A trial under way, and one that the scheduler gave up, counts as bad as the worst so far, so
    that others keep away from it.
    """
    drawn = _drawn(config)
    known = [other for other in _others(root, trial.name) if _fits(other.point, drawn)]
    scores = [other.score for other in known if other.score is not None]
    if not scores or sum(other.over for other in known) < _RANDOM_FIRST:
        return {key: trial.changes[key] for key in drawn}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(values) for key, values in drawn.items()}
    place = [config.seed, int(trial.name.partition("-")[0])]
    seed = int(np.random.default_rng(place).integers(2**32))
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(n_startup_trials=_RANDOM_FIRST, seed=seed),
    )
    for other in known:
        study.add_trial(
            optuna.trial.create_trial(
                params={key: _inward(drawn[key], value) for key, value in other.point.items()},
                distributions=distributions,
                value=min(scores) if other.score is None else other.score,
            )
        )
    asked = study.ask(distributions).params
    return {key: _outward(drawn[key], value) for key, value in asked.items()}


@dataclass(frozen=True)
class _Other:
    """Another trial that has begun: its point, its score if it has one, whether it is over."""

    point: dict[str, Any]
    score: float | None
    over: bool


def _others(root: Path, name: str) -> list[_Other]:
    found = []
    for folder in sorted((root / "trials").glob("*")):
        point = read_point(folder)
        if point is not None and folder.name != name:
            result = read_result(folder)
            score = None if result is None else float(result["score"])
            found.append(_Other(point, score, score is not None or (folder / STOPPED).exists()))
    return found


def _fits(point: dict[str, Any], drawn: dict[str, Range]) -> bool:
    """Whether a point is of this space; a folder may hold anything."""
    return set(point) == set(drawn) and all(
        _as_json(list(values.choice)).count(point[key])
        if values.choice is not None
        else isinstance(point[key], float) and _within(values, point[key])
        for key, values in drawn.items()
    )


def _within(values: Range, value: float) -> bool:
    low, high = values.uniform or values.loguniform or (math.inf, -math.inf)
    return low <= value <= high


def read_point(folder: Path) -> dict[str, Any] | None:
    """Where a trial of this folder was placed; `None` if it was not, or nobody can read it."""
    try:
        return dict(json.loads((folder / POINT).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _distribution(values: Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if values.choice is not None:
        return CategoricalDistribution(list(range(len(values.choice))))
    if values.uniform is not None:
        return FloatDistribution(*values.uniform)
    assert values.loguniform is not None
    return FloatDistribution(*values.loguniform, log=True)


def _inward(values: Range, value: Any) -> Any:
    """As the searcher sees it: choices by their place."""
    return value if values.choice is None else _as_json(list(values.choice)).index(value)


def _outward(values: Range, value: Any) -> Any:
    return value if values.choice is None else values.choice[value]


def _as_json(value: Any) -> Any:
    """What is read back of it; something else where JSON does not know it."""
    return json.loads(json.dumps(value, default=repr))
