import numpy as np
import pytest
from toy_plant import Exploding, ToyPlant

from metactl import Measurement, SingleRuns
from metactl.check import check_training_run
from metactl.controllers import Static
from metactl.env import ControlLoop
from metactl.episodes import ControlConfig
from metactl.rollout import PlannedRun, play
from metactl.run import join_measurements

SEEDS, TASKS = [5, 6, 7], [2.0, 3.0, 4.0]


def started(run):
    run.reset([0, 1, 2], TASKS, SEEDS)
    return run


def singles(n_runs=3, kind=ToyPlant, **options):
    return SingleRuns(lambda: kind(1, **options), n_runs)


def assert_equal_measurements(left, right):
    for name, value in left.arrays().items():
        np.testing.assert_array_equal(value, right.arrays()[name], err_msg=name)


def test_runs_made_of_single_ones_are_the_native_runs():
    native, adapted = started(ToyPlant(3)), started(singles())
    for rate in (0.2, 0.9):
        values = {"rate": np.array([rate, 0.5, 0.1]), "width": np.array([1.0, 2.0, 16.0])}
        native.apply(values)
        adapted.apply(values)
        assert_equal_measurements(native.advance(3), adapted.advance(3))
    np.testing.assert_array_equal(native.evaluate("test"), adapted.evaluate("test"))
    np.testing.assert_array_equal(native.evaluate("test", [2, 0]), adapted.evaluate("test", [2, 0]))
    assert adapted.export(1) == native.export(1)
    assert adapted.cost().shape == (3,)


def test_a_single_run_that_raises_diverged_is_reported_and_its_neighbours_go_on():
    values = {"rate": np.array([0.5, 0.9, 0.5])}
    run, calm = (started(singles(kind=Exploding, diverge_above=top)) for top in (0.8, 2.0))
    run.apply(values)
    calm.apply(values)
    seen, expected = run.advance(2), calm.advance(2)
    assert seen.diverged.tolist() == [False, True, False]
    assert np.isnan(seen.train_loss).tolist() == [False, True, False]
    assert np.isnan(seen.probe_loss).tolist() == [False, True, False]
    np.testing.assert_array_equal(seen.train_loss[[0, 2]], expected.train_loss[[0, 2]])


def test_the_state_of_single_runs_puts_them_back_where_they_were():
    run = started(singles())
    run.advance(3)
    state = run.state_dict([0, 1, 2])
    expected = run.advance(4)
    run.load_state_dict([0, 1, 2], state)
    assert_equal_measurements(expected, run.advance(4))


@pytest.mark.parametrize("make", [ToyPlant, singles])
def test_a_copied_row_goes_on_as_its_source_would(make):
    run = started(make(3))
    run.advance(3)
    run.copy_rows([0], [2])
    seen = run.advance(3)
    assert seen.train_loss[2] == seen.train_loss[0] != seen.train_loss[1]
    assert seen.probe_loss[2] == seen.probe_loss[0]


def test_whole_runs_can_be_played_on_single_runs():
    """The state of rows has a leading row dimension, so that the best checkpoint can be kept."""
    config = ControlConfig(n_control_steps=4)
    results = []
    for run in (ToyPlant(2), singles(2)):
        loop = ControlLoop(run, config)
        trials = [
            PlannedRun(arm="static", episode=loop.draw_episode(seed, 0), controller=Static())
            for seed in (0, 1)
        ]
        results.append([result.best_test for result in play(loop, trials)])
    assert results[0] == results[1]


def test_plants_of_several_runs_are_no_single_runs():
    with pytest.raises(ValueError, match="plants of one run each, got 2"):
        SingleRuns(lambda: ToyPlant(2), 3)


def test_closing_single_runs_closes_every_plant():
    plants = []

    def build():
        plants.append(ToyPlant(1))
        return plants[-1]

    SingleRuns(build, 2).close()
    assert [plant.closed for plant in plants] == [True, True]


def test_a_run_without_a_model_says_so_when_asked_for_text():
    with pytest.raises(TypeError, match="ToyPlant cannot sample"):
        ToyPlant(1).sample(0, 10)


def test_joined_measurements_keep_order_and_are_nan_where_a_part_measured_nothing():
    calm = Measurement(
        train_loss=np.array([1.0, 2.0]), diverged=np.zeros(2, bool), flops=np.array([7.0, 8.0])
    )
    lost = Measurement(train_loss=np.array([np.nan]), diverged=np.ones(1, bool))
    joined = join_measurements([calm, lost, calm])
    np.testing.assert_array_equal(joined.train_loss, [1, 2, np.nan, 1, 2])
    np.testing.assert_array_equal(joined.flops, [7, 8, np.nan, 7, 8])
    assert joined.diverged.dtype == bool
    assert joined.diverged.tolist() == [False, False, True, False, False]
    assert joined.probe_loss is None


def test_joined_measurements_keep_the_internal_signals():
    parts = [
        Measurement(
            train_loss=np.array([1.0]),
            diverged=np.zeros(1, bool),
            internal={"entropy": np.array([value])},
        )
        for value in (0.1, 0.2)
    ]
    assert join_measurements(parts).internal["entropy"].tolist() == [0.1, 0.2]


class Varied(ToyPlant):
    def draw_horizon(self, seed):
        self.horizon = int(np.random.default_rng(seed).integers(20, 200))


def test_single_ones_have_the_horizon_of_their_population():
    native = ControlLoop(Varied(2, horizon=54), ControlConfig(n_control_steps=10))
    adapted = ControlLoop(singles(2, Varied, horizon=54), ControlConfig(n_control_steps=10))
    plants = adapted.run._runs
    assert native.run.horizon == adapted.run.horizon == 50
    assert [plant.horizon for plant in plants] == [50, 50]
    episodes = [native.draw_episode(0, i) for i in range(2)]
    for loop in (native, adapted):
        loop.draw_horizon(7)
        loop.reset([0, 1], episodes)
        loop.step(np.zeros((2, 2)))
    again = ControlLoop(singles(2, Varied, horizon=54), ControlConfig(n_control_steps=10))
    again.load_state_dict(adapted.state_dict())
    for _ in range(5):
        losses = [loop.step(np.zeros((2, 2))).measurement.probe_loss for loop in (native, again)]
        np.testing.assert_array_equal(losses[0], losses[1])


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (lambda seed: {"size": float(seed)}, None),
        (lambda seed: {"size": float("nan")}, "two calls for one task"),
        (lambda seed: {"size": "large"}, "size is 'large'"),
        (lambda seed: {"size": float("inf")}, "size is inf"),
        (lambda seed: {f"size {seed}": 1.0}, "two tasks have size 1 and size 2"),
    ],
)
def test_what_is_told_of_tasks_is_checked(told, words, monkeypatch):
    monkeypatch.setattr(ToyPlant, "descriptors", lambda self, seed, split="meta_train": told(seed))
    *_, last = check_training_run(ToyPlant(2))
    assert last.text.startswith("Descriptors are finite numbers")
    assert last.passed if words is None else words in last.text
