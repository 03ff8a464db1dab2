import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_plant import TOY

import metactl.train
from metactl import Policy
from metactl.board import Board
from metactl.checkpoint import load_newest_checkpoint, save_checkpoint
from metactl.config import ConfigError, parse
from metactl.controllers import Learned, Static
from metactl.rollout import PlannedRun
from metactl.rundir import RunDirectoryError
from metactl.shards import ShardRow, make_population
from metactl.snapshot import snapshot
from metactl.train import TrainConfig, build_ppo, build_shards, train
from metactl.vec_env import ShardVecEnv

ID = "envs:AdaptiveTransformer-v0"
TINY = {
    "environment": {
        "id": ID,
        "options": {"horizon": 20, "n_control_steps": 5, "context": 16},
        "n_envs": 4,
        "n_workers": 0,
    },
    "ppo": {"total_timesteps": 80, "n_steps": 5, "batch_size": 20, "n_epochs": 2, "hidden": [16]},
    "set_point_runs": 4,
}
# Six decisions per run and four per rollout: checkpoints fall into the middle of runs.
TOYS = {
    "environment": {"id": TOY, "options": {"n_control_steps": 6}, "n_envs": 4, "n_workers": 0},
    "ppo": {"total_timesteps": 96, "n_steps": 4, "batch_size": 16, "n_epochs": 2, "hidden": [16]},
}
KILLED = """
import os, signal, sys, torch
from pathlib import Path
from metactl.config import ConfigError, parse
from metactl.train import TrainConfig, train

torch.set_num_threads(1)

def progress(done, total, status):
    if done >= 28:
        os.kill(os.getpid(), signal.SIGKILL)

train(parse(TrainConfig, {config!r}, "test"), Path({folder!r}), progress=progress)
"""


class Interrupted(Exception):
    pass


def config(base, seed=0, **ppo):
    values = {**base, "seed": seed, "ppo": {**base["ppo"], **ppo}}
    return parse(TrainConfig, values, "test")


def weights(folder):
    return (folder / "policy" / "weights.safetensors").read_bytes()


def scalars(folder):
    board = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: board.Scalars(tag) for tag in board.Tags()["scalars"]}


def interrupted(settings, folder, after):
    """Trains until `after` control steps are done, and then stops in the middle of things."""

    def progress(done, total, status):
        if done >= after:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(settings, folder, progress=progress)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("trained")
    told = []
    policy = train(config(TINY), folder, progress=lambda *args: told.append(args))
    return folder, policy, told


def test_training_leaves_a_policy_checkpoints_and_a_board(trained):
    folder, policy, _ = trained
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "policy", "tb"]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        f"step-{step:012d}" for step in (20, 40, 60)
    ]
    loaded = Policy.load(folder / "policy")
    seen = np.random.default_rng(0).normal(size=(3, len(policy.card.observations)))
    np.testing.assert_array_equal(loaded.act(seen), policy.act(seen))


def test_the_policy_card_says_what_it_was_trained_on(trained):
    folder, _, _ = trained
    card = Policy.load(folder / "policy").card
    loop = make_population(ID, 1, TINY["environment"]["options"]).loop
    assert card.knobs == loop.knobs.knobs
    assert card.observations == loop.codec.names
    assert card.n_control_steps == 5
    assert card.hidden == (16,)
    assert card.training["config"]["ppo"]["total_timesteps"] == 80
    assert min(card.training["reward_scales"]) > 0


def test_progress_is_told_of_every_control_step(trained):
    _, _, told = trained
    assert [done for done, *_ in told] == list(range(4, 81, 4))
    assert {total for _, total, _ in told} == {80}


