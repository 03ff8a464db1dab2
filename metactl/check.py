"""Checks somebody's own `TrainingRun` or environment against the contract, in words."""

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import gymnasium
import numpy as np

from metactl.config import ConfigError
from metactl.env import TrainingRunEnv
from metactl.episodes import ControlConfig
from metactl.knobs import KnobSet
from metactl.run import Measurement, TrainingRun
from metactl.shards import require_own_package


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    passed: bool
    text: str


def check_target(target: str, options: Mapping[str, Any] | None = None) -> list[Finding]:
    """Checks `MODULE:CLASS` or a Gymnasium id.

    Args:
        target: Which.
        options: Keyword arguments of an environment by its id.

    Raises:
        ConfigError: If there is no such thing, or it does not take the options.
    """
    module_name, _, name = target.partition(":")
    if name.isidentifier():
        if options:
            raise ConfigError(
                f"{', '.join(options)}: {target} is built without arguments; options are for an "
                f"environment by its id"
            )
        found = getattr(_import(module_name), name, None)
        if found is None:
            raise ConfigError(f"Module {module_name!r} has no {name!r}")
        if isinstance(found, type) and issubclass(found, TrainingRun):
            return list(check_training_run(_build(found, target)))
        if isinstance(found, type) and issubclass(found, gymnasium.Env):
            return list(check_environment(_build(found, target)))
        raise ConfigError(f"{target} is neither a TrainingRun nor a gymnasium.Env, got {found!r}")
    require_own_package(module_name)
    if name:
        _import(module_name)
    try:
        env = gymnasium.make(target, **(options or {})).unwrapped
    except gymnasium.error.Error as error:
        spec = gymnasium.registry.get(target.rpartition(":")[2])
        if spec is not None and spec.entry_point is None:
            raise ConfigError(
                f"{target!r} has a vector_entry_point alone, which cannot be checked; check the "
                f"class of its TrainingRun: MODULE:CLASS"
            ) from error
        raise ConfigError(f"No environment {target!r}: {error}") from error
    except (ValueError, MemoryError):  # which say what does not fit
        raise
    except Exception as error:  # somebody's own code may do anything
        if options and isinstance(error, TypeError):
            raise ConfigError(f"{target} does not take {', '.join(options)}: {error}") from error
        raise ConfigError(f"{target} failed: {type(error).__name__}: {error}") from error
    findings = list(check_environment(env))
    if isinstance(env, TrainingRunEnv):
        findings += check_training_run(env.loop.run, env.loop.config.n_control_steps)
    return findings


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # it may do anything
        reason = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"Module {name!r} cannot be imported: {reason}") from error


def _build(kind: Callable[[], Any], target: str) -> Any:
    try:
        return kind()
    except Exception as error:
        raise ConfigError(
            f"{target}() failed: {type(error).__name__}: {error}; `check` builds it without "
            f"arguments, so give it defaults"
        ) from error


def check_environment(env: Any) -> Iterator[Finding]:
    """Gymnasium's and Stable-Baselines3's own checks; a warning counts as a problem."""
    from gymnasium.utils.env_checker import check_env as gymnasium_check
    from stable_baselines3.common.env_checker import check_env as sb3_check

    for who, check in (("Gymnasium", gymnasium_check), ("Stable-Baselines3", sb3_check)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                check(env)
            except Exception as error:
                text = " ".join(str(error).split())
                yield Finding(False, f"{who}'s check_env: {type(error).__name__}: {text}")
                continue
        for warning in caught:
            yield Finding(
                False, f"{who}'s check_env warns: {' '.join(str(warning.message).split())}"
            )
        if not caught:
            yield Finding(True, f"{who}'s check_env passes")


def check_training_run(
    run: TrainingRun, n_control_steps: int = ControlConfig.n_control_steps
) -> Iterator[Finding]:
    """The contract of `TrainingRun`, one finding a claim; later ones need the earlier.

    Args:
        run: Which.
        n_control_steps: Of a run.
    """

    def _check_horizon(run: TrainingRun) -> str | None:
        """The horizon has an optimizer step for every control step, and can be set."""
        if run.horizon < n_control_steps:
            return f"it is {run.horizon}, and there are {n_control_steps} control steps"
        try:
            run.horizon = run.horizon
        except AttributeError:
            return "it cannot be set, and is rounded to a multiple of the control steps"
        return None

    checks = (
        _check_declarations,
        _check_horizon,
        _check_measurement,
        _check_evaluation,
        _check_determinism,
        _check_state,
        _check_rows,
        _check_knobs,
        _check_descriptors,
    )
    for check in checks:
        try:
            problem = check(run)
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}"
        claim = (check.__doc__ or "").strip()
        yield Finding(problem is None, claim if problem is None else f"{claim} — {problem}")
        if problem is not None and check in (_check_declarations, _check_measurement):
            return


