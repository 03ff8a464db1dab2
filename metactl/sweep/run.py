"""A sweep on Ray Tune: starts trials where there is room, and keeps what they leave.

The trials are known from the start, and each keeps its own checkpoints and result in the sweep's
directory. So nothing depends on Tune's own records: a sweep that was stopped, however, is started
again, and every trial goes on from where it was.
"""

import collections
import contextlib
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metactl.cluster import check_resources, cluster
from metactl.files import write_atomically
from metactl.progress import Progress
from metactl.sweep.check import knobs_of
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

logger = logging.getLogger(__name__)
_FINENESS = 1000  # of the progress of one trial
_ROOM = 1 << 16  # bytes; whoever cannot write so much cannot go on
_FINISHED = 1 << 62  # steps; more than any trial that is under way


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
            failed = _tuned(config, left, root, len(trials), progress)
    results = [read_result(trial_folder(root, trial.name)) for trial in trials]
    found = [result for result in results if result is not None]
    return Outcome(
        results=sorted(found, key=merit, reverse=True),
        stopped=[t.name for t in trials if (trial_folder(root, t.name) / STOPPED).exists()],
        failed=failed,
        left=[t.name for t in trials if not (_is_over(root, t) or t.name in failed)],
    )


def _is_over(root: Path, trial: Trial) -> bool:
    folder = trial_folder(root, trial.name)
    return read_result(folder) is not None or (folder / STOPPED).exists()


def _tuned(
    config: SweepConfig,
    trials: list[Trial],
    root: Path,
    n_planned: int,
    progress: Progress | None,
) -> dict[str, str]:
    """Runs trials under Tune; why, by name, for those that failed."""
    from ray import tune

    prepare = _members if config.kind == "knobs" else _whole_trials
    trainable, space, scheduler = prepare(config, trials, root)
    shutil.rmtree(root / "tune", ignore_errors=True)
    minutes, patience = config.stop.minutes, config.stop.patience
    seconds = None if minutes is None else 60 * minutes
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": config.resources.cpu, "gpu": config.resources.gpu}),
        param_space={"trial": tune.grid_search([trial.name for trial in trials]), **space},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            time_budget_s=seconds,
            trial_name_creator=_first_name,  # stays, when a takeover copies the point
            trial_dirname_creator=_first_name,
            reuse_actors=config.is_population,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(root),
            verbose=0,
            stop=None if patience is None else {"stalled": patience},
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[_watcher(root, n_planned, len(trials), seconds, progress)],
        ),
    )
    with warnings.catch_warnings(), _quiet("ray.tune"):  # the watcher tells what it is about
        warnings.filterwarnings("ignore", module=r"sklearn\.")  # PB2's fits seldom converge
        grid = _fitted(tuner, root)
    failed = {}
    for i in range(len(grid)):
        result = grid[i]
        if result.error is not None:
            failed[Path(result.path).name] = _last_line(result.error)
    return failed


def _last_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else "it failed"


def _fitted(tuner: Any, root: Path) -> Any:
    """Runs Tune; where it breaks because nothing can be written any more, that is the error."""
    try:
        return tuner.fit()
    except Exception:
        _require_room(root)
        raise


def _require_room(root: Path) -> None:
    probe = root / "room"
    write_atomically(probe, bytes(_ROOM))
    probe.unlink()


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
) -> tuple[Callable[[dict[str, Any]], None], dict[str, Any], Any]:
    """What Tune runs, what it varies besides the trial, and its scheduler."""
    from ray import tune

    by_name = {trial.name: trial for trial in trials}

    def trainable(point: dict[str, Any]) -> None:
        trial = by_name[point["trial"]]
        ahead = _Stall()

        def report(steps: int, mean_return: float) -> None:
            assert trial.recipe is not None
            share = steps / trial.recipe.ppo.total_timesteps
            tune.report({"steps": steps, "share": share, **ahead(mean_return)})

        result = run_trial(config, trial, root, report)
        tune.report({"steps": _FINISHED, "share": 1.0, **ahead(math.inf, result["score"])})

    return trainable, {}, _asha() if config.scheduler == "asha" else None


