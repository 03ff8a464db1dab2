"""Sweeps on a cluster that loses workers, nodes, its driver, its disk; victims were at work."""

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metactl.cluster import use_token
from metactl.config import read_config
from metactl.sweep.config import SweepConfig, plan, trial_folder
from metactl.sweep.result import read_result
from metactl.sweep.trial import run_trial

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(
        not Path("/proc/self/cmdline").exists(), reason="finds its victims in /proc"
    ),
]

UPDATE = 80  # control steps between checkpoints: 2 runs of 40
RECIPE = {
    "environment": {
        "options": {
            "horizon": 40,
            "d_model": 8,
            "n_layers": 1,
            "n_heads": 4,
            "context": 8,
            "knobs": ["dropout"],
        },
        "n_envs": 2,
    },
    "ppo": {
        "n_epochs": 2,
        "batch_size": UPDATE,
        "paired_runs": 2,
    },
    "set_point_runs": 0,
}


@pytest.fixture
def cluster(monkeypatch):
    """Simulated nodes; a driver connects to them by their address."""
    use_token()
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


class Sweep:
    """A sweep's driver as a process, and what it leaves, looked at from outside."""

    def __init__(self, tmp_path, n_trials, root=None, n_updates=5):
        self.root = root or tmp_path / "run"
        self.last = (n_updates - 1) * UPDATE  # the last checkpoint
        self.file = tmp_path / "sweep.yaml"
        recipe = tmp_path / "recipe.yaml"
        ppo = {**RECIPE["ppo"], "total_timesteps": n_updates * UPDATE}
        recipe.write_text(json.dumps({**RECIPE, "ppo": ppo}))
        values = {
            "recipe": str(recipe),
            "space": {"seed": {"grid": list(range(n_trials))}},
            "n_tasks": 2,
            "max_failures": 100,
        }
        self.file.write_text(json.dumps(values))
        self.config = read_config(SweepConfig, self.file, {})
        self.trials = plan(self.config)
        self.written = {}  # by trial and step: when its checkpoint was written
        self.newest = dict.fromkeys((trial.name for trial in self.trials), -1)

    def start(self, address=None):
        place = [] if address is None else ["--address", address]
        command = [sys.executable, "-m", "metactl", "sweep", "--config", self.file]
        self.driver = subprocess.Popen(
            [*command, "--run-dir", self.root, *place],
            cwd=self.file.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def look(self):
        """What is there now; nothing from before a newest checkpoint is done again."""
        for trial in self.trials:
            for place in (trial_folder(self.root, trial.name) / "checkpoints").glob("step-*"):
                step = int(place.name.removeprefix("step-"))
                with contextlib.suppress(OSError):  # it may be replaced at this moment
                    when = (place / "state.json").stat().st_mtime_ns
                    if self.written.get((trial.name, step)) != when:
                        assert step >= self.newest[trial.name]
                        self.written[trial.name, step] = when
            steps = [step for name, step in self.written if name == trial.name]
            self.newest[trial.name] = max(steps, default=-1)

    def progress(self):
        return sum(self.newest.values())

    def unfinished(self):
        return [t for t in self.trials if read_result(trial_folder(self.root, t.name)) is None]

    def is_over(self, name):
        return all(trial.name != name for trial in self.unfinished())

    def until(self, condition, timeout=120):
        """Looks on until something holds while the driver is alive."""
        end = time.monotonic() + timeout
        while True:
            self.look()
            if condition():
                return
            assert self.driver.poll() is None, self.driver.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)

    def workers(self):
        """By process: the trial in which it learns; event files bear the process's number."""
        found = {}
        for trial in self.unfinished():
            files = (trial_folder(self.root, trial.name) / "tb").glob("events.out.tfevents.*")
            numbers = [file.name.split(".")[3:] for file in files]
            if 0 < self.newest[trial.name] < self.last and numbers:
                pid = int(max(numbers, key=lambda number: int(number[0]))[-2])
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
                        found[pid] = trial.name
        return found

    def finish(self, timeout=250):
        self.until(lambda: self.driver.poll() is not None or not self.unfinished(), timeout)
        out, err = self.driver.communicate(timeout=60)
        assert self.driver.returncode == 0, err
        assert "Traceback" not in out + err
        return err

    def require_whole(self):
        """Every trial once, none failed; the reports are what the trials left."""
        report = json.loads((self.root / "results.json").read_text())
        assert not report["failed"] and not report["stopped"] and not report["left"]
        by_name = {result["trial"]: result for result in report["results"]}
        assert len(by_name) == len(report["results"]) == len(self.trials)
        for trial in self.trials:
            assert by_name[trial.name] == read_result(trial_folder(self.root, trial.name))
        scores = [result["score"] for result in report["results"]]
        assert scores == sorted(scores, reverse=True)
        with (self.root / "results.csv").open() as file:
            assert [float(row["score"]) for row in csv.DictReader(file)] == scores
        best = trial_folder(self.root, report["results"][0]["trial"]) / "policy"
        for name in ("policy.json", "weights.safetensors"):
            assert (self.root / "policy" / name).read_bytes() == (best / name).read_bytes()
        assert (self.root / "search.png").stat().st_size > 5_000
        assert {file.parent.name for file in (self.root / "tb").glob("*/events*")} == set(by_name)


