"""Population-based training: who takes over from whom, at which knobs, and what it costs."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from toy_plant import DEFAULT, TOY, ToyPlant
from toy_plant import N_DECISIONS as N

from metactl.controllers import BaseController, Static
from metactl.env import ControlLoop
from metactl.episodes import ControlConfig
from metactl.evaluation import play_arms, static_arm
from metactl.evaluation.bandit import Stretch, promising
from metactl.evaluation.pbt import Takeovers, perturbed, play_pbt
from metactl.rollout import PlannedRun, play
from metactl.shards import ShardRow


def test_the_worst_members_go_on_from_the_best_with_changed_knobs():
    loop = ControlLoop(ToyPlant(8), ControlConfig(n_control_steps=N))
    loop.reset(range(8), [loop.draw_episode(0, 0)] * 8)
    loop.positions[:] = np.linspace(0.1, 0.8, 8)[:, None]
    loop.run.state["distance"] = np.array([5.0, 1, 2, 3, 9, 6, 7, 8])
    before = loop.positions.copy()
    explore = partial(perturbed, resample=0.0)
    swap = Takeovers(n_members=4, seed=0, every=2, explore=explore)
    swap(0, loop, loop.run.losses("probe"))
    assert loop.run.state["distance"].tolist() == [5, 1, 2, 3, 9, 6, 7, 8]  # not yet
    swap(1, loop, loop.run.losses("probe"))
    assert loop.run.state["distance"].tolist() == [1, 1, 2, 3, 6, 6, 7, 8]
    assert np.array_equal(np.delete(loop.positions, (0, 4), 0), np.delete(before, (0, 4), 0))
    assert np.all(loop.positions[0] != before[1]) and np.all(loop.positions[4] != before[5])
    assert np.abs(loop.positions[0] - before[1]).max() < 0.6
    loop.run.state["distance"][0] = 5.0
    swap(7, loop, loop.run.losses("probe"))
    assert loop.run.state["distance"][0] == 5.0  # too late to be worth anything


def test_a_member_that_diverged_is_among_the_worst():
    loop = ControlLoop(ToyPlant(4), ControlConfig(n_control_steps=N))
    loop.reset(range(4), [loop.draw_episode(0, 0)] * 4)
    loop.run.state["distance"] = np.array([1.0, 2, 3, 4])
    Takeovers(n_members=4, seed=0, every=1)(0, loop, np.array([np.nan, 3.0, 2.0, 4.0]))
    assert loop.run.state["distance"].tolist() == [3, 2, 3, 4]


def test_a_population_beats_its_first_member_and_pays_for_all(shards):
    poor = np.array([0.0, 0.5])
    alone = play_arms(shards, [static_arm("alone", poor)], 4, 0)["alone"]
    best = play_pbt(shards, 4, 4, 0, poor)
    assert np.mean([run.final_probe for run in best]) < np.mean([r.final_probe for r in alone])
    for run, single in zip(best, alone, strict=True):
        assert run.probe_loss[0] == single.probe_loss[0]
        assert np.array_equal(run.flops, 4 * single.flops)


def test_a_population_that_learns_where_the_best_knobs_are_beats_one_that_moves_at_random():
    poor, ends = np.array([0.0, 0.5]), {}
    with ShardRow(TOY, 8, {"n_control_steps": 40}, 0) as shards:
        for explore in (perturbed, promising):
            played = [play_pbt(shards, 8, 8, seed, poor, explore=explore) for seed in (0, 1, 0)]
            losses = np.array([[run.final_probe for run in runs] for runs in played])
            assert np.array_equal(losses[0], losses[2])  # what it remembers is gone
            ends[explore] = losses[:2].mean()
    assert ends[promising] < ends[perturbed]


@pytest.mark.parametrize("best", [0.2, 0.7])
def test_knobs_are_sought_where_gains_were_high_lately(best):
    rng = np.random.default_rng(0)

    def stretch(optimum, scale):
        positions = rng.random((8, 2))
        return Stretch(positions, scale - scale * (positions[:, 0] - optimum) ** 2)

    going_on = np.array([[0.5, 0.5]] * 6)
    past = [stretch(1 - best, 5.0) for _ in range(3)] + [stretch(best, 0.2) for _ in range(8)]
    past[-1].gain[0] = -np.inf  # one that diverged
    found = promising(past, going_on[:2], going_on, rng)
    assert found.shape == (2, 2)
    assert found.min() >= 0 and found.max() <= 1
    assert np.abs(found[:, 0] - best).max() < 0.3
    assert not np.array_equal(found[0], found[1])  # the second knows of the first


def test_who_takes_over_is_measured_from_where_it_took_over():
    loop = ControlLoop(ToyPlant(4), ControlConfig(n_control_steps=N))
    loop.reset(range(4), [loop.draw_episode(0, 0)] * 4)
    seen = []

    def explore(stretches, better, going_on, rng):
        seen.append(stretches[-1].gain.tolist())
        return better

    swap = Takeovers(n_members=4, seed=0, every=1, explore=explore)
    loop.start_loss[:] = 10.0
    swap(0, loop, np.array([9.0, 8.0, 7.0, np.nan]))
    swap(1, loop, np.array([8.0, 7.5, 6.5, 6.0]))
    assert seen == [[1, 2, 3, -np.inf], [1, 0.5, 0.5, 1]]  # the last took over at 7


def test_who_takes_over_from_another_has_its_best_checkpoint_and_has_not_diverged():
    loop = ControlLoop(ToyPlant(2, diverge_above=0.9), ControlConfig(n_control_steps=N))
    episode = replace(loop.draw_episode(0, 0), positions=np.array([0.85, 0.5]))

    class Up(BaseController):
        def act(self, observation):
            return self.hold() + np.array([1.0, 0.0])

    def rescue(index, loop, probe_loss):
        if index != 3:
            return [], []
        loop.run.copy_rows([0], [1])
        loop.positions[1] = loop.positions[0]
        return [0], [1]

    trials = [
        PlannedRun(arm="calm", episode=episode, controller=Static()),
        PlannedRun(arm="hot", episode=episode, controller=Up()),
    ]
    calm, hot = play(loop, trials)
    assert hot.diverged and hot.final_test > calm.final_test
    trials[1] = replace(trials[1], controller=Static())
    trials[1] = replace(trials[1], episode=replace(episode, positions=np.array([0.95, 0.5])))
    calm, rescued = play(loop, trials, between=rescue)
    assert not rescued.diverged
    assert (rescued.final_test, rescued.best_test) == (calm.final_test, calm.best_test)


def test_populations_that_do_not_fit_are_refused(shards):
    with pytest.raises(ValueError, match=r"populations of 3 need a multiple of 3.*got 8"):
        play_pbt(shards, 3, 2, 0, DEFAULT)


def test_every_task_is_searched_in_its_own_way_wherever_it_is_played():
    moves = {}
    for n_envs in (4, 8):
        drawn = []

        def explore(stretches, better, going_on, rng, drawn=drawn):
            drawn.append(tuple(rng.standard_normal(2)))
            return better

        with ShardRow(TOY, n_envs, {"n_control_steps": N}, 0) as row:
            play_pbt(row, 4, 4, 0, DEFAULT, explore=explore)
        moves[n_envs] = drawn
    assert len(set(moves[4])) == 4 and set(moves[4]) == set(moves[8])