def _members(
    config: SweepConfig, trials: list[Trial], root: Path
) -> tuple[Callable[[dict[str, Any]], None], dict[str, Any], Any]:
    """The same for trials of kind `"knobs"`."""
    import ray
    from ray import tune

    needs = config.resources
    played = ray.remote(num_cpus=needs.cpu, num_gpus=needs.gpu)(make_reference)
    ray.get(played.remote(config, trials[0], root))
    by_name = {trial.name: trial for trial in trials}
    knobs = knobs_of(trials[0], elsewhere=needs.gpu > 0)
    begun, points = starting_points(config, trials, root, knobs)

    def trainable(point: dict[str, Any]) -> None:
        ahead = _Stall()
        name, rung = str(tune.get_context().get_trial_name()), 0

        def report(done: int, n_control_steps: int, score: float) -> None:
            nonlocal rung
            rung = (done - begun) // config.every
            figures = {"steps": done, "share": done / n_control_steps, RUNG: rung}
            report_at(name, done, {**figures, **ahead(score)})

        how = going(name, point, begun if config.is_population else None)
        result = run_member(config, by_name[name], root, how, report)
        figures = {"steps": _FINISHED, "share": 1.0, RUNG: rung}
        tune.report({**figures, **ahead(math.inf, merit(result))})

    def position(knob: str) -> Any:
        return tune.sample_from(lambda point: points[point["trial"]][knob])

    space = {knob: position(knob) for knob in config.space}
    if config.is_population:
        return trainable, space, tune_scheduler(config, knobs)
    return trainable, space, _asha() if config.scheduler == "asha" else None


def _asha() -> Any:
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="training_iteration", metric="return", mode="max", grace_period=5, max_t=10**6
    )


class _Stall:
    """Counts the reports of a trial since its return was best."""

    def __init__(self) -> None:
        self.best, self.stalled = -math.inf, 0

    def __call__(self, score: float, shown: float | None = None) -> dict[str, float]:
        self.stalled = 0 if score > self.best else self.stalled + 1
        self.best = max(self.best, score)
        return {"return": score if shown is None else shown, "stalled": self.stalled}


def _watcher(
    root: Path, n_planned: int, n_left: int, seconds: float | None, progress: Progress | None
) -> Any:
    """A Tune callback that marks trials that were given up, and tells about progress."""
    from ray.tune import Callback

    class Watcher(Callback):
        best: tuple[float, float] | None = None  # merit and score
        over = n_planned - n_left
        end = math.inf if seconds is None else time.monotonic() + seconds

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
        ) -> None:
            self._tell(trials)

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            name = str(trial)
            result = read_result(trial_folder(root, name))
            if result is not None:
                held = (merit(result), result["score"])
                self.best = held if self.best is None else max(self.best, held)
            elif time.monotonic() < self.end:
                text = b"This trial was given up.\n"
                write_atomically(trial_folder(root, name) / STOPPED, text)
            self._tell(trials)

        def on_trial_recover(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            _require_room(root)  # else it would be tried in vain, again and again
            why = "its process is gone"
            if trial.error_file and Path(trial.error_file).exists():
                why = _last_line(Path(trial.error_file).read_text())
            logger.warning("Trial %s goes on from its checkpoint: %s", trial, why)

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            self._tell(trials)

        def _tell(self, trials: list[Any]) -> None:
            if progress is None:
                return
            count = collections.Counter(trial.status for trial in trials)
            ended = ("TERMINATED", "ERROR")
            shares = [
                1.0 if trial.status in ended else float(trial.last_result.get("share", 0.0))
                for trial in trials
            ]
            best = "none yet" if self.best is None else f"{self.best[1]:+.4f} nats"
            status = f"best gain {best}, {count['RUNNING']} running, {count['ERROR']} failed"
            done = int(_FINENESS * (self.over + sum(shares)))
            progress(done, _FINENESS * n_planned, status)

    return Watcher()
