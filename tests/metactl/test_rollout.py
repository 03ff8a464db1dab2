import numpy as np
import pytest
from toy_plant import Overfitting, ToyPlant

from metactl.controllers import BaseController, RandomMoves, Static
from metactl.env import ControlLoop
from metactl.episodes import ControlConfig
from metactl.rollout import BestCheckpoint, PlannedRun, play

N = 10


class Push(BaseController):
    """Moves the first knob up, always."""

    def act(self, observation):
        return self.hold() + np.array([1.0, 0.0])


def loop_of(plant, **control):
    return ControlLoop(plant, ControlConfig(n_control_steps=N, **control))


def planned(loop, seed, controller=None, arm="arm"):
    return PlannedRun(
        arm=arm, episode=loop.draw_episode(seed, 0), controller=controller or Static()
    )


def test_trials_of_one_episode_are_paired():
    loop = loop_of(ToyPlant(3))
    results = play(
        loop,
        [planned(loop, 1, arm="a"), planned(loop, 1, RandomMoves(0), arm="b"), planned(loop, 2)],
    )
    assert [result.arm for result in results] == ["a", "b", "arm"]
    assert results[0].probe_loss[0] == results[1].probe_loss[0] != results[2].probe_loss[0]
    assert results[0].final_test != results[1].final_test
    noise = [r.train_loss[0] - np.mean(r.probe_loss[:2]) for r in results]
    assert noise[0] == pytest.approx(noise[1], abs=0.02)
    assert abs(noise[0] - noise[2]) > 0.005


def test_a_result_does_not_depend_on_spare_rows_or_neighbours():
    alone = play(loop := loop_of(ToyPlant(1)), [planned(loop, 1)])[0]
    spared = play(loop := loop_of(ToyPlant(5)), [planned(loop, 1)])
    assert len(spared) == 1
    amid = play(loop, [planned(loop, 2, Push()), planned(loop, 1), planned(loop, 3)])[1]
    for other in (spared[0], amid):
        np.testing.assert_array_equal(other.probe_loss, alone.probe_loss)
        np.testing.assert_array_equal(other.train_loss, alone.train_loss)
        assert (other.final_test, other.best_test) == (alone.final_test, alone.best_test)


def test_the_best_test_is_the_test_loss_where_the_probe_was_best():
    loop = loop_of(Overfitting(2))
    for result in play(loop, [planned(loop, 1), planned(loop, 2)]):
        assert result.best_probe == pytest.approx(2.0)
        assert result.best_test == pytest.approx(3.6)
        assert result.final_probe == pytest.approx(2.16)
        assert result.final_test == pytest.approx(4.0)


def test_a_run_that_never_improves_is_best_before_it_was_trained():
    class Worsening(Overfitting):
        def losses(self, split):
            return 2 + self.state["step"] / self.horizon + (split == "test")

    loop = loop_of(Worsening(1))
    result = play(loop, [planned(loop, 1)])[0]
    assert (result.best_probe, result.best_test, result.final_test) == (2, 3, 4)


def test_the_best_of_the_best_and_the_final_is_the_final_while_the_probe_falls():
    loop = loop_of(ToyPlant(1))
    result = play(loop, [planned(loop, 1)])[0]
    assert (np.diff(result.probe_loss) < 0).all()
    assert result.best_test == result.final_test == pytest.approx(result.final_probe + 0.25)


@pytest.fixture
def diverged():
    plant = ToyPlant(2, diverge_above=0.9)
    loop = loop_of(plant)
    untrained = loop.run.sample_task(loop.draw_episode(1, 0).task_seed) + 1
    return untrained, play(loop, [planned(loop, 1, Push()), planned(loop, 1)])


def test_a_run_that_diverged_counts_as_untrained_at_its_end(diverged):
    untrained, (lost, kept) = diverged
    assert (lost.diverged, kept.diverged) == (True, False)
    assert lost.final_probe == pytest.approx(untrained)
    assert lost.final_test == pytest.approx(untrained + 0.25)
    assert kept.final_test < untrained