def _start(run: TrainingRun, seed: int = 1) -> None:
    rows = list(range(run.n_runs))
    run.reset(rows, [run.sample_task(seed + row) for row in rows], [seed + row for row in rows])
    knobs = KnobSet(run.knobs)
    run.apply(knobs.values(knobs.default_positions(run.n_runs)))


def _train(run: TrainingRun, n_steps: int = 2) -> Any:
    """What advance returned; arrays as they are now, since the run may go on to write in them."""
    return deepcopy(run.advance(n_steps))


def _check_declarations(run: TrainingRun) -> str | None:
    """n_runs and horizon are whole numbers of at least 1, and there are knobs."""
    for name in ("n_runs", "horizon"):
        value = getattr(run, name, None)
        if not isinstance(value, int) or value < 1:
            return f"{name} is {value!r}"
    KnobSet(run.knobs)
    return None


def _check_measurement(run: TrainingRun) -> str | None:
    """reset, apply and advance give a Measurement of finite arrays [n_runs]."""
    _start(run)
    measurement = _train(run)
    if not isinstance(measurement, Measurement):
        return f"advance returned a {type(measurement).__name__}"
    for name, value in measurement.arrays().items():
        if value is None:
            continue
        if np.shape(value) != (run.n_runs,):
            return f"{name} has shape {np.shape(value)}, not ({run.n_runs},)"
        if name != "diverged" and not np.isfinite(value).all():
            return f"{name} is not finite: {value}"
    return None


def _check_evaluation(run: TrainingRun) -> str | None:
    """Evaluate gives finite losses for probe and test, and changes nothing."""
    _start(run)
    for split in ("probe", "test"):
        first, second = run.evaluate(split), run.evaluate(split)
        if np.shape(first) != (run.n_runs,) or not np.isfinite(first).all():
            return f"evaluate({split!r}) gave {first!r}"
        if not np.array_equal(first, second):
            return f"evaluate({split!r}) twice gave {first} and {second}"
        last = run.evaluate(split, [run.n_runs - 1])
        if not np.array_equal(last, first[-1:]):
            return f"evaluate({split!r}, rows=[{run.n_runs - 1}]) gave {last}, of all it is {first}"
    after = _train(run).train_loss
    _start(run)
    if not np.array_equal(after, _train(run).train_loss):
        return "training goes on differently after evaluate"
    return None


def _check_determinism(run: TrainingRun) -> str | None:
    """The same task and seed give the same run, other seeds another one."""
    losses = []
    for seed in (1, 1, 100):
        _start(run, seed)
        losses.append(_train(run).train_loss)
    if not np.array_equal(losses[0], losses[1]):
        return f"seed 1 gave {losses[0]}, then {losses[1]}"
    if np.array_equal(losses[0], losses[2]):
        return "the seed has no effect"
    return None


def _check_state(run: TrainingRun) -> str | None:
    """state_dict and load_state_dict bring a run back exactly."""
    _start(run)
    _train(run)
    rows = list(range(run.n_runs))
    state = run.state_dict(rows)
    last = run.state_dict(rows[-1:])
    first = _train(run).train_loss
    run.load_state_dict(rows, state)
    second = _train(run).train_loss
    if not np.array_equal(first, second):
        return f"went on to {first}, restored to {second}"
    run.load_state_dict(rows, state)
    run.load_state_dict(rows[-1:], last)
    third = _train(run).train_loss
    if not np.array_equal(first, third):
        return f"went on to {first}, with rows={rows[-1:]} restored alone to {third}"
    return None


def _check_rows(run: TrainingRun) -> str | None:
    """Starting one run anew leaves the others as they are."""
    if run.n_runs < 2:
        return None
    _start(run)
    _train(run)
    expected = run.evaluate("probe")[1:]
    run.reset([0], [run.sample_task(99)], [99])
    found = run.evaluate("probe")[1:]
    return None if np.array_equal(expected, found) else f"{expected} became {found}"


def _check_knobs(run: TrainingRun) -> str | None:
    """Every knob that is moved has an effect on training."""
    knobs = KnobSet(run.knobs)
    silent = []
    for i, name in enumerate(knobs.names):
        losses = []
        for end in (0.0, 1.0):
            _start(run)
            positions = knobs.default_positions(run.n_runs)
            positions[:, i] = end
            run.apply(knobs.values(positions))
            first = _train(run)
            losses.append(np.concatenate((first.train_loss, _train(run).train_loss)))
        if np.array_equal(losses[0], losses[1]):
            silent.append(name)
    return f"no effect: {', '.join(silent)}" if silent else None


def _check_descriptors(run: TrainingRun) -> str | None:
    """Descriptors are finite numbers of the same names for every task."""
    told = [run.descriptors(seed) for seed in (1, 2, 1)]
    if told[0] != told[2]:
        return f"two calls for one task give {dict(told[0])} and {dict(told[2])}"
    if list(told[0]) != list(told[1]):
        return f"two tasks have {', '.join(told[0]) or 'none'} and {', '.join(told[1]) or 'none'}"
    for name, value in chain.from_iterable(each.items() for each in told):
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"{name} is {value!r}"
    return None
