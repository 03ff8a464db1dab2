import copy
import pickle
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check
from toy_plant import TOY, ToyPlant

from envs.transformer_run import build_run
from metactl.env import ControlLoop, TrainingRunEnv, TrainingRunVectorEnv
from metactl.episodes import ControlConfig
from metactl.shards import ShardRow
from metactl.signals import GROUPS
from metactl.vec_env import ShardVecEnv

ID = "envs:AdaptiveTransformer-v0"
OPTIONS = {"horizon": 40, "context": 16, "n_control_steps": 20}
SHORT = {"horizon": 12, "context": 16, "n_control_steps": 6}


def single(**options):
    return gymnasium.make(ID, **{**OPTIONS, **options}).unwrapped


def population(n, **options):
    return gymnasium.make_vec(ID, num_envs=n, **{**SHORT, **options}).unwrapped


def toys(n, diverge_above=np.inf, **control):
    config = ControlConfig(**{"n_control_steps": 8, **control})
    return TrainingRunVectorEnv(ToyPlant(n, diverge_above=diverge_above), config)


def actions(n_steps, *shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n_steps, *shape)).astype(np.float32)


@pytest.mark.parametrize("check", [gymnasium_check, sb3_check], ids=["gymnasium", "sb3"])
def test_the_environment_passes_the_check_of(check):
    env = single()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(env)
    env.close()


def test_the_same_seed_gives_the_same_trajectory_and_another_seed_another():
    def trajectory(seed):
        env = single(**SHORT, random_start=0.5)
        observations = [env.reset(seed=seed)[0]]
        steps = [env.step(action) for action in actions(6, 4)]
        return np.stack(observations + [s[0] for s in steps]), [s[1] for s in steps]

    first, again, other = trajectory(3), trajectory(3), trajectory(4)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert first[1] != other[1]


def test_the_faces_agree_in_double_precision_over_the_end_of_an_episode():
    options = {**SHORT, "dtype": "float64"}
    n_steps, seed = 9, 11
    moves = actions(n_steps, 2, 4)
    vector = population(2, dtype="float64")
    singles = [single(**options) for _ in range(2)]
    row = ShardRow(ID, 2, options, n_workers=0)
    with row:
        sb3 = ShardVecEnv(row)
        sb3.seed(seed)
        now = vector.reset(seed=seed)[0]
        np.testing.assert_allclose(sb3.reset(), now, atol=1e-9)
        starts = [env.reset(seed=seed + i)[0] for i, env in enumerate(singles)]
        np.testing.assert_allclose(np.stack(starts), now, atol=1e-9)
        ends = 0
        for move in moves:
            now, reward, terminated, truncated, infos = vector.step(move)
            sb3_now, sb3_reward, sb3_done, sb3_infos = sb3.step(move)
            np.testing.assert_allclose(sb3_now, now, atol=1e-9)
            np.testing.assert_allclose(sb3_reward, reward.astype(np.float32), atol=1e-9)
            assert sb3_done.tolist() == terminated.tolist()
            assert not truncated.any()
            for i, env in enumerate(singles):
                seen, earned, ended, _, info = env.step(move[i])
                assert ended == terminated[i]
                assert earned == pytest.approx(reward[i], abs=1e-9)
                assert info["probe_loss"] == pytest.approx(infos["probe_loss"][i], abs=1e-9)
                assert info["knob/dropout"] == pytest.approx(sb3_infos[i]["knob/dropout"], abs=1e-9)
                if ended:
                    ends += 1
                    np.testing.assert_allclose(infos["final_obs"][i], seen, atol=1e-9)
                    terminal = sb3_infos[i]["terminal_observation"]
                    np.testing.assert_allclose(terminal, seen, atol=1e-9)
                    assert sb3_infos[i]["TimeLimit.truncated"] is False
                    seen = env.reset()[0]
                np.testing.assert_allclose(now[i], seen, atol=1e-9)
    assert ends == 2


def test_a_returned_array_is_never_written_to_again():
    env = toys(2)
    returned = [env.reset(seed=1)]
    kept = copy.deepcopy(returned)
    for action in actions(10, 2, 2):
        returned.append(env.step(action))
        kept.append(copy.deepcopy(returned[-1]))
    for left, right in zip(returned, kept, strict=True):
        for a, b in zip(left[:-1], right[:-1], strict=True):
            np.testing.assert_array_equal(a, b)
        for name in left[-1].keys() - {"final_info"}:
            for a, b in zip(left[-1][name], right[-1][name], strict=True):
                np.testing.assert_array_equal(a, b)