def test_a_run_that_diverges_at_once_has_its_untrained_model_as_its_best():
    loop = loop_of(ToyPlant(1, diverge_above=0.1))
    result = play(loop, [planned(loop, 1)])[0]
    untrained = loop.run.sample_task(loop.draw_episode(1, 0).task_seed) + 1
    assert result.best_probe == pytest.approx(untrained)
    assert result.best_test == pytest.approx(untrained + 0.25)


def test_a_run_that_diverged_counts_as_untrained_at_its_best_too():
    plant = ToyPlant(1, diverge_above=0.9, horizon=40)
    loop = ControlLoop(plant, ControlConfig(n_control_steps=40))
    result = play(loop, [planned(loop, 1, Push())])[0]
    untrained = loop.run.sample_task(loop.draw_episode(1, 0).task_seed) + 1
    assert np.isfinite(result.probe_loss[1])  # it trained before it diverged
    assert result.best_probe == pytest.approx(untrained)
    assert result.best_test == pytest.approx(untrained + 0.25)


def test_looking_at_the_best_checkpoint_leaves_the_runs_as_they_are():
    loop = loop_of(Overfitting(2))
    loop.reset([0, 1], [loop.draw_episode(seed, 0) for seed in (1, 2)])
    best = BestCheckpoint(loop)
    for _ in range(N):
        best.update(loop.step(np.zeros((2, 2))).measurement.probe_loss)
    before = loop.run.state_dict([0, 1])
    assert best.evaluate("test") == pytest.approx([3.6, 3.6])
    assert best.evaluate("test") == pytest.approx([3.6, 3.6])
    for name, value in loop.run.state_dict([0, 1]).items():
        np.testing.assert_array_equal(value, before[name])


def test_the_best_checkpoint_is_kept_for_each_run_alone():
    loop = loop_of(ToyPlant(2))
    loop.reset([0, 1], [loop.draw_episode(seed, 0) for seed in (1, 2)])
    best = BestCheckpoint(loop)
    kept = []
    for losses in ([0.5, np.nan], [0.7, 0.6], [np.nan, 0.5]):
        loop.step(np.zeros((2, 2)))
        kept.append(loop.run.losses("test"))
        best.update(np.array(losses))
    assert best.loss.tolist() == [0.5, 0.5]
    assert best.evaluate("test").tolist() == [kept[0][0], kept[2][1]]


def test_a_result_holds_the_whole_course_of_its_run():
    loop = loop_of(ToyPlant(1), random_start=1.0)
    seen = []
    pushed = planned(loop, 1, Push())
    result = play(loop, [pushed], on_step=lambda i, step: seen.append((i, step)))[0]
    assert [index for index, _ in seen] == list(range(N))
    assert result.positions.shape == (N + 1, 2)
    assert result.positions[0].tolist() == loop.draw_episode(1, 0).positions.tolist()
    assert result.train_loss.tolist() == [step.measurement.train_loss[0] for _, step in seen]
    assert result.probe_loss[1:].tolist() == [step.measurement.probe_loss[0] for _, step in seen]
    assert result.values["rate"].tolist() == [step.values["rate"][0] for _, step in seen]
    assert result.flops.tolist() == [s.measurement.flops[0] for _, s in seen]
    assert result.flops[-1] == 400
    assert result.values["rate"][-1] == 1.0


def test_a_run_without_probes_is_judged_by_its_training_loss():
    loop = loop_of(ToyPlant(1, probes=False))
    result = play(loop, [planned(loop, 1)])[0]
    np.testing.assert_array_equal(result.probe_loss[1:], result.train_loss)


@pytest.mark.parametrize("n_trials", [0, 3])
def test_more_trials_than_rows_or_none_are_refused(n_trials):
    loop = loop_of(ToyPlant(2))
    with pytest.raises(ValueError, match=f"play needs 1 to 2 runs, got {n_trials}"):
        play(loop, [planned(loop, 1)] * n_trials)
