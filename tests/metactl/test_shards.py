import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from toy_plant import TOY

from metactl.config import ConfigError
from metactl.controllers import RandomMoves, Static
from metactl.errors import WorkerDied
from metactl.evaluation import paired_episodes
from metactl.rollout import PlannedRun
from metactl.shards import ShardRow, make_population
from metactl.vec_env import ShardVecEnv

ID = "envs:AdaptiveTransformer-v0"
OPTIONS = {"horizon": 20, "context": 16, "n_control_steps": 5, "dtype": "float64"}
CLOSE = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(scope="module")
def workers():
    """Two worker processes with two transformers each."""
    with ShardRow(ID, 2, OPTIONS, n_workers=2) as row:
        yield row


def rewarded(paired_runs, n_envs=4, **options):
    """Rewards and infos of toy runs under random moves."""
    with ShardRow(TOY, n_envs, {"n_control_steps": 4, **options}, n_workers=0) as row:
        env = ShardVecEnv(row, paired_runs)
        env.seed(3)
        starts = env.reset()
        moves = np.random.default_rng(0).uniform(-1, 1, (6, n_envs, 2)).astype(np.float32)
        steps = [env.step(move) for move in moves]
    return starts, np.array([step[1] for step in steps]), [step[3] for step in steps]


def own(infos):
    return np.array([[info["own_reward"] for info in step] for step in infos])


def test_worker_processes_give_the_trajectories_of_this_process(workers):
    moves = np.random.default_rng(0).uniform(-1, 1, (7, 4, 4)).astype(np.float32)
    trajectories = []
    with ShardRow(ID, 4, OPTIONS, n_workers=0) as local:
        for row in (workers, local):
            env = ShardVecEnv(row)
            env.seed(7)
            seen = [env.reset()]
            losses, rewards = [], []
            for move in moves:  # 20 optimizer steps of one run each, and 8 of the next
                observation, _, _, infos = env.step(move)
                seen.append(observation)
                losses.append([(info["train_loss"], info["probe_loss"]) for info in infos])
                rewards.append([info["own_reward"] for info in infos])
            trajectories.append((np.array(losses), np.array(rewards), np.stack(seen)))
    for there, here in zip(*trajectories, strict=True):
        np.testing.assert_allclose(there, here, **CLOSE)
    assert trajectories[0][0].dtype == np.float64 and len(np.unique(trajectories[0][0])) == 56


def test_trials_come_back_in_their_order_from_several_workers(workers):
    finished = []
    with ShardRow(ID, 2, OPTIONS, n_workers=0) as local:
        episodes = [local._local.env.loop.draw_episode(seed, 0) for seed in range(7)]
        trials = [
            PlannedRun(arm=str(i), episode=e, controller=Static()) for i, e in enumerate(episodes)
        ]
        expected = local.play(trials)
    results = workers.play(trials, on_done=finished.append)
    assert [result.arm for result in results] == [str(i) for i in range(7)]
    assert sorted(finished) == [1, 2, 2, 2]
    for left, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(left.probe_loss, right.probe_loss, **CLOSE)
        assert left.best_test == pytest.approx(right.best_test, abs=1e-9)


def test_a_controller_shared_by_trials_does_the_same_wherever_its_runs_are(workers):
    results = []
    with ShardRow(ID, 2, OPTIONS, n_workers=0) as local:
        episode = local._local.env.loop.draw_episode(1, 0)
        for row in (local, workers):
            shared = RandomMoves(1)
            trials = [PlannedRun(arm="random", episode=episode, controller=shared)] * 4
            results.append(np.stack([result.positions for result in row.play(trials)]))
    np.testing.assert_allclose(results[0], results[1], **CLOSE)


def test_the_state_of_workers_goes_there_and_back(workers):
    env = ShardVecEnv(workers)
    env.reset()
    move = np.zeros((4, 4), dtype=np.float32)
    state = workers.call_all("state_dict")
    expected = env.step(move)[0]
    workers.call("load_state_dict", [(each,) for each in state])
    np.testing.assert_array_equal(env.step(move)[0], expected)