def test_the_last_observation_of_an_episode_is_kept_and_the_next_one_has_begun():
    env = toys(2)
    env.reset(seed=1)
    for step in range(8):
        now, _, terminated, _, infos = env.step(np.zeros((2, 2)))
        assert terminated.tolist() == [step == 7] * 2
        assert ("final_obs" in infos) == (step == 7)
    progress = env.loop.codec.names.index("signal/progress")
    assert [final[progress] for final in infos["final_obs"]] == [1, 1]
    assert now[:, progress].tolist() == [-1, -1]
    assert infos["_final_obs"].tolist() == [True, True]


def test_successive_episodes_of_a_seed_are_different_runs():
    env = TrainingRunEnv(ToyPlant(1), ControlConfig(n_control_steps=2, random_start=1.0))
    starts = [env.reset(seed=5)[0], env.reset()[0], env.reset(seed=5)[0]]
    assert not np.array_equal(starts[0], starts[1])
    np.testing.assert_array_equal(starts[0], starts[2])


def test_the_test_split_is_never_evaluated_while_an_episode_lasts():
    env = toys(2)
    env.reset(seed=1)
    for action in actions(10, 2, 2):
        env.step(action)
    assert set(env.loop.run.evaluated) == {"probe"}


def test_no_info_and_no_observation_holds_the_test_loss():
    env = single(**SHORT)
    env.reset(seed=1)
    assert not [name for name in env.loop.codec.names if "test" in name]
    seen, _, _, _, info = env.step(np.zeros(4))
    test_loss = env.loop.run.evaluate("test")[0]
    assert not [name for name in info if "test" in name]
    numbers = [*info.values(), *seen.tolist()]
    assert not np.isclose(numbers, test_loss, rtol=1e-9, atol=0).any()
    assert info["probe_loss"] == env.loop.run.evaluate("probe")[0]


def test_a_run_that_diverges_is_terminated_and_its_neighbour_goes_on_undisturbed():
    def trajectory(diverge_above):
        env = toys(2, diverge_above=diverge_above)
        env.reset(seed=3)
        move = np.array([[1.0, 0.0], [0.0, 0.0]])
        return env, [env.step(move) for _ in range(5)]

    env, steps = trajectory(0.9)
    _, calm = trajectory(np.inf)
    first = next(i for i, step in enumerate(steps) if step[2][0])
    assert not steps[first][2][1]
    assert steps[first][4]["diverged"].tolist() == [True, False]
    last = steps[first][4]["final_obs"][0]
    assert env.single_observation_space.contains(last)
    assert steps[first][1][0] < -1
    for left, right in zip(steps, calm, strict=True):
        assert env.observation_space.contains(left[0])
        assert np.isfinite(left[1]).all()
        np.testing.assert_array_equal(left[0][1], right[0][1])
        assert left[1][1] == right[1][1]


def test_after_a_divergence_all_begin_together_again_on_the_same_episodes():
    env = toys(3, diverge_above=0.95, n_control_steps=8)
    drawn = []
    env.loop.run.draw_horizon = drawn.append
    env.reset(seed=[5, 5, 5])
    up = np.array([[0.0, 0], [1, 0], [0, 0]])
    ended = []
    for step in range(24):
        _, _, terminated, truncated, infos = env.step(up if step == 0 else 0 * up)
        ended.append((terminated.tolist(), truncated.tolist()))
        assert not (terminated & truncated).any()
        if truncated.any():
            assert infos["final_obs"][1].shape == env.single_observation_space.shape
    assert [i for i in range(8) if any(ended[i][0])] == [0, 7]
    assert ended[0] == ([False, True, False], [False] * 3)
    assert ended[7] == ([True, False, True], [False, True, False])
    assert ended[15] == ended[23] == ([True] * 3, [False] * 3)
    assert len(drawn) == 4  # at the reset and at every common end
    assert len(set(env._episodes.tolist())) == 1
    assert len(set(env.loop.start_loss.tolist())) == 1  # the same episode again


