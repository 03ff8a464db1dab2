"""A sweep on Ray Tune: starts trials where there is room, and keeps what they leave.

The trials are known from the start, and each keeps its own checkpoints and result in the sweep's
directory. So nothing depends on Tune's own records: a sweep that was stopped, however, is started
again, and every trial goes on from where it was.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metactl.cluster import check_resources, cluster
from metactl.files import write_atomically
from metactl.progress import Progress
from metactl.sweep.config import SweepConfig, Trial, trial_folder
from metactl.sweep.result import STOPPED, read_result
from metactl.sweep.trial import run_trial


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
        results=sorted(found, key=lambda result: -result["score"]),
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
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    by_name = {trial.name: trial for trial in trials}

    def trainable(point: dict[str, Any]) -> None:
        def report(steps: int, mean_return: float) -> None:
            tune.report({"steps": steps, "return": mean_return})

        result = run_trial(config, by_name[point["trial"]], root, report)
        tune.report({"steps": 1 << 62, "return": result["score"], "score": result["score"]})

    scheduler: Any = FIFOScheduler()
    if config.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="training_iteration", metric="return", mode="max", grace_period=5, max_t=10**6
        )
    shutil.rmtree(root / "tune", ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": config.resources.cpu, "gpu": config.resources.gpu}),
        param_space={"trial": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(scheduler=scheduler),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(root),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[_watcher(root, n_planned, len(trials), progress)],
        ),
    )
    grid = tuner.fit()
    failed = {}
    for i in range(len(grid)):
        result = grid[i]
        if result.error is not None and result.config is not None:
            lines = str(result.error).strip().splitlines()
            failed[str(result.config["trial"])] = lines[-1] if lines else "it failed"
    return failed


def _watcher(root: Path, n_planned: int, n_left: int, progress: Progress | None) -> Any:
    """A Tune callback that marks stopped trials and tells about progress."""
    from ray.tune import Callback

    class Watcher(Callback):
        best: float | None = None
        over = n_planned - n_left

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            name = str(trial.config["trial"])
            result = read_result(trial_folder(root, name))
            if result is None:
                text = b"The scheduler gave this trial up.\n"
                write_atomically(trial_folder(root, name) / STOPPED, text)
            elif self.best is None or result["score"] > self.best:
                self.best = result["score"]
            self._tell(trials)

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            self._tell(trials)

        def _tell(self, trials: list[Any]) -> None:
            if progress is None:
                return
            count = {status: 0 for status in ("TERMINATED", "RUNNING", "ERROR")}
            for trial in trials:
                count[trial.status] = count.get(trial.status, 0) + 1
            done = self.over + count["TERMINATED"] + count["ERROR"]
            best = "none yet" if self.best is None else f"{self.best:+.4f} nats"
            status = f"best gain {best}, {count['RUNNING']} running, {count['ERROR']} failed"
            progress(min(done, n_planned), n_planned, status)

    return Watcher()