def ignore(steps, mean_return):
    """Nobody to report to."""


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_workers_and_nodes_may_die_and_no_trial_is_lost_or_done_twice(cluster, tmp_path):
    n_kills = 20
    lost = cluster.add_node(num_cpus=1)
    run = Sweep(tmp_path, n_trials=32, n_updates=10)
    run.start(cluster.address)
    rng = random.Random(0)
    killed = {}
    while len(killed) < n_kills:
        run.until(lambda: run.workers().keys() - killed.keys(), timeout=240)
        for pid, name in rng.sample(sorted(run.workers().items()), 1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed[pid] = name
        if len(killed) == n_kills // 3 and lost in cluster.list_all_nodes():
            cluster.remove_node(lost, allow_graceful=False)
            cluster.add_node(num_cpus=1)
    assert "goes on from its checkpoint" in run.finish(600)
    run.require_whole()
    for trial in [t for t in run.trials if t.name in killed.values()][:2]:
        undisturbed = run_trial(run.config, trial, tmp_path / "undisturbed", ignore)
        assert read_result(trial_folder(run.root, trial.name)) == undisturbed


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("n_trials", "n_kills"), [(3, 1), (6, 10)])
def test_a_driver_may_be_killed_again_and_again_and_its_records_be_torn(
    cluster, tmp_path, n_trials, n_kills
):
    run = Sweep(tmp_path, n_trials, n_updates=5 if n_kills == 1 else 10)
    torn = 0
    for i in range(n_kills):
        before = run.progress()
        run.start(cluster.address if i % 2 else None)
        run.until(lambda before=before: run.progress() > before and run.workers())
        os.killpg(run.driver.pid, signal.SIGKILL)
        run.driver.communicate()
        run.look()
        for name in ("tuner.pkl", "experiment_state-*.json"):
            for record in (run.root / "tune").glob(name):
                record.write_bytes(record.read_bytes()[: record.stat().st_size // 2])
                torn += 1
    assert torn >= n_kills
    run.start(cluster.address)
    run.finish()
    run.require_whole()
    trial = run.trials[0]
    undisturbed = run_trial(run.config, trial, tmp_path / "undisturbed", ignore)
    assert read_result(trial_folder(run.root, trial.name)) == undisturbed


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("nobody may mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_full_disk_is_said_in_a_line_and_nothing_finished_is_lost(small_disk, tmp_path):
    run = Sweep(tmp_path, 3, root=small_disk / "run")
    run.start()
    run.until(lambda: len(run.unfinished()) < 3)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    finished = {t.name for t in run.trials} - {t.name for t in run.unfinished()}
    kept = {name: read_result(trial_folder(run.root, name)) for name in finished}
    try:
        _, err = run.driver.communicate(timeout=300)
    finally:
        run.driver.kill()
    assert run.driver.returncode == 2, err
    assert "No space left on device" in err and "Traceback" not in err
    (small_disk / "filler").unlink()
    run.start()
    run.finish()
    run.require_whole()
    for name, result in kept.items():
        assert read_result(trial_folder(run.root, name)) == result