def test_all_are_together_again_also_where_the_last_step_is_a_divergence():
    env = toys(3, diverge_above=0.95, n_control_steps=8)
    env.reset(seed=[5, 5, 5])
    up = np.array([[1.0, 0], [0, 0], [0, 0]])
    ended = [env.step(up if step in (2, 3, 7) else 0 * up)[2:4] for step in range(8)]
    assert ended[7][0].all() and not ended[7][1].any()  # none was truncated
    assert len(set(env._episodes.tolist())) == 1
    assert len(set(env.loop.start_loss.tolist())) == 1


def test_a_transformer_that_diverges_is_terminated_inside_the_observation_space():
    env = population(2, learning_rate=1e30)
    env.reset(seed=0)
    _, reward, terminated, truncated, infos = env.step(np.zeros((2, 4)))
    assert terminated.all()
    assert not truncated.any()
    assert infos["diverged"].all()
    assert (reward < -2).all()
    for final in infos["final_obs"]:
        assert env.single_observation_space.contains(final)


def test_actions_that_are_no_numbers_or_out_of_range_leave_an_episode_sound():
    env = toys(2)
    env.reset(seed=0)
    before = env.loop.positions.copy()
    seen, reward, *_ = env.step(np.array([[np.nan, np.inf], [0.0, -1e9]]))
    assert env.loop.positions[0, 0] == before[0, 0]
    assert env.observation_space.contains(seen)
    assert np.isfinite(reward).all()


@pytest.mark.parametrize("shape", [(), (2,), (2, 1), (1, 2), (3, 2), (2, 2, 1)])
def test_actions_of_another_shape_are_refused_and_change_nothing(shape):
    env = toys(2)
    env.reset(seed=0)
    before = env.loop.positions.copy()
    with pytest.raises(ValueError, match=r"actions must be of shape \(2, 2\) \(runs, knobs\), got"):
        env.step(np.zeros(shape))
    np.testing.assert_array_equal(env.loop.positions, before)
    env.step(np.zeros((2, 2)))
    env.reset()


def test_frozen_knobs_do_not_move_and_are_observed_as_unavailable():
    env = toys(16, freeze=0.5)
    seen = env.reset(seed=0)[0]
    available = np.stack(
        [env.loop.codec.read(seen, f"knob/{name}/available") for name in ("rate", "width")], axis=1
    )
    assert 0.1 < available.mean() < 0.9
    assert available.any(axis=1).all()
    before = env.loop.positions.copy()
    env.step(np.full((16, 2), -0.5))
    np.testing.assert_array_equal(env.loop.positions != before, available == 1)


def test_freezing_everything_still_leaves_every_run_one_knob():
    env = toys(8, freeze=1.0)
    env.reset(seed=0)
    assert env.loop.available.sum(axis=1).tolist() == [1] * 8


def test_hidden_signal_groups_are_observed_as_not_measured_for_a_whole_episode():
    plain, env = toys(16), toys(16, hide=0.5)
    plain.reset(seed=0), env.reset(seed=0)
    loop = env.loop
    assert 0.2 < loop.visible.mean() < 0.8
    probe = GROUPS.index("probe_loss")
    for _ in range(3):
        still = np.zeros((16, 2))
        seen, reward = env.step(still)[:2]
        full, own_reward = plain.step(still)[:2]
        np.testing.assert_array_equal(reward, own_reward)  # what it is worth does not change
        flags = np.stack([loop.codec.read(seen, f"has/{group}") for group in GROUPS], axis=1)
        all_flags = [loop.codec.read(full, f"has/{group}") for group in GROUPS]
        np.testing.assert_array_equal(flags, np.stack(all_flags, axis=1) * loop.visible)
        level = loop.codec.read(seen, "signal/probe_level")
        expected = loop.codec.read(full, "signal/probe_level") * loop.visible[:, probe]
        np.testing.assert_array_equal(level, expected)
        assert (expected != 0).any()


@pytest.mark.parametrize(("share", "moved"), [(0.0, 0), (1.0, 8)])
def test_episodes_begin_at_the_defaults_unless_told_otherwise(share, moved):
    env = toys(8, random_start=share)
    env.reset(seed=0)
    assert (env.loop.positions != env.loop.knobs.default_positions(8)).any(axis=1).sum() == moved