def test_the_board_can_be_read_back_and_stays_small(trained):
    tags = scalars(trained[0])
    assert 5 < len(tags) < 60
    groups = {"train", "probe", "knob", "signal", "drive", "reward", "perf", "rollout", "time"}
    assert {tag.partition("/")[0] for tag in tags} <= groups
    assert [event.step for event in tags["rollout/ep_rew_mean"]] == [20, 40, 60, 80]
    assert all(np.isfinite(event.value) for events in tags.values() for event in events)


def test_the_same_seed_trains_the_same_policy_and_another_seed_another(trained, tmp_path):
    train(config(TINY), tmp_path / "again")
    assert weights(tmp_path / "again") == weights(trained[0])
    for seed in (0, 1):
        train(config(TOYS, seed=seed), tmp_path / str(seed))
    assert weights(tmp_path / "0") != weights(tmp_path / "1")


def test_a_training_that_was_killed_and_resumed_ends_with_the_same_policy(trained, tmp_path):
    code = KILLED.format(config=TINY, folder=str(tmp_path))
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*"))
    assert steps == [0, 20]
    assert not (tmp_path / "policy").exists()
    train(config(TINY), tmp_path, resume=True)
    assert weights(tmp_path) == weights(trained[0])


@pytest.mark.parametrize("after", [4, 36, 96])
@pytest.mark.parametrize(("use_sde", "paired_runs"), [(False, 1), (True, 4)])
def test_a_training_interrupted_in_the_middle_of_runs_ends_with_the_same_policy(
    tmp_path, after, use_sde, paired_runs
):
    settings = config(TOYS, use_sde=use_sde, paired_runs=paired_runs)
    train(settings, tmp_path / "whole")
    interrupted(settings, tmp_path / "parts", after)
    train(settings, tmp_path / "parts", resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.parametrize("tag", ["probe/final_probe_loss", "train/loss"])
def test_a_resumed_board_holds_every_update_once(tmp_path, tag):
    settings = config(TOYS)
    train(settings, tmp_path / "whole")
    interrupted(settings, tmp_path / "parts", 40)
    train(settings, tmp_path / "parts", resume=True)
    whole, parts = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    assert [(e.step, e.value) for e in parts[tag]] == [(e.step, e.value) for e in whole[tag]]


def test_what_is_a_numpy_number_is_on_the_board_too(trained):
    assert "train/approx_kl" in scalars(trained[0])


def test_what_a_resumed_board_writes_is_read_after_what_was_there(tmp_path):
    (tmp_path / "events.out.tfevents.99999999999.clock.1.0").touch()  # nobody waits for that
    for purge_step in (0, 2, 3):
        with Board(tmp_path, purge_step=purge_step) as board:
            board.scalars({"loss": 1.0}, purge_step)
    seconds = [path.name.split(".")[3] for path in tmp_path.iterdir()]
    assert len(seconds) == len(set(seconds)) == 4


def test_the_mean_return_on_the_board_is_that_of_whole_episodes(tmp_path):
    train(config(TOYS, paired_runs=1), tmp_path)
    policy = Policy.load(tmp_path / "policy")
    first = scalars(tmp_path)["rollout/ep_rew_mean"][0]
    # An untrained policy on the toy plant improves about as much as a run at rest, which is 1.
    assert first.value == pytest.approx(1, abs=0.35)
    assert policy.card.training["reward_scales"][0] > 0.5


def test_policies_are_kept_along_the_way_with_a_training_that_was_killed_too(tmp_path):
    settings = config({**TOYS, "policy_every": 40})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(settings, whole)
    interrupted(settings, killed, after=60)
    train(settings, killed, resume=True)
    names = [folder.name for folder in sorted((whole / "policies").iterdir())]
    assert names == ["000000000", "000000048", "000000080"]  # updates are 16 control steps apart
    kept = [(whole / "policies" / name / "weights.safetensors").read_bytes() for name in names]
    assert len(set(kept)) == len(kept)
    for name, found in zip(names, kept, strict=True):
        assert (killed / "policies" / name / "weights.safetensors").read_bytes() == found


def test_resuming_a_finished_training_gives_the_same_policy(trained, tmp_path):
    settings = config(TOYS)
    train(settings, tmp_path)
    before = weights(tmp_path)
    train(settings, tmp_path, resume=True)
    assert weights(tmp_path) == before


def test_a_worker_killed_in_training_changes_nothing(tmp_path):
    values = {**TOYS, "environment": {**TOYS["environment"], "n_workers": 2}}
    settings = config(values)
    train(settings, tmp_path / "whole")
    victims = []

    def kill_once(done, total, status):
        if done >= total // 2 and not victims:
            victims.extend(multiprocessing.active_children()[:1])
            assert victims[0].is_alive()
            os.kill(victims[0].pid, signal.SIGKILL)

    train(settings, tmp_path / "hit", progress=kill_once)
    assert victims and not victims[0].is_alive()
    assert weights(tmp_path / "hit") == weights(tmp_path / "whole")


def test_a_training_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    train(config(TOYS), tmp_path / "whole")
    train(config(TOYS), tmp_path / "again", resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "again")


def test_damaged_checkpoints_alone_are_nothing_to_resume(tmp_path):
    interrupted(config(TOYS), tmp_path, 20)
    for checkpoint in (tmp_path / "checkpoints").glob("step-*"):
        (checkpoint / "state.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="holds no intact checkpoint to resume"):
        train(config(TOYS), tmp_path, resume=True)


def test_a_pair_that_a_divergence_parted_learns_from_each_other_again():
    options = {"n_control_steps": 8, "horizon": 16, "diverge_above": 0.95}
    with ShardRow(TOY, 4, options, 0) as shards:
        env = ShardVecEnv(shards, paired_runs=4)
        env.seed(3)
        env.reset()
        rewards, cut = [], []
        for step in range(32):
            actions = np.random.default_rng(step).uniform(-1, 1, (4, 2)) * 0.3
            if step < 3:
                actions[1, 0] = 1.0
            _, reward, done, infos = env.step(actions)
            rewards.append(reward)
            cut.append([info.get("TimeLimit.truncated", False) for info in infos])
            for info, over in zip(infos, done, strict=True):
                if over:
                    assert info["terminal_observation"].shape == env.observation_space.shape
    assert np.any(cut, axis=0).tolist() == [False, True, False, False]
    assert np.all(np.array(rewards)[8:] != 0)


def test_a_training_whose_runs_diverge_goes_on_to_its_end(tmp_path):
    hot = {**TOYS, "environment": {**TOYS["environment"]}}
    hot["environment"]["options"] = {"n_control_steps": 6, "diverge_above": 0.7}
    train(config(hot), tmp_path)
    assert max(event.value for event in scalars(tmp_path)["rollout/diverged"]) > 0


def test_too_little_to_learn_from_is_refused_in_words():
    lonely = {**TOYS, "environment": {**TOYS["environment"], "n_envs": 1}}
    settings = config(lonely, n_steps=1, paired_runs=1)
    with build_shards(settings) as shards, pytest.raises(ConfigError, match="at least 2 control"):
        build_ppo(settings, ShardVecEnv(shards))


def test_batches_that_do_not_divide_what_was_played_are_nobodys_worry():
    settings = config(TOYS, batch_size=7)
    with build_shards(settings) as shards, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_ppo(settings, ShardVecEnv(shards)).batch_size == 7


def test_resuming_with_more_workers_than_before_is_refused_in_words(tmp_path):
    interrupted(config(TOYS), tmp_path, 20)
    values = {**TOYS, "environment": {**TOYS["environment"], "n_workers": 2}}
    refusal = r"has 1 shards, this training 2; .*number of workers"
    with pytest.raises(RunDirectoryError, match=refusal):
        train(parse(TrainConfig, values, "test"), tmp_path, resume=True)


def test_a_training_of_as_many_workers_as_cores_goes_on_where_there_are_fewer(
    tmp_path, monkeypatch
):
    values = {**TOYS, "environment": {**TOYS["environment"], "n_workers": -1}}
    settings = parse(TrainConfig, values, "test")
    monkeypatch.setattr(metactl.train, "default_workers", lambda: 2)
    train(settings, tmp_path / "whole")
    interrupted(settings, tmp_path / "part", after=28)
    monkeypatch.setattr(metactl.train, "default_workers", lambda: 1)
    train(settings, tmp_path / "part", resume=True)
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage",
    [{"numpy": [10**9, 0, 0.0]}, {"python": 3}, {"reward_scales": None}, {"num_timesteps": None}],
)
def test_a_checkpoint_of_the_right_checksum_and_wrong_content_is_refused(damage, tmp_path):
    interrupted(config(TOYS), tmp_path, after=28)
    tensors, held = load_newest_checkpoint(tmp_path / "checkpoints")
    held = {name: value for name, value in {**held, **damage}.items() if value is not None}
    save_checkpoint(tmp_path / "checkpoints", 10**6, tensors, held)
    with pytest.raises(RunDirectoryError, match="The checkpoint does not fit this training"):
        train(config(TOYS), tmp_path, resume=True)


def test_resuming_with_other_networks_is_refused_in_words(tmp_path):
    interrupted(config(TOYS), tmp_path, after=28)
    with pytest.raises(RunDirectoryError, match="other networks than this training"):
        train(config(TOYS, hidden=[8]), tmp_path, resume=True)


def test_workers_learn_on_their_own_variants_in_units_of_their_own(tmp_path):
    """A distance ten times as far gives improvements ten times as large, and rewards alike."""
    variants = [{}, {"farther": 10.0}]
    environment = {**TOYS["environment"], "n_workers": 2, "variants": variants}
    policy = train(config({**TOYS, "environment": environment}), tmp_path)
    near, far = policy.card.training["reward_scales"]
    assert far == pytest.approx(10 * near, rel=0.5)
    returned = scalars(tmp_path)["rollout/ep_rew_mean"][0].value
    assert returned == pytest.approx(1, abs=0.35)


def test_variants_with_other_knobs_are_refused_in_words(tmp_path):
    options = {"d_model": 16, "n_layers": 1, "context": 16, "horizon": 40}
    variants = [{}, {"knobs": ["dropout"]}]
    with pytest.raises(ValueError, match=r"the same knobs, got rope_base.* and dropout"):
        ShardRow(ID, 1, options, 2, variants)


def test_unlike_shards_play_no_paired_trials():
    with ShardRow(TOY, 1, {}, 2, [{}, {"farther": 10.0}]) as row:
        with pytest.raises(ValueError, match="these shards are not"):
            row.play([])


def test_training_finds_a_policy_that_beats_knobs_at_rest_on_paired_runs(tmp_path):
    """From random rates there is much to gain: the best one drifts, and stays inside."""
    options = {"horizon": 12, "n_control_steps": 6, "random_start": 1.0}
    environment = {**TOYS["environment"], "n_envs": 16, "options": options}
    ppo = {"total_timesteps": 4800, "n_steps": 12, "batch_size": 96, "n_epochs": 8}
    policy = train(config({**TOYS, "environment": environment}, **ppo), tmp_path)
    with ShardRow(TOY, 64, options, n_workers=0) as row:
        loop = row._local.env.loop
        episodes = [loop.draw_episode(10**6 + i, 0) for i in range(64)]  # not trained on
        final = [
            [
                r.final_probe
                for r in row.play([PlannedRun(arm="", episode=e, controller=c) for e in episodes])
            ]
            for c in (Learned(policy), Static())
        ]
    gain = np.array(final[1]) - np.array(final[0])
    assert gain.mean() > 4 * gain.std() / np.sqrt(64)


def test_a_policy_without_hidden_layers_is_linear(tmp_path):
    policy = train(config(TOYS, hidden=[]), tmp_path)
    assert policy.card.hidden == () and {"weight_0", "bias_0"} <= set(policy.weights)
    assert "weight_1" not in policy.weights


def test_the_critic_sees_the_pairs_and_the_actor_does_not():
    with build_shards(config(TOYS)) as shards:
        model = build_ppo(config(TOYS), ShardVecEnv(shards, paired_runs=4))
        seen = model.env.reset()
        apart = seen.copy()
        apart[:, model.env.n_seen :] += 1
        actions, values = [], []
        for observation in (seen, apart):
            tensor = torch.from_numpy(observation)
            actions.append(model.predict(observation, deterministic=True)[0])
            values.append(model.policy.predict_values(tensor).detach().numpy())
    np.testing.assert_array_equal(*actions)
    assert (values[0] != values[1]).all()


def test_an_actor_that_is_shown_progress_alone_answers_nothing_else(tmp_path):
    blind = config(TOYS, signals=["progress"])
    policy = train(blind, tmp_path)
    names = list(policy.card.observations)
    with build_shards(blind) as shards:
        model = build_ppo(blind, ShardVecEnv(shards, paired_runs=4))
        seen = model.env.reset()
    shown = [i for i, name in enumerate(names) if name == "signal/progress" or "knob/" in name]
    other = seen.copy()
    other[:, [i for i in range(len(names)) if i not in shown]] += 1
    actions = [model.predict(each, deterministic=True)[0] for each in (seen, other)]
    np.testing.assert_array_equal(*actions)
    np.testing.assert_array_equal(
        policy.act(seen[:, : len(names)]), policy.act(other[:, : len(names)])
    )
    for i in shown:
        moved = seen[:, : len(names)].copy()
        moved[:, i] += 1
        assert (policy.act(moved) != policy.act(seen[:, : len(names)])).any(), names[i]


def test_a_signal_that_runs_do_not_have_is_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown signal 'probes'"):
        train(config(TOYS, signals=["probes"]), tmp_path)


def test_a_figure_that_is_not_finite_stops_no_checkpoint(tmp_path):
    settings = config(
        {**TOYS, "environment": {**TOYS["environment"], "n_envs": 1}}, paired_runs=1, batch_size=4
    )
    with build_shards(settings) as shards:
        model = build_ppo(settings, ShardVecEnv(shards))
        model.env.seed(0)
        model._last_obs = model.env.reset()
        model._last_episode_starts = np.ones(1, dtype=bool)
        model.set_logger(Logger(folder=None, output_formats=[]))
        model.logger.record("train/explained_variance", float("nan"))
        _, scalars = snapshot(model, shards, [1.0])
    kept = json.loads(json.dumps(scalars, allow_nan=False))
    assert np.isnan(float(kept["pending"]["train/explained_variance"]))


def test_set_points_of_runs_that_there_are_not_are_refused_before_anything_is_learned(tmp_path):
    options = {**TINY["environment"]["options"], "context": 4, "task": "waves"}
    environment = {**TINY["environment"], "options": options, "n_workers": 1}
    recipe = {**TINY, "environment": {**environment, "variants": [{"context": 16}]}}
    with pytest.raises(ConfigError, match="set_point_runs=4 needs runs with the options alone"):
        train(parse(TrainConfig, recipe, "test"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_variants_that_see_other_signals_are_refused_in_words():
    options = {**TINY["environment"]["options"], "d_model": 16}
    variants = [{"internal": True}, {}]
    with pytest.raises(ValueError, match=r"the same signals, but not all have .*entropy"):
        ShardRow(ID, 1, options, 2, variants)


def test_a_board_that_cannot_be_written_says_where(tmp_path, monkeypatch):
    board = Board(tmp_path / "tb")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(board._writer, "flush", lambda: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=r"No space left on device: '.*tb'"):
        board.flush()
