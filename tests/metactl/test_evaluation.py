"""The arms of an evaluation and what is made of their results."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from toy_plant import DEFAULT, TOY, ToyPlant
from toy_plant import N_DECISIONS as N

from metactl.config import ConfigError
from metactl.controllers import BaseController, Learned, Plateau, Schedule, WithSignalsOf
from metactl.env import ControlLoop
from metactl.episodes import ControlConfig
from metactl.evaluation import (
    EvaluationPlan,
    Where,
    evaluate,
    headroom,
    paired_episodes,
    play_arms,
    static_arm,
    summarise,
)
from metactl.evaluation.arms import (
    Arm,
    knob_arms,
    known_of_tasks,
    random_arm,
    replay_arm,
    static_grid,
    yoked_arm,
)
from metactl.evaluation.disturbed import disturbed_summary
from metactl.evaluation.headroom import per_task_best
from metactl.evaluation.search import (
    Search,
    best_linear_policy,
    best_schedule,
    best_told_schedule,
)
from metactl.evaluation.selection import chosen_beforehand, chosen_here
from metactl.evaluation.summary import (
    break_even,
    by_epochs,
    cost_to_reach,
    moves_explained_by_progress,
)
from metactl.homeostasis import SetPoints
from metactl.policy import Policy, PolicyCard
from metactl.report import draw_runs, gap_sentence
from metactl.rollout import BestCheckpoint, PlannedRun, play
from metactl.shards import ShardRow
from metactl.statistics import gap_closed, interquartile_mean, paired_difference, worst_decile


class Follow(BaseController):
    """Moves the rate up where the train loss slopes steeply: a policy that uses its signals."""

    def act(self, observation):
        slope = self.codec.read(observation, "signal/train_slope_fast")
        return np.stack((np.tanh(-slope), np.zeros_like(slope)), axis=1)


def result(shards, seed=0, **changes):
    played = play_arms(shards, [static_arm("one", DEFAULT)], 1, seed)["one"][0]
    return replace(played, **changes)


def resting_policy(about, bias=0.0):
    """A linear policy that sees nothing: a constant move of every knob."""
    n = len(about.observation_names)
    card = PolicyCard(
        format_version=1,
        metactl_version="0",
        knobs=about.knobs.knobs,
        observations=about.observation_names,
        hidden=(),
        n_control_steps=N,
    )
    weights = {"weight_0": np.zeros((2, n)), "bias_0": np.full(2, bias)}
    return Policy(card, {"mean": np.zeros(n), "std": np.ones(n), **weights})


# Arms --------------------------------------------------------------------------------------------


def test_arms_of_one_task_differ_by_what_moves_their_knobs_alone(shards):
    arms = [static_arm("a", DEFAULT), static_arm("b", DEFAULT), static_arm("c", np.zeros(2))]
    played = play_arms(shards, arms, 3, 0)
    for a, b, c in zip(*played.values(), strict=True):
        np.testing.assert_array_equal(a.probe_loss, b.probe_loss)
        assert a.probe_loss[0] == c.probe_loss[0] and a.final_test != c.final_test
    assert len({run.probe_loss[0] for run in played["a"]}) == 3


def test_a_controller_for_each_task_plays_its_own(shards):
    targets = [Schedule(np.array([0.0, 1.0]), np.full((2, 2), x)) for x in (0.1, 0.9)]
    played = play_arms(shards, [Arm(name="a", positions=DEFAULT, controllers=targets)], 2, 0)["a"]
    assert [run.positions[-1, 0] for run in played] == pytest.approx([0.1, 0.9])


def test_playing_leaves_an_arm_as_it_was(shards):
    arm = Arm(name="a", positions=DEFAULT, controllers=(Plateau("rate", patience=0),))
    before = pickle.dumps(arm)
    assert np.ptp(play_arms(shards, [arm], 2, 0)["a"][0].positions) > 0
    assert pickle.dumps(arm) == before


def test_random_moves_differ_from_task_to_task_and_come_again_with_the_seed(shards):
    first, again = (
        play_arms(shards, [random_arm(DEFAULT, 3, 5)], 3, 0)["random moves"] for _ in range(2)
    )
    ends = [run.positions[-1, 0] for run in first]
    assert len(set(ends)) == 3 and ends == [run.positions[-1, 0] for run in again]


def test_yoked_runs_make_the_moves_of_the_same_tasks_other_run(shards):
    own = Arm(name="own", positions=DEFAULT, controllers=(Follow(),))
    other = replace(own, name="other", other_seed=True)
    played = play_arms(shards, [own, other], 3, 0)
    for mine, theirs in zip(played["own"], played["other"], strict=True):
        assert mine.probe_loss[0] == theirs.probe_loss[0]  # the task is the same
        assert not np.array_equal(mine.positions, theirs.positions)
    yoked = play_arms(shards, [yoked_arm(played["other"], DEFAULT)], 3, 0)["yoked"]
    for mine, theirs in zip(yoked, played["other"], strict=True):
        np.testing.assert_allclose(mine.positions, theirs.positions, atol=1e-6)


def test_replay_makes_the_mean_moves_in_every_task(shards):
    own = Arm(name="own", positions=DEFAULT, controllers=(Follow(),))
    played = play_arms(shards, [own], 3, 0)["own"]
    replayed = play_arms(shards, [replay_arm(played, DEFAULT)], 3, 0)["replay"]
    mean = np.mean([run.positions for run in played], axis=0)
    for run in replayed:
        np.testing.assert_allclose(run.positions, mean, atol=1e-6)


def test_a_knob_that_an_arm_leaves_out_stays_where_it_was(shards):
    about = shards.describe()
    arms = knob_arms(resting_policy(about, bias=0.5), about.knobs, DEFAULT)
    assert [arm.name for arm in arms] == [
        f"policy, {label}"
        for label in ("rate alone", "without rate", "width alone", "without width")
    ]
    for arm, moving in zip(arms, (0, 1, 1, 0), strict=True):
        moved = np.ptp(play_arms(shards, [arm], 1, 0)[arm.name][0].positions, axis=0) > 0
        assert moved.tolist() == [i == moving for i in range(2)]


def settings_played(shards, losses, *, best=None, epochs=None):
    """Runs of each setting with these probe losses at the end, and with these at their lowest."""
    one, names = result(shards), shards.describe().observation_names
    found = {}
    for setting, at_end in losses.items():
        runs = []
        for i, loss in enumerate(at_end):
            lowest = loss if best is None else best[setting][i]
            seen = one.observations.copy()
            if epochs is not None:
                seen[:, names.index("has/unique_tokens")] = 1
                seen[:, names.index("signal/epochs")] = np.log10(1 + epochs[i])
            changes = {"final_probe": loss, "best_probe": lowest, "best_test": 10 + lowest}
            runs.append(
                replace(one, arm=setting, observations=seen, final_test=5 + loss, **changes)
            )
        found[setting] = runs
    return found


def test_settings_are_chosen_beforehand_for_all_tasks_and_by_what_is_known_of_each(shards):
    def played(known):  # "low" is best on large data, "high" on small, "middle" on average
        by = {"low": lambda x: 2 + x, "high": lambda x: 2 - x, "middle": lambda x: 1.9 + x / 9}
        return settings_played(shards, {k: [loss(x) for x in known] for k, loss in by.items()})

    there, here = np.linspace(-1, 1, 32), np.array([0.9, -5.0, 0.01, -0.9])
    chosen = chosen_beforehand(played(there), there[:, None], played(here), here[:, None])
    assert [r.arm for r in chosen["best static of training tasks"]] == ["middle"] * 4
    told = [run.arm for run in chosen["the same, told the task"]]
    assert told == ["high", "low", "middle", "low"]
    noise = np.random.default_rng(0).normal(0, 1e3, (36, 1))  # of another unit, and of no use
    both = np.concatenate((np.concatenate((there, here))[:, None], noise), axis=1)
    chosen = chosen_beforehand(played(there), both[:32], played([0.9, -0.9]), both[[31, 0]])
    assert [run.arm for run in chosen["the same, told the task"]] == ["high", "low"]
    alike, other = np.ones((32, 1)), np.full((2, 1), 1.5)  # nothing that could tell them apart
    chosen = chosen_beforehand(played(there), alike, played([0.9, -0.9]), other)
    assert len({run.arm for run in chosen["the same, told the task"]}) == 1
    nothing = chosen_beforehand(played(there), np.zeros((32, 0)), played(here), np.zeros((4, 0)))
    assert list(nothing) == ["best static of training tasks"]


def test_a_setting_is_chosen_for_the_end_and_for_the_best_checkpoint(shards):
    ends = {"a": [2.0, 2.0], "b": [3.0, 1.2], "c": [2.5, 2.5]}
    lows = {"a": [2.0, 2.0], "b": [1.9, 1.1], "c": [1.0, 1.3]}
    names = shards.describe().observation_names
    played = settings_played(shards, ends, best=lows)
    found = chosen_here({**played, "policy": played["a"]}, ["a", "b", "c"], [], names)
    assert set(found) == {"default", "best static", "per-task best static", "policy"}
    figures = {
        arm: [(round(r.final_test - 5, 3), round(r.best_test - 10, 3)) for r in runs]
        for arm, runs in found.items()
    }
    assert figures["best static"] == [(2.0, 1.0), (2.0, 1.3)]  # a at the end, c before it
    assert figures["per-task best static"] == [(2.0, 1.0), (1.2, 1.1)]
    assert figures["default"] == [(2.0, 2.0), (2.0, 2.0)]


def test_a_setting_is_chosen_for_runs_that_see_their_data_as_often(shards):
    ends = {"a": [1.0, 1.2, 3.0, 3.0], "b": [2.0, 2.0, 2.0, 2.0]}
    names = shards.describe().observation_names
    played = settings_played(shards, ends, epochs=[0.2, 0.9, 12, 30])
    found = chosen_here({**played, "policy": played["a"]}, ["a"], ["b"], names)
    assert [run.arm for run in found["best static by epochs"]] == ["a", "a", "b", "b"]
    assert [run.arm for run in found["best static"]] == ["b"] * 4
    assert [run.arm for run in found["best static of the grid"]] == ["a"] * 4
    minus = [group["policy_minus"]["best static by epochs"] for group in by_epochs(found, names)]
    assert [each["estimate"] for each in minus] == [0.0, 1.0]


def test_what_is_known_of_a_task_is_known_of_its_runs():
    shape = {"d_model": 8, "n_layers": 1, "context": 8, "horizon": 8, "knobs": ["dropout"]}
    ranges = {"unique_bytes": [1_500, 1_000_000], "learning_rate": [0.002, 0.032]}
    with ShardRow(
        "envs:AdaptiveTransformer-v0", 8, {**shape, **ranges, "n_control_steps": 4}, 0
    ) as row:
        names = row.describe().observation_names
        arms = [static_arm("a", np.array([0.5]))]
        arms.append(replace(arms[0], name="b", other_seed=True))
        played, known = play_arms(row, arms, 8, 0), known_of_tasks(row, 8, 0)
        peaks = row._local.env.loop.run._rows["peak"].numpy().copy()  # those of b ran last
    assert known.shape == (8, 2)
    np.testing.assert_allclose(10 ** known[:, 1], peaks)  # another run of a task has its rate
    assert np.ptp(known[:, 1]) > 0.3
    for runs in played.values():
        pressure = [run.observations[1, names.index("signal/data_pressure")] for run in runs]
        assert np.corrcoef(pressure, known[:, 0])[0, 1] < -0.99
    assert played["a"][0].final_test != played["b"][0].final_test


def test_signals_of_another_run_are_what_the_controller_acts_on(shards):
    own = Arm(name="own", positions=DEFAULT, controllers=(Follow(),))
    played = play_arms(shards, [own], 3, 0)["own"]
    swapped = Arm(
        name="swapped",
        positions=DEFAULT,
        controllers=[
            WithSignalsOf(Follow(), ["signal/train_slope_fast"], played[(i + 1) % 3].observations)
            for i in range(3)
        ],
    )
    moved = play_arms(shards, [swapped], 3, 0)["swapped"]
    for i, run in enumerate(moved):
        theirs = played[(i + 1) % 3]
        np.testing.assert_allclose(run.positions, theirs.positions, atol=1e-6)
        assert run.final_test != theirs.final_test


def test_a_resumed_swap_goes_on_where_it_was():
    loop = ControlLoop(ToyPlant(1), ControlConfig(n_control_steps=N))
    recorded = np.random.default_rng(0).normal(size=(N, len(loop.codec)))
    left, right = (WithSignalsOf(Follow(), ["signal/train_slope_fast"], recorded) for _ in range(2))
    observation = np.zeros((1, len(loop.codec)))
    left.begin(loop.codec, 1)
    right.begin(loop.codec, 1)
    left.act(observation)
    right.load_state_dict(left.state_dict())
    assert np.array_equal(left.act(observation), right.act(observation))


def test_a_grid_begins_with_the_default_and_fills_the_space():
    loop = ControlLoop(ToyPlant(1), ControlConfig(n_control_steps=N))
    points = static_grid(loop.knobs, 17)
    assert np.array_equal(points[0], loop.knobs.default_positions(1)[0])
    corners = {tuple((point > 0.5).tolist()) for point in points[1:]}
    assert len(points) == 17 and len(corners) == 4


# Room for gain -----------------------------------------------------------------------------------


def test_where_the_best_rate_drifts_the_room_is_in_schedules_alone():
    options = {"n_control_steps": N, "split": "meta_test"}
    where = Where(env_id=TOY, options=options, n_envs=8, n_workers=0)
    found = headroom(where, n_tasks=6, grid_points=5, schedule_runs=200)
    assert found["knobs"]["rate"]["best_value"] == 0.5
    assert found["knobs"]["rate"]["best value minus default"]["estimate"] == 0
    assert found["best schedule minus best static"]["high"] < 0
    width = found["knobs"]["width"]  # moves nothing
    assert width["best value minus default"]["estimate"] == 0
    assert width["per-task best minus best value"]["estimate"] == 0
    assert found["settings"] == 5 + 2 * 5


def test_the_best_for_each_task_is_chosen_on_one_run_and_scored_on_another(shards):
    def runs(*losses):
        return [result(shards, final_probe=p, final_test=t) for p, t in losses]

    chosen_on = {"a": runs((1, 0), (4, 0)), "b": runs((2, 0), (3, 0))}
    scored_on = {"a": runs((9, 10), (0, 20)), "b": runs((0, 30), (9, 40))}
    assert per_task_best(chosen_on, scored_on, ["a", "b"]).tolist() == [10, 40]


@pytest.mark.parametrize("n_workers", [0, 1])
def test_runs_that_cannot_be_disturbed_are_named_from_workers_too(shards, n_workers):
    where = Where(env_id=TOY, options={"n_control_steps": N}, n_envs=2, n_workers=n_workers)
    plan = EvaluationPlan(n_tasks=2, grid_points=1, disturbed=True)
    with pytest.raises(ConfigError, match="cannot be disturbed: they have no option 'disturb'"):
        evaluate(resting_policy(shards.describe()), where, plan)


def test_an_environment_without_the_option_is_named():
    with pytest.raises(ConfigError, match=r"Toy.*task"):
        Where(env_id=TOY, options={"task": "text"}, n_envs=2, n_workers=0).open()


# Figures -----------------------------------------------------------------------------------------


def test_moves_of_a_schedule_are_explained_by_progress_and_random_ones_are_not(shards):
    schedule = Schedule(np.array([0.0, 0.3, 1.0]), np.array([[0.5, 0.5], [1, 0.5], [0, 0.5]]))
    arms = [
        Arm(name="schedule", positions=DEFAULT, controllers=(schedule,)),
        random_arm(DEFAULT, 40, 0),
    ]
    played = play_arms(shards, arms, 40, 0)
    explained = moves_explained_by_progress(played["schedule"])
    assert explained == pytest.approx([1.0, 0.0])
    assert moves_explained_by_progress(played["random moves"]).max() < 0.1


def test_what_it_costs_to_reach_the_others_final_loss(shards):
    curve = np.array([4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.5, 1.5, 1.5])
    spent = np.array([1.0, 2, 3, 5, 7, 9, 11, 13])
    policy = [result(shards, probe_loss=curve, flops=spent)] * 3

    def ending(loss, reached):  # there for the first time, and again at the end
        course = np.full(N + 1, 9.5)
        course[[reached, -1]] = loss
        return result(shards, probe_loss=course, final_probe=loss, flops=2 * spent)

    def cost(ours, theirs):
        found = cost_to_reach(ours, theirs)
        shares = (f"share_of_{what}_to_its_final_loss" for what in ("run", "flops"))
        return *(found[share] for share in shares), found["saved_share_of_run"]["estimate"]

    ends = [ending(3.0, 8), ending(1.5, 7), ending(1.0, 8)]
    assert cost(policy[:1], ends[:1]) == (2 / 8, 2 / 26, 6 / 8)
    assert cost(policy[:1], ends[2:]) == (2.0, 2.0, -1.0)
    assert cost(policy, ends) == pytest.approx((5 / 8, 7 / 26, (6 / 8 + 2 / 8 - 1) / 3))
    uncounted = [replace(run, flops=np.full(N, np.nan)) for run in ends]
    assert cost(policy, uncounted)[:2] == (5 / 8, None)
    assert cost(policy[:1], [ending(9.0, 3)]) == (0.0, 0.0, 3 / 8)


def test_a_training_is_paid_for_by_what_runs_save():
    saved = {"slow": 0.4, "level": 0.0, "better": -1.0}
    minus = {arm: {"saved_share_of_run": {"estimate": share}} for arm, share in saved.items()}
    assert break_even({"policy_minus": minus}, 100) == {"slow": 250, "level": None, "better": None}


@pytest.mark.parametrize(("n", "least"), [(4, 0.88), (8, 0.91), (32, 0.93)])
def test_an_interval_holds_the_mean_about_as_often_as_it_says(n, least):
    rng = np.random.default_rng(n)
    found = [paired_difference(rng.normal(1.0, 1.0, n), np.zeros(n)) for _ in range(400)]
    assert least < np.mean([each.low <= 1.0 <= each.high for each in found]) <= 0.98


def test_of_one_task_there_is_no_interval():
    one = (np.array([1.0]), np.array([3.0]), np.array([2.0]))
    interval = gap_closed(*one)
    assert (interval.estimate, interval.low, interval.high) == (2.0, -np.inf, np.inf)


def test_a_report_of_nothing_is_no_best_checkpoint():
    loop = ControlLoop(ToyPlant(2), ControlConfig(n_control_steps=N))
    best = BestCheckpoint(loop)
    best.update(np.array([0.0, 0.5]))
    assert best.loss.tolist() == [loop.start_loss[0], min(0.5, loop.start_loss[1])]


def test_regret_of_the_worst_tenth_and_the_middle_half():
    values = np.array([9.0, *range(1, 20)])
    assert worst_decile(values) == pytest.approx(18.5)
    assert interquartile_mean(np.array([0.0, 1, 2, 3, 4, 5, 6, 100])) == pytest.approx(3.5)
    assert interquartile_mean(np.array([0.0, 10.0, 1000.0])) == pytest.approx(
        (0.25 * 0 + 10 + 0.25 * 1000) / 1.5
    )
    assert interquartile_mean(np.array([7.0])) == 7.0


def test_a_summary_pairs_the_policy_with_every_arm(shards):
    policy = [result(shards, seed, final_test=1.0 + seed) for seed in range(4)]
    other = [replace(run, final_test=run.final_test + 0.5) for run in policy]
    summary = summarise({"policy": policy, "other": other})
    difference = summary["policy_minus"]["other"]
    assert difference["final_test"] == pytest.approx({"estimate": -0.5, "low": -0.5, "high": -0.5})
    assert difference["probability_of_improvement"] == 1
    assert difference["worst_decile_regret"] == pytest.approx(4 / 4.5 - 1)
    assert summary["arms"]["policy"]["final_test_iqm"] == pytest.approx(2.5)


def test_differences_are_grouped_by_how_often_runs_saw_their_data(shards):
    names = shards.describe().observation_names
    entries = [names.index(name) for name in ("has/unique_tokens", "signal/epochs")]
    one = result(shards)

    def run(epochs, known, loss):
        seen = one.observations.copy()
        seen[:, entries] = 0
        seen[1:, entries] = known, np.log10(1 + epochs)
        return replace(one, observations=seen, final_test=loss)

    epochs, known = [0.3, 0.9, 3.0, 40.0, 500.0], [1, 1, 1, 1, 0]
    policy = [run(e, k, 2.0) for e, k in zip(epochs, known, strict=True)]
    other = [replace(run, final_test=2.0 + i) for i, run in enumerate(policy)]
    groups = by_epochs({"policy": policy, "other": other}, names)
    found = [
        (g["from"], g["to"], g["n_tasks"], g["policy_minus"]["other"]["estimate"]) for g in groups
    ]
    assert found == [(0, 1, 2, -0.5), (1, 10, 1, -2.0), (10, None, 1, -3.0)]
    assert by_epochs({"policy": policy[-1:], "other": other[-1:]}, names) == []


def test_excess_area_is_between_a_disturbed_run_and_its_twin_since_the_onset(shards):
    calm = result(shards)
    hit = replace(
        calm,
        disturbed=np.arange(N) >= 5,
        probe_loss=calm.probe_loss + np.array([9.0, 0, 0, 0, 0, 0, 0.4, 0.3, 0.1]),
    )
    report = disturbed_summary({"policy": [hit, calm]}, {"policy": [calm, calm]}, None, ())
    assert report["arms"]["policy"]["excess_loss_area"] == pytest.approx(0.8 / N / 2)


def test_a_run_that_diverges_loses_its_balance_and_the_whole_of_its_progress(shards):
    calm = result(shards)
    curve = calm.probe_loss.copy()
    curve[6:] = np.nan
    gone = replace(calm, disturbed=np.arange(N) >= 5, probe_loss=curve, diverged=True)
    points = SetPoints(
        progress=(0.5,), medians={"loss_noise": (0.0,)}, half_widths={"loss_noise": (1e3,)}
    )
    names = shards.describe().observation_names
    report = disturbed_summary({"policy": [gone]}, {"policy": [calm]}, points, names)
    figures = report["arms"]["policy"]
    expected = (calm.probe_loss[0] - calm.probe_loss[6:]).sum() / N
    assert figures["excess_loss_area"] == pytest.approx(expected)
    assert figures["homeostasis_index"] == 5 / 8 and figures["settling_time"] == 3 / 8
    assert figures["peak_drive"] is None and figures["mean_drive"] == 0
    assert figures["settling_time_undisturbed"] == 0.0
    other = {"policy": [gone, gone], "calm": [replace(calm, disturbed=gone.disturbed)] * 2}
    minus = disturbed_summary(other, {arm: [calm, calm] for arm in other}, points, names)
    lost = minus["policy_minus"]["calm"]["excess_loss_area"]
    assert [lost[end] for end in ("estimate", "low", "high")] == pytest.approx([expected] * 3)


def test_paired_episodes_are_the_same_for_all_and_differ_from_task_to_task():
    first, again = (paired_episodes(5, 3, DEFAULT) for _ in range(2))
    assert [e.run_seed for e in first] == [e.run_seed for e in again]
    assert len({e.run_seed for e in first}) == len({e.task_seed for e in first}) == 5
    assert {e.task_seed for e in paired_episodes(5, 4, DEFAULT)}.isdisjoint(
        e.task_seed for e in first
    )


def test_what_happens_between_control_steps_is_observed_by_the_next():
    loop = ControlLoop(ToyPlant(2), ControlConfig(n_control_steps=N))
    seen = []

    class Watch(BaseController):
        def act(self, observation):
            seen.append(self.codec.positions(observation)[0, 0])
            return self.hold()

    def push(index, loop, probe_loss):
        loop.positions[:, 0] = index / 10
        return [], []

    play(
        loop,
        [PlannedRun(arm="a", episode=loop.draw_episode(0, 0), controller=Watch())],
        between=push,
    )
    assert seen[1:] == pytest.approx([i / 10 for i in range(N - 1)], abs=1e-6)


# Search ------------------------------------------------------------------------------------------


def searching(shards, n_runs, seed=0, on_done=None):
    return Search(
        shards=shards, positions=DEFAULT, n_runs=n_runs, seed=seed, n_tasks=2, on_done=on_done
    )


def test_the_searched_schedule_beats_every_static_setting_of_a_drifting_optimum(shards):
    schedule = best_schedule(searching(shards, 400))
    static = [static_arm(f"{x:.1f}", np.array([x, 0.5])) for x in np.arange(0, 1.01, 0.1)]
    played = play_arms(shards, [schedule, *static], 4, 9)
    losses = {arm: np.mean([run.final_test for run in runs]) for arm, runs in played.items()}
    found = losses.pop("best schedule")
    assert found < min(losses.values())
    rates = [run.positions[:, 0] for run in played["best schedule"]]
    assert rates[0][-1] > rates[0][2] + 0.1  # it rises, as the optimum does


def test_the_searched_linear_policy_follows_a_drifting_optimum_by_what_it_sees(shards):
    resting = resting_policy(shards.describe())
    found = best_linear_policy(searching(shards, 600), resting)
    linear = Arm(name="linear policy", positions=DEFAULT, controllers=(Learned(found),))
    static = [static_arm(f"{x:.1f}", np.array([x, 0.5])) for x in np.arange(0, 1.01, 0.1)]
    played = play_arms(shards, [linear, *static], 4, 9)
    losses = {arm: np.mean([run.final_test for run in runs]) for arm, runs in played.items()}
    assert losses.pop("linear policy") < min(losses.values())


class Known(ToyPlant):
    """A plant of which it is known where the optimum lies; it drifts no more."""

    def descriptors(self, seed, split="meta_train"):
        return {"best": 100 * self.best_of(seed), "constant": 1.0}

    def best_of(self, seed):
        return 0.2 if seed % 2 else 0.8

    def sample_task(self, seed, split="meta_train"):
        return seed

    def reset(self, rows, tasks, seeds):
        super().reset(rows, [3.0] * len(tasks), seeds)
        self.best = getattr(self, "best", np.zeros(self.n_runs))
        self.best[list(rows)] = [self.best_of(task) for task in tasks]

    def _optimizer_step(self):
        self.state["distance"] *= 1 - 0.1 * np.exp(-20 * (self.state["rate"] - self.best) ** 2)
        self.state["step"] += 1
        return 1 + self.state["distance"]


def test_a_schedule_that_is_told_the_task_does_what_the_task_needs():
    with ShardRow(TOY, 4, {"n_control_steps": N}, 0) as row:
        row._local.env.loop.run = Known(4)
        first = best_schedule(searching(row, 200))
        known = known_of_tasks(row, 6, 9)
        assert sorted(set(known[:, 0])) == [20, 80]
        told = best_told_schedule(searching(row, 500), first, known)
        played = play_arms(row, [first, told], 6, 9)
    ends = np.array([run.positions[-1, 0] for run in played[told.name]])
    assert (ends[known[:, 0] == 80] > ends[known[:, 0] == 20].max() + 0.2).all()
    losses = [np.mean([run.final_test for run in played[arm.name]]) for arm in (told, first)]
    assert losses[0] < losses[1] - 0.02
    assert len({run.positions.tobytes() for run in played[first.name]}) == 1


def test_a_search_spends_its_budget_and_is_repeatable(shards):
    spent = []
    found = [best_schedule(searching(shards, 60, seed=3, on_done=spent.append)) for _ in range(2)]
    controllers = [arm.controllers[0] for arm in found]
    assert np.array_equal(controllers[0].positions, controllers[1].positions)
    assert 2 * 60 <= sum(spent) <= 2 * 100


@pytest.mark.parametrize(
    ("low", "words"),
    [
        (0.01, "closes: 150 % (95 % interval 90 % to unbounded)"),
        (0.0, "+0.020 [+0.000, +0.030], which"),
    ],
)
def test_a_share_is_told_of_a_gap_that_there_is(low, words):
    gap = {"estimate": 0.02, "low": low, "high": 0.03}
    closed = {"estimate": 1.5, "low": 0.9, "high": None}
    assert words in gap_sentence({"gap": gap, "gap_closed": closed})


# The picture -------------------------------------------------------------------------------------


def test_runs_that_diverged_are_drawn_as_far_as_they_went(shards, tmp_path):
    lost = result(shards, probe_loss=np.full(N + 1, np.nan), final_test=np.nan)
    draw_runs(tmp_path / "a.png", {"default": [lost], "policy": [result(shards)]}, "One lost")
    draw_runs(tmp_path / "b.png", {"default": [lost], "policy": [lost]}, "Both lost")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 5_000