def test_a_run_at_its_defaults_is_bit_for_bit_a_run_without_an_environment():
    env = single()
    env.reset(seed=3)
    for _ in range(20):
        env.step(np.zeros(4, dtype=np.float32))
    episode = single().loop.draw_episode(3, 0)
    plain = build_run(1, {"horizon": 40, "context": 16})
    plain.reset([0], [plain.sample_task(episode.task_seed)], [episode.run_seed])
    plain.advance(40)
    left, right = env.loop.run.state_dict([0]), plain.state_dict([0])
    assert left.keys() == right.keys()
    for name in left:
        if name == "flops":  # added up in another order
            np.testing.assert_allclose(left[name], right[name])
            continue
        np.testing.assert_array_equal(left[name].numpy(), right[name].numpy(), err_msg=name)
    assert env.loop.run.evaluate("test") == plain.evaluate("test")


def test_episodes_played_side_by_side_have_consecutive_task_seeds():
    """What task families spread over consecutive seeds is then spread over every update."""
    loop = toys(1).loop
    for index in (0, 1, 5):
        seeds = [loop.draw_episode(seed, index).task_seed for seed in range(70, 78)]
        assert seeds == list(range(seeds[0], seeds[0] + 8))
    assert abs(loop.draw_episode(70, 0).task_seed - loop.draw_episode(70, 1).task_seed) > 1000
    runs = {loop.draw_episode(seed, 0).run_seed for seed in range(70, 78)}
    assert len(runs) == 8


@pytest.mark.parametrize("make", [population, lambda n: toys(n, random_start=0.5, freeze=0.3)])
def test_a_population_resumes_bit_for_bit_from_its_state(make):
    env, n_knobs = make(2), make(2).single_action_space.shape[0]
    moves = actions(10, 2, n_knobs)
    env.reset(seed=5)
    for move in moves[:4]:
        env.step(move)
    state = copy.deepcopy(env.state_dict())
    other = make(2)
    other.reset(seed=77)
    other.step(moves[0])
    other.load_state_dict(state)
    for move in moves[4:]:
        expected, found = env.step(move), other.step(move)
        for left, right in zip(expected[:4], found[:4], strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("make", [single, lambda **options: population(2, **options)])
def test_more_decisions_than_optimizer_steps_are_refused(make):
    with pytest.raises(ValueError, match=r"at least n_control_steps=50 optimizer steps, got 40"):
        make(horizon=40, n_control_steps=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_control_steps": 0}, "n_control_steps must be at least 1, got 0"),
        ({"hide": -0.1}, r"hide must be in \[0, 1\], got -0.1"),
        ({"freeze": 1.5}, r"freeze must be in \[0, 1\], got 1.5"),
        ({"random_start": -0.1}, r"random_start must be in \[0, 1\], got -0.1"),
        ({"reward_scale": 0.0}, "reward scale must be above 0 nats, got 0"),
    ],
)
def test_options_of_control_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gymnasium.make_vec(TOY, num_envs=2, **options)


def test_an_unknown_split_is_refused_with_the_known_ones():
    env = single(split="meta_tset")
    with pytest.raises(
        ValueError, match=r"Unknown split 'meta_tset'\. Known: meta_train, meta_test"
    ):
        env.reset(seed=0)


def test_a_scalar_environment_needs_a_plant_of_one_run():
    with pytest.raises(ValueError, match="n_runs=1, got 2"):
        TrainingRunEnv(ToyPlant(2), ControlConfig())


def test_seeds_of_a_population_can_be_given_one_by_one_and_must_be_as_many_as_runs():
    env = toys(2)
    together = env.reset(seed=[8, 3])[0]
    np.testing.assert_array_equal(together[0], toys(1).reset(seed=8)[0][0])
    np.testing.assert_array_equal(together[1], toys(1).reset(seed=3)[0][0])
    with pytest.raises(ValueError, match="needs 2 seeds, got 3"):
        env.reset(seed=[1, 2, 3])


def test_a_horizon_that_the_decisions_do_not_divide_is_rounded_to_one_that_they_do():
    loop = ControlLoop(ToyPlant(1, horizon=43), ControlConfig(n_control_steps=10))
    assert (loop.run.horizon, loop.optimizer_steps) == (40, 4)


