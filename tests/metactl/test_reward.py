import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_plant import RATE, ToyPlant

from metactl.env import ControlLoop
from metactl.episodes import ControlConfig
from metactl.reward import ImprovementReward

SETTINGS = settings(max_examples=30, deadline=None, database=None)
losses = st.floats(0, 1e6)
curves = st.lists(losses, min_size=1, max_size=20)
scales = st.floats(1e-3, 1e3)


def rewards(start, curve, diverged=(), scale=1.0):
    """Rewards of one run, as increments of its value, the way `ControlLoop` hands them out."""
    rule = ImprovementReward(scale=scale)
    flags = np.array([i in diverged for i in range(len(curve))])
    values = [
        rule.value(np.array([start]), np.array([loss]), flags[i : i + 1])[0]
        for i, loss in enumerate(curve)
    ]
    return np.diff([0.0, *values])


@given(start=st.floats(0.1, 10), curve=st.lists(st.floats(0.01, 10), min_size=1, max_size=20))
@SETTINGS
def test_rewards_add_up_to_the_total_improvement(start, curve):
    total = rewards(start, curve, scale=8.0).sum()
    assert total == pytest.approx((start - curve[-1]) / 8, abs=1e-9)


@given(start=st.floats(1, 10), swings=st.lists(st.floats(0, 10), max_size=20))
@SETTINGS
def test_oscillating_earns_nothing(start, swings):
    assert rewards(start, [*swings, start]).sum() == pytest.approx(0, abs=1e-9)


@given(start=losses, survivor=curves, victim=curves, scale=scales)
@SETTINGS
def test_diverging_at_any_time_is_worse_than_any_run_that_survives(start, survivor, victim, scale):
    died = rewards(start, victim, diverged={len(victim) - 1}, scale=scale).sum()
    assert np.isfinite(died)
    assert died < rewards(start, survivor, scale=scale).sum() - 0.5


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_no_number_is_never_an_improvement(loss):
    assert rewards(3.0, [2.0, loss])[1] < 0
    assert rewards(3.0, [loss]).sum() < rewards(3.0, [1e9]).sum()


@pytest.mark.parametrize("start", [np.nan, np.inf])
def test_a_run_that_starts_without_a_loss_earns_finite_rewards_and_no_improvement(start):
    earned = rewards(start, [2.0, 1.0])
    assert np.isfinite(earned).all()
    assert earned.sum() <= 0


@given(start=st.floats(1, 10), at=st.integers(0, 8))
@SETTINGS
def test_diverging_early_pays_no_more_than_diverging_late(start, at):
    falling = np.linspace(start, 0.1, 10)
    early = rewards(start, falling[: at + 1], diverged={at}).sum()
    late = rewards(start, falling, diverged={9}).sum()
    assert early == pytest.approx(late)


def test_ending_a_hopeless_run_by_divergence_does_not_pay():
    worsening = np.linspace(3, 500, 10)
    endured = rewards(3.0, worsening).sum()
    assert all(rewards(3.0, worsening[:n], diverged={n - 1}).sum() < endured for n in range(1, 11))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=rf"above 0 nats, got {scale}"):
        ImprovementReward(scale=scale)


@pytest.mark.parametrize("probes", [True, False])
def test_the_loop_hands_out_the_improvement_of_its_run(probes):
    plant = ToyPlant(2, probes=probes)
    loop = ControlLoop(plant, ControlConfig(n_control_steps=8, reward_scale=0.5))
    loop.reset([0, 1], [loop.draw_episode(seed, 0) for seed in (1, 2)])
    before = plant.losses("probe")
    steps = [loop.step(np.zeros((2, 2))) for _ in range(8)]
    end = plant.losses("probe") if probes else steps[-1].measurement.train_loss
    total = np.sum([step.reward for step in steps], axis=0)
    np.testing.assert_allclose(total, (before - end) / 0.5, rtol=1e-12)


def test_a_run_driven_into_divergence_earns_less_than_one_that_stays():
    plant = ToyPlant(2, diverge_above=0.8)
    loop = ControlLoop(plant, ControlConfig(n_control_steps=8, reward_scale=1e-3))
    loop.reset([0, 1], [loop.draw_episode(seed, 0) for seed in (1, 1)])
    push = np.array([[1.0, 0], [-1.0, 0]])
    total = np.sum([loop.step(push).reward for _ in range(8)], axis=0)
    assert RATE.default < 0.8
    assert np.isfinite(total).all()
    assert total[0] < total[1] - 0.5


def test_a_loss_of_exactly_zero_is_no_improvement():
    value = ImprovementReward(scale=1.0).value(
        np.array([3.0, 3.0]), np.array([0.0, 2.5]), np.array([False, False])
    )
    assert value.tolist() == [0.0, 0.5]
