"""A sweep on Ray Tune: starts trials where there is room, and keeps what they leave.

The trials are known from the start, and each keeps its own checkpoints and result in the sweep's
directory. So nothing depends on Tune's own records: a sweep that was stopped, however, is started
again, and every trial goes on from where it was.
"""

import contextlib
import logging
import math
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metactl.cluster import check_resources, cluster
from metactl.errors import WorkerDied
from metactl.progress import Progress
from metactl.sweep.check import about_runs
from metactl.sweep.config import SweepConfig, Trial, trial_folder
from metactl.sweep.member import make_reference, run_member
from metactl.sweep.population import (
    RUNG,
    going,
    report_at,
    starting_points,
    tune_scheduler,
)
from metactl.sweep.result import STOPPED, merit, read_result
from metactl.sweep.trial import run_trial
from metactl.sweep.watcher import last_line, require_room, tune_watcher

Trainable = Callable[[dict[str, Any]], None]
_GRACE = 10  # percent of a trial's budget before it may be given up


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a sweep's trials.

    Args:
        results: Of those that finished, best first.
        stopped: Names of those that the scheduler gave up.
        failed: Why, by name, of those that failed too often.
        left: Names of those that an interruption left to be done.
    """

    results: list[dict[str, Any]]
    stopped: list[str]
    failed: dict[str, str]
    left: list[str]


def run_sweep(
    config: SweepConfig,
    trials: list[Trial],
    root: Path,
    *,
    address: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Does all trials, or those that are left.

    Args:
        config: The sweep.
        trials: Its plan.
        root: The sweep's directory; on a cluster, one that all nodes see.
        address: Of a Ray cluster; without it one is started here.
        progress: Told about finished trials.

    Raises:
        ConfigError: If a trial needs more than the cluster has.
    """
    left = [trial for trial in trials if not _is_over(root, trial)]
    failed: dict[str, str] = {}
    if left:
        with cluster(address) as available:
            needs = config.resources
            check_resources("a trial", needs.cpu, needs.gpu, available)
            finished = _results(root, trials)
            with _sigterm_as_ctrl_c():
                failed = _tuned(config, left, root, len(trials), progress, finished)
    found = _results(root, trials)
    return Outcome(
        results=sorted(found, key=merit, reverse=True),
        stopped=[t.name for t in trials if _is_stopped(root, t)],
        failed=failed,
        left=[t.name for t in trials if not (_is_over(root, t) or t.name in failed)],
    )


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """What a batch system sends when time is up; Ray, once started, would end without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers are the main thread's
        return
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _results(root: Path, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Of those that finished."""
    results = [read_result(trial_folder(root, trial.name)) for trial in trials]
    return [result for result in results if result is not None]


def _is_over(root: Path, trial: Trial) -> bool:
    return read_result(trial_folder(root, trial.name)) is not None or _is_stopped(root, trial)


def _is_stopped(root: Path, trial: Trial) -> bool:
    folder = trial_folder(root, trial.name)
    return (folder / STOPPED).exists() and read_result(folder) is None