def test_closing_an_environment_closes_its_plant():
    for env in (toys(2), TrainingRunEnv(ToyPlant(1), ControlConfig(n_control_steps=4))):
        env.close()
        assert env.loop.run.closed


def test_without_a_seed_runs_are_unlike_and_with_one_they_are_not():
    def starts(make, seed=None):
        env = make()
        env.reset(seed=seed)
        return env.loop.run_seeds.tolist()

    for make in (lambda: toys(2), lambda: TrainingRunEnv(ToyPlant(1), ControlConfig())):
        assert starts(make) != starts(make)
        assert starts(make, 3) == starts(make, 3)
    assert starts(lambda: toys(2), np.int64(3)) == starts(lambda: toys(2), 3)


def test_a_state_of_runs_on_other_data_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"abcdefgh" * 2_000)
    state = population(2, data=str(text)).state_dict()
    population(2, data=str(text)).load_state_dict(state)
    text.write_bytes(b"x" + b"abcdefgh" * 2_000)
    with pytest.raises(ValueError, match=r"the data that runs learn on has changed: its SHA-256"):
        population(2, data=str(text)).load_state_dict(state)


def test_a_seed_that_is_none_is_none_of_the_others():
    def starts(seeds):
        env = toys(2)
        env.reset(seed=seeds)
        return env.loop.run_seeds.tolist()

    assert starts([None, None]) != starts([None, None])
    alone, given = starts([None, 0])
    assert alone != given
    assert given == starts([0, None])[0] == starts(0)[0]


def test_the_random_numbers_of_a_population_are_those_of_its_seed():
    one, other = toys(2), toys(2)
    for env in (one, other):
        env.reset(seed=5)
    assert one.np_random.random() == other.np_random.random()
    assert one.np_random_seed == 5


def test_a_step_before_reset_is_refused():
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset comes before step"):
        toys(2).step(np.zeros((2, 2), dtype=np.float32))


def test_there_are_no_pictures_of_training_runs():
    with pytest.raises(ValueError, match="render_mode must be None, got 'human'"):
        single(render_mode="human")
    with pytest.raises(ValueError, match="render_mode must be None, got 'human'"):
        population(2, render_mode="human")


def test_stable_baselines3_makes_the_environment_by_its_id():
    from stable_baselines3.common.env_util import make_vec_env

    env = make_vec_env(ID, n_envs=1, seed=0, env_kwargs=SHORT)  # asks for pictures at first
    assert env.reset().shape == (1, *single().observation_space.shape)
    env.close()


def test_an_episode_is_a_whole_run_and_not_cut_short():
    with pytest.raises(ValueError, match="max_episode_steps must be None, got 3"):
        population(2, max_episode_steps=3)


def test_a_single_environment_does_not_step_before_reset_nor_after_the_end():
    env = single(**SHORT)
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset comes before step"):
        env.step(env.action_space.sample())
    env.reset(seed=0)
    ended = [env.step(np.zeros(4, dtype=np.float32))[2] for _ in range(6)]
    assert ended == [False] * 5 + [True]
    with pytest.raises(gymnasium.error.ResetNeeded, match="after a run that has ended"):
        env.step(np.zeros(4, dtype=np.float32))


@pytest.mark.parametrize("programs", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_in_mid_run_goes_on_as_the_original_and_apart_from_it(how, programs, monkeypatch):
    def losses(env, moves):
        return [env.step(move)[4]["train_loss"] for move in moves]

    def closed_over(compute):  # as a compiled program is
        return lambda *arguments: compute(*arguments)

    for module in ("envs.transformer_run", "envs.adamw"):
        monkeypatch.setattr(f"{module}.fused", closed_over)
    env = single(**SHORT, compile=programs)
    moves = actions(6, 4)
    env.reset(seed=0)
    losses(env, moves[:2])
    twin = copy.deepcopy(env) if how == "deepcopy" else pickle.loads(pickle.dumps(env))
    ahead = losses(twin, moves[2:])
    assert ahead == losses(env, moves[2:])
    assert len(set(ahead)) == 4  # it learns
    env.reset(seed=1)
    twin.reset(seed=1)
    assert losses(twin, moves[:2]) == losses(env, moves[:2])
