"""Shards as Ray actors: the trajectories of worker processes, also when an actor is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import refused

from metactl.cluster import _short_folder, cluster
from metactl.config import ConfigError, TrainConfig, parse
from metactl.controllers import Static
from metactl.ray_worker import RayWorker
from metactl.rollout import PlannedRun
from metactl.shards import ShardRow
from metactl.train import train
from metactl.vec_env import ShardVecEnv

ID = "envs:AdaptiveTransformer-v0"
OPTIONS = {"horizon": 20, "context": 16, "n_control_steps": 5, "dtype": "float64"}
CLOSE = {"rtol": 0, "atol": 1e-9}

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def ray():
    with cluster(None):
        import ray

        yield ray


def trajectory(row, before_step=None):
    env = ShardVecEnv(row)
    env.seed(7)
    seen = [env.reset()]
    for i, move in enumerate(np.random.default_rng(0).uniform(-1, 1, (7, 4, 4))):
        if before_step is not None:
            before_step(i)
        observation, reward, _, infos = env.step(move.astype(np.float32))
        losses = [(info["train_loss"], info["probe_loss"]) for info in infos]
        seen.append(np.column_stack((observation, reward, losses)))
    return np.concatenate([part.ravel() for part in seen])


def test_actors_give_the_trajectories_of_processes_and_of_here_also_when_one_is_killed(ray, caplog):
    with ShardRow(ID, 2, OPTIONS, 2) as processes:
        expected = trajectory(processes)
    with ShardRow(ID, 4, OPTIONS, 0) as local:
        np.testing.assert_allclose(trajectory(local), expected, **CLOSE)
    with ShardRow(ID, 2, OPTIONS, 2, spawn=RayWorker) as row:
        np.testing.assert_allclose(trajectory(row), expected, **CLOSE)

        def disturb(i):
            if i == 2:
                row.call_all("state_dict")
            if i in (1, 5):
                ray.kill(row._workers[i % 2].actor)

        assert np.array_equal(trajectory(row, disturb), trajectory(row))
    told = [r.message for r in caplog.records if "actor died" in r.message.lower()]
    assert len(told) == 2 and "redoes" in told[0]


def test_trials_come_back_in_their_order_from_actors(ray):
    with ShardRow(ID, 2, OPTIONS, 0) as local:
        loop = local._local.env.loop
        trials = [
            PlannedRun(arm=str(i), episode=loop.draw_episode(i, 0), controller=Static())
            for i in range(5)
        ]
        expected = local.play(trials)
    with ShardRow(ID, 2, OPTIONS, 2, spawn=RayWorker) as row:
        results = row.play(trials)
    assert [result.arm for result in results] == [str(i) for i in range(5)]
    for left, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(left.probe_loss, right.probe_loss, **CLOSE)


def test_a_refused_option_says_the_same_from_an_actor(ray):
    messages = []
    for spawn in ({}, {"spawn": RayWorker}):
        with pytest.raises(ValueError) as caught:
            ShardRow(ID, 1, {**OPTIONS, "learning_rate": -1.0}, 1, **spawn)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "learning_rate" in messages[0]


def test_a_policy_learned_on_actors_is_that_learned_on_processes(ray, tmp_path):
    options = {"d_model": 8, "n_layers": 1, "context": 8, "horizon": 10, "n_control_steps": 5}
    weights = []
    for place in ("processes", "ray"):
        environment = {"options": options, "n_envs": 2, "n_workers": 2, "shards": place}
        ppo = {"total_timesteps": 40, "n_steps": 5, "batch_size": 20, "paired_runs": 2}
        values = {"environment": environment, "ppo": ppo, "set_point_runs": 4}
        policy = train(parse(TrainConfig, values, "test"), tmp_path / place)
        weights.append({name: w.tolist() for name, w in policy.weights.items()})
        assert policy.card.set_points is not None
    assert weights[0] == weights[1]


def test_nobody_without_its_token_uses_a_cluster_of_ones_own(ray):
    address = ray.get_runtime_context().gcs_address
    stranger = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run(
        [sys.executable, "-c", f"import ray; ray.init(address={address!r})"],
        env=stranger,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr


def test_without_a_cluster_shards_on_ray_say_what_to_do(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"call ray\.init first"):
        ShardRow(ID, 1, OPTIONS, 1, spawn=RayWorker)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--address", "auto"], "--address is of a Ray cluster: it needs --shards ray"),
        (["--shards", "ray", "--n-workers", "0"], "n_workers of at least 1"),
        (["--num-shards", "2", "--n-workers", "2"], "give one of them"),
        (["--gpus-per-shard", "-1"], "gpus_per_shard must be at least 0, got -1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_in_words(arguments, words, tmp_path, capsys):
    assert words in refused(capsys, "train", "--run-dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists() or json.dumps(list((tmp_path / "run").iterdir())) == "[]"


def test_what_a_killed_driver_left_goes_and_what_a_living_one_uses_stays(monkeypatch):
    monkeypatch.setattr("metactl.cluster._PATIENCE", 0.0)
    code = (
        "import metactl.cluster as c\n"
        "with c._short_folder() as folder:\n"
        "    print(folder, flush=True)\n"
        "    input()\n"
    )
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    drivers = [subprocess.Popen([sys.executable, "-c", code], **piped) for _ in range(2)]
    killed, living = (Path(driver.stdout.readline().strip()) for driver in drivers)
    drivers[0].kill()
    drivers[0].wait()
    assert killed.is_dir()
    with _short_folder() as own:
        assert Path(own).is_dir() and living.is_dir() and not killed.exists()
    assert not Path(own).exists()
    drivers[1].communicate("\n")
    assert not living.exists()


def test_a_file_system_without_locks_gives_a_folder_too_and_nothing_is_taken_away(monkeypatch):
    monkeypatch.setattr("metactl.cluster._PATIENCE", 0.0)

    def refuse(*_):
        raise OSError("no locks here")

    with _short_folder() as other:
        monkeypatch.setattr("fcntl.flock", refuse)
        with _short_folder() as own:
            assert Path(own).is_dir() and Path(other).is_dir()
