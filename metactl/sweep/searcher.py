"""What to try next, learned from the trials that are finished.

Nobody keeps a study: every trial that starts reads what the others left in the sweep's directory,
asks Optuna's TPE sampler (arXiv 2304.11127) once, and writes its own point down before anything
else. So trials may start anywhere, in any order, and start again after any kill at the same point.
"""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metactl.config import ConfigError, changed
from metactl.files import write_atomically
from metactl.sweep.config import Range, SweepConfig, Trial, trial_folder
from metactl.sweep.result import read_result

POINT = "point.json"
_RANDOM_FIRST = 8  # results until then say too little


def require_searcher(config: SweepConfig) -> None:
    """Refuses what cannot search.

    Raises:
        ConfigError: If a package is missing, or there is nothing to choose.
    """
    if config.searcher != "optuna":
        return
    if find_spec("optuna") is None:
        raise ConfigError("searcher 'optuna' needs optuna: pip install 'metactl[optuna]'")
    if not _drawn(config):
        raise ConfigError("searcher 'optuna' has nothing to choose: space holds grids alone")
    for key in _drawn(config):
        if key.rpartition(".")[2] in ("data", "policy"):
            raise ConfigError(f"searcher 'optuna' cannot choose {key!r}; make it a grid")


def placed(config: SweepConfig, trial: Trial, root: Path) -> Trial:
    """A trial at the point where it belongs: as planned, or where the searcher puts it."""
    if config.searcher != "optuna":
        return trial
    folder = trial_folder(root, trial.name)
    chosen = _read_point(folder / POINT)
    if chosen is None:
        chosen = _suggested(config, trial, root)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / POINT, json.dumps(chosen).encode())
    changes = {**trial.changes, **chosen}
    if trial.recipe is not None:
        return replace(trial, changes=changes, recipe=changed(trial.recipe, chosen))
    return replace(trial, changes=changes, options={**trial.options, **chosen})


def _drawn(config: SweepConfig) -> dict[str, Range]:
    return {key: values for key, values in config.space.items() if values.grid is None}


def _suggested(config: SweepConfig, trial: Trial, root: Path) -> dict[str, Any]:
    """The first are as planned; then TPE, of results and of what is under way.

    A trial under way counts as bad as the worst so far, so that others keep away from it.
    """
    drawn = _drawn(config)
    known = [(p, r) for p, r in _others(root, trial.name) if set(p) == set(drawn)]
    scores = [score for _, score in known if score is not None]
    if len(scores) < _RANDOM_FIRST:
        return {key: trial.changes[key] for key in drawn}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(values) for key, values in drawn.items()}
    seed = (config.seed << 16) + int(trial.name.partition("-")[0])
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(n_startup_trials=_RANDOM_FIRST, seed=seed),
    )
    for point, score in known:
        study.add_trial(
            optuna.trial.create_trial(
                params={key: _inward(drawn[key], value) for key, value in point.items()},
                distributions=distributions,
                value=min(scores) if score is None else score,
            )
        )
    asked = study.ask(distributions).params
    return {key: _outward(drawn[key], value) for key, value in asked.items()}


def _others(root: Path, name: str) -> list[tuple[dict[str, Any], float | None]]:
    """Points of all other trials that have begun, in order, with their scores."""
    found = []
    for folder in sorted((root / "trials").glob("*")):
        point = _read_point(folder / POINT)
        if point is not None and folder.name != name:
            result = read_result(folder)
            found.append((point, None if result is None else result["score"]))
    return found


def _read_point(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
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
    return value if values.choice is None else _plain(values.choice).index(json.dumps(value))


def _outward(values: Range, value: Any) -> Any:
    return value if values.choice is None else values.choice[value]


def _plain(choices: tuple[Any, ...]) -> list[str]:
    return [json.dumps(choice) for choice in choices]