def _tuned(
    config: SweepConfig,
    trials: list[Trial],
    root: Path,
    n_planned: int,
    progress: Progress | None,
    finished: Sequence[dict[str, Any]],
) -> dict[str, str]:
    """Runs trials under Tune; why, by name, for those that failed."""
    from ray import tune

    prepare = _members if config.kind == "knobs" else _whole_trials
    trainable, space, scheduler = prepare(config, trials, root)
    shutil.rmtree(root / "tune", ignore_errors=True)
    minutes, patience = config.stop.minutes, config.stop.patience
    watcher = tune_watcher(root, n_planned, len(trials), progress, finished)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": config.resources.cpu, "gpu": config.resources.gpu}),
        param_space={"trial": tune.grid_search([trial.name for trial in trials]), **space},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            time_budget_s=None if minutes is None else 60 * minutes,
            trial_name_creator=_first_name,  # stays, when a takeover copies the point
            trial_dirname_creator=_first_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(root),
            verbose=0,
            stop=None if patience is None else {"stalled": patience},
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[watcher],
        ),
    )
    with warnings.catch_warnings(), _quiet("ray.tune"):  # the watcher tells what it is about
        warnings.filterwarnings("ignore", module=r"sklearn\.")  # PB2's fits seldom converge
        warnings.filterwarnings("ignore", message="Consider boosting PBT")  # actors that die idle
        try:
            tuner.fit()
        except Exception:
            require_room(root)  # where nothing can be written any more, that is the error
            raise
    return dict(watcher.failed)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps back what a library logs, but for the worst."""
    its = logging.getLogger(name)
    level = its.level
    its.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        its.setLevel(level)


def _first_name(trial: Any) -> str:
    return str(trial.config["trial"])


def _whole_trials(
    config: SweepConfig, trials: list[Trial], root: Path
) -> tuple[Trainable, dict[str, Any], Any]:
    """What Tune runs, what it varies besides the trial, and its scheduler."""
    by_name = {trial.name: trial for trial in trials}

    def trainable(point: dict[str, Any]) -> None:
        from ray import tune

        trial, told = by_name[point["trial"]], _Told()

        def report(steps: int, mean_return: float) -> None:
            assert trial.recipe is not None
            share = min(1.0, steps / trial.recipe.ppo.total_timesteps)  # rollouts are whole
            tune.report(told(share, mean_return))

        run_trial(config, trial, root, report)
        tune.report(told(1.0, told.last))

    return trainable, {}, _asha() if config.scheduler == "asha" else None


def _members(
    config: SweepConfig, trials: list[Trial], root: Path
) -> tuple[Trainable, dict[str, Any], Any]:
    """The same for trials of kind `"knobs"`."""
    from ray import tune

    _play_reference(config, trials[0], root)
    by_name = {trial.name: trial for trial in trials}
    knobs = about_runs(trials[0], elsewhere=config.resources.gpu > 0).knobs
    begun, points = starting_points(config, trials, root, knobs)

    def trainable(point: dict[str, Any]) -> None:
        name, told, rung = str(tune.get_context().get_trial_name()), _Told(), 0

        def report(done: int, n_control_steps: int, score: float) -> None:
            nonlocal rung
            rung = (done - begun) // config.every
            report_at(name, done, {RUNG: rung, **told(done / n_control_steps, score)})

        how = going(name, point, begun if config.is_population else None)
        result = run_member(config, by_name[name], root, how, report)
        tune.report({RUNG: rung, **told(1.0, merit(result))})

    def position(knob: str) -> Any:
        return tune.sample_from(lambda point: points[point["trial"]][knob])

    space = {knob: position(knob) for knob in config.space}
    if config.is_population:
        return trainable, space, tune_scheduler(config, knobs)
    return trainable, space, _asha() if config.scheduler == "asha" else None


def _play_reference(config: SweepConfig, trial: Trial, root: Path) -> None:
    """On the cluster, like a trial."""
    import ray

    needs = config.resources
    played = ray.remote(num_cpus=needs.cpu, num_gpus=needs.gpu)(make_reference)
    try:
        ray.get(played.remote(config, trial, root))
    except ray.exceptions.RayError as error:
        raise WorkerDied(f"The default arm was not played: {last_line(error)}") from error


def _asha() -> Any:
    """Rungs are in hundredths of a trial's budget, the same after any start."""
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="percent",
        metric="return",
        mode="max",
        grace_period=_GRACE,
        max_t=100,
        stop_last_trials=False,  # at its last report a trial has still to be scored
    )


class _Told:
    """What Tune is told of a trial; it counts the reports since the best return."""

    def __init__(self) -> None:
        self.best, self.last, self.stalled = -math.inf, math.nan, 0

    def __call__(self, share: float, score: float) -> dict[str, float]:
        self.stalled = 0 if score > self.best else self.stalled + 1
        self.best, self.last = max(self.best, score), score
        told = {"share": share, "percent": int(100 * share), "return": score}
        return {**told, "stalled": self.stalled if share < 1 else 0}