@pytest.mark.parametrize(
    "options", [{"learning_rate": -1.0}, {"n_control_steps": 500}], ids=["plant", "control"]
)
def test_a_refused_option_says_the_same_from_a_worker_as_from_this_process(options):
    messages = []
    for n_workers in (0, 1):
        with pytest.raises(ValueError) as caught:
            ShardRow(ID, 1, {**OPTIONS, **options}, n_workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert next(iter(options)) in messages[0]


class Counting(Static):
    asked = 0

    def act(self, observation):
        self.asked += 1
        return super().act(observation)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_what_a_controller_went_through_in_one_population_is_not_there_in_the_next(n_workers):
    controller = Counting()
    with ShardRow(TOY, 1, {"n_control_steps": 4}, n_workers) as row:
        episode = paired_episodes(1, 0, row.knobs.default_positions(1)[0])[0]
        planned = [PlannedRun(arm="a", episode=episode, controller=controller)] * 2
        first, second = row.play(planned)
    assert first.final_test == second.final_test and controller.asked == 0


@pytest.mark.parametrize("name", ["num_envs", "vectorization_mode", "wrappers"])
def test_what_gymnasium_itself_takes_is_no_option_of_an_environment(name):
    with pytest.raises(ConfigError, match=rf"unknown option '{name}'"):
        make_population(ID, 1, {**OPTIONS, name: 2})


def kill(worker):
    assert worker.process.is_alive()
    os.kill(worker.process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "saved_after", [3, *(pytest.param(n, marks=pytest.mark.soak) for n in (None, 0))]
)
def test_a_killed_worker_starts_again_and_nothing_tells_the_difference(saved_after, caplog):
    """Killed between calls and within one, before and after its state was last saved."""
    moves = np.random.default_rng(0).uniform(-1, 1, (7, 4, 4)).astype(np.float32)
    trajectories = []
    for kills in (False, True):
        with ShardRow(ID, 2, {**OPTIONS, "dtype": "float32"}, n_workers=2) as row:
            row.call("set_reward_scale", [(0.5,), (2.0,)])
            env = ShardVecEnv(row)
            env.seed(7)
            seen, rewards = [env.reset()], []
            for i, move in enumerate(moves):
                if i == saved_after:
                    row.call_all("state_dict")
                if kills and i in (1, 4):
                    kill(row._workers[i % 2])
                if kills and i == 5:
                    row._workers[0].send("step", move[:2])
                    kill(row._workers[0])
                    row._workers[1].send("step", move[2:])
                    answers = [worker.receive() for worker in row._workers]
                    observation = np.concatenate([answer[0] for answer in answers])
                    reward = np.concatenate([answer[1] for answer in answers])
                else:
                    observation, reward, *_ = env.step(move)
                seen.append(observation)
                rewards.append(np.asarray(reward, dtype=np.float32))
            trajectories.append((np.stack(seen), np.stack(rewards)))
    np.testing.assert_array_equal(trajectories[0][0], trajectories[1][0])
    np.testing.assert_array_equal(trajectories[0][1], trajectories[1][1])
    told = [r.message for r in caplog.records if "worker process died" in r.message]
    assert len(told) == 3 and "(exit code -9)" in told[0] and "redoes" in told[0]


def test_trials_that_a_dying_worker_had_are_played_again(workers):
    with ShardRow(ID, 2, OPTIONS, n_workers=0) as local:
        loop = local._local.env.loop
        trials = [
            PlannedRun(arm=str(i), episode=loop.draw_episode(i, 0), controller=Static())
            for i in range(6)
        ]
        expected = local.play(trials)
    kill(workers._workers[0])
    results = workers.play(trials)
    assert [result.arm for result in results] == [str(i) for i in range(6)]
    for left, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(left.probe_loss, right.probe_loss, **CLOSE)


def test_a_call_that_kills_its_worker_every_time_is_an_error_in_words_and_no_hang():
    with ShardRow(TOY, 1, {"dies": True}, n_workers=1) as row:
        row.call_all("reset", 0)
        began = time.monotonic()
        with pytest.raises(WorkerDied, match=r"worker process died \(exit code 9\)"):
            row.call_all("step", np.zeros((1, 2)))
        assert time.monotonic() - began < 60


def test_an_environment_that_is_no_population_of_runs_is_refused():
    with pytest.raises(ValueError, match="needs a TrainingRunVectorEnv"):
        make_population("CartPole-v1", 2, {})


def test_trials_of_one_shard_in_this_process_come_back_in_order():
    finished = []
    with ShardRow(TOY, 3, {"n_control_steps": 4}, n_workers=0) as row:
        loop = row._local.env.loop
        trials = [
            PlannedRun(arm=str(i), episode=loop.draw_episode(i, 0), controller=Static())
            for i in range(8)
        ]
        results = row.play(trials, on_done=finished.append)
    assert [result.arm for result in results] == [str(i) for i in range(8)]
    assert finished == [3, 3, 2]
    assert len({result.probe_loss[0] for result in results}) == 8


def test_paired_runs_live_through_the_same_episode_and_groups_do_not():
    starts, _, infos = rewarded(2)
    single, _, _ = rewarded(1)
    np.testing.assert_array_equal(starts[:, : single.shape[1]], single[[0, 0, 1, 1]])
    assert infos[0][0]["probe_loss"] != infos[0][2]["probe_loss"]


def test_paired_runs_are_rewarded_by_how_much_better_they_did_than_the_others():
    _, rewards, infos = rewarded(4)
    plain = own(infos)
    others = (plain.sum(axis=1, keepdims=True) - plain) / 3
    np.testing.assert_allclose(rewards, plain - others, atol=1e-6)
    np.testing.assert_allclose(rewards.sum(axis=1), 0, atol=1e-6)
    assert np.abs(rewards).max() > 1e-3


def test_a_run_alone_is_rewarded_by_its_own_improvement():
    _, rewards, infos = rewarded(1)
    np.testing.assert_allclose(rewards, own(infos), atol=1e-6)
    assert (rewards > 0).any()


def test_a_run_whose_pair_has_moved_on_is_compared_with_nobody():
    with ShardRow(TOY, 2, {"n_control_steps": 8, "diverge_above": 0.9}, n_workers=0) as row:
        env = ShardVecEnv(row, paired_runs=2)
        env.reset()
        for _ in range(6):
            _, reward, done, infos = env.step(np.array([[1.0, 0], [0, 0]], dtype=np.float32))
            if done.any():
                break
        assert done.tolist() == [True, False]
        seen, reward, _, infos = env.step(np.zeros((2, 2), dtype=np.float32))
    assert reward.tolist() == [0, 0]
    assert not seen[:, env.n_seen :].any()
    assert all(info["own_reward"] != 0 for info in infos)


def test_paired_runs_are_observed_with_how_far_they_are_from_the_others():
    moves = np.random.default_rng(0).uniform(-1, 1, (4, 2)).astype(np.float32)
    with ShardRow(TOY, 4, {}, n_workers=0) as row:
        env = ShardVecEnv(row, paired_runs=4)
        env.seed(3)
        start = env.reset()
        seen = env.step(moves)[0]
    assert env.observation_space.contains(seen[0])
    own, apart = np.split(seen, [env.n_seen], axis=1)
    others = (own.sum(axis=0) - own) / 3
    np.testing.assert_allclose(apart, own - others, atol=1e-6)
    assert not start[:, env.n_seen :].any()
    assert np.abs(apart).max() > 1e-3


def pushed(bound_cost, **options):
    """Rewards and blocked moves of toy runs whose knobs are pushed to a bound and beyond it."""
    push = np.array([[1.0, -0.5]] * 4, dtype=np.float32)
    with ShardRow(TOY, 4, {"n_control_steps": 40, **options}, n_workers=0) as row:
        env = ShardVecEnv(row, bound_cost=bound_cost)
        env.reset()
        steps = [env.step(push) for _ in range(20)]
    blocked = [[info["blocked"] for info in step[3]] for step in steps]
    return np.array([step[1] for step in steps]), np.array(blocked)


def test_pushing_against_a_bound_costs():
    (free, _), (charged, blocked) = pushed(0.0), pushed(0.25)
    # From the middle, one knob is at its bound after 5 control steps and the other after 10.
    expected = np.repeat([0.0, 1.0, 1.5], [5, 5, 10])
    np.testing.assert_allclose(blocked, np.tile(expected[:, None], 4), atol=1e-6)
    np.testing.assert_allclose(free - charged, 0.25 * blocked, atol=1e-6)


def test_pushing_a_frozen_knob_costs_nothing():
    _, blocked = pushed(0.25, freeze=1.0)  # leaves every run one knob
    assert set(blocked[-1].round(6)) <= {0.5, 1.0}


def test_a_run_says_what_its_episode_returned_also_after_a_checkpoint():
    still = np.zeros((2, 2), dtype=np.float32)
    with ShardRow(TOY, 2, {"n_control_steps": 8}, n_workers=0) as row:
        env = ShardVecEnv(row)
        env.reset()
        rewards, returns = [], []
        for step in range(16):
            if step == 5:
                saved = env.state_dict()
                env = ShardVecEnv(row)
                env.load_state_dict(saved)
            _, reward, done, infos = env.step(still)
            rewards.append(reward)
            if done.all():
                returns.append([info["own_return"] for info in infos])
    np.testing.assert_allclose(returns, np.reshape(rewards, (2, 8, 2)).sum(axis=1), atol=1e-6)


def test_paired_runs_must_divide_a_shard():
    with (
        ShardRow(TOY, 4, {}, n_workers=0) as row,
        pytest.raises(ValueError, match="must divide the 4 runs of a shard, got 3"),
    ):
        ShardVecEnv(row, 3)


OWNER = """
import queue, time
from metactl.worker import ProcessWorker

if __name__ == "__main__":
    worker = ProcessWorker(queue.Queue, ())
    worker.require_ready()
    worker._send("get")  # which never returns
    print(worker.process.pid, flush=True)
    time.sleep(60)
"""


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_in_the_middle_of_a_call_does_not_outlive_its_killed_owner(tmp_path):
    (tmp_path / "owner.py").write_text(OWNER)
    command = [sys.executable, str(tmp_path / "owner.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        worker = int(owner.stdout.readline())
        assert lives(worker)
        owner.kill()
    end = time.monotonic() + 20
    while lives(worker) and time.monotonic() < end:
        time.sleep(0.2)
    assert not lives(worker)


def test_runs_are_pairs_where_they_live_through_the_same_episode_and_only_there():
    options = {"n_control_steps": 8, "diverge_above": 0.95}
    up = {1: [1], 3: [0, 1]}  # by control step: who is moved to where it diverges
    with ShardRow(TOY, 2, options, n_workers=0) as row:
        env = ShardVecEnv(row, 2)
        env.seed(3)
        env.reset()
        inside, twins, agree = row._local.env, [], []
        for step in range(24):
            moves = np.zeros((2, 2), dtype=np.float32)
            moves[up.get(step, [])] = (1.0, 0.0)
            env.step(moves)
            twins.append(bool((env._age[:, 0] == env._age[:, 1]).all()))
            agree.append(len(set(inside.loop.run_seeds.tolist())) == 1)
    assert twins == agree
    assert not all(agree) and agree[0] and agree[-1]
