"""Sweeps over settings of the knobs themselves: static ones, and populations that take over."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from metactl.checkpoint import load_newest_checkpoint, newest_step
from metactl.config import ConfigError, parse
from metactl.knobs import Knob, KnobSet
from metactl.sweep.check import check_sweep, knobs_of, position_bounds
from metactl.sweep.config import SweepConfig, plan, trial_folder
from metactl.sweep.member import (
    CHECKPOINTS,
    Going,
    make_reference,
    read_reference,
    run_member,
)
from metactl.sweep.population import starting_points
from metactl.sweep.result import RESULT, merit
from metactl.sweep.run import _Stall

SPACE = {
    "dropout": {"uniform": [0.0, 0.4]},
    "learning_rate_multiplier": {"loguniform": [0.25, 4.0]},
}
OPTIONS = {"horizon": 40, "d_model": 8, "n_layers": 1, "n_heads": 4, "context": 8}


def sweep(space=SPACE, **values):
    merged = {"kind": "knobs", "space": space, "options": OPTIONS, "n_tasks": 2, **values}
    return parse(SweepConfig, merged, "here")


def ignore(done, n_control_steps, score):
    """Nobody to report to."""


def at_planned(config, trial, **going):
    knobs = knobs_of(trial)
    at = dict(zip(knobs.names, knobs.positions(trial.changes, 1)[0], strict=True))
    where = {"positions": {k: float(at[k]) for k in trial.changes}, "from_trial": trial.name}
    return Going(**{**where, **going})


@pytest.fixture
def begun(tmp_path):
    config = sweep(samples=4)
    trials = plan(config)
    make_reference(config, trials[0], tmp_path)
    return config, trials, tmp_path


# One trial -----------------------------------------------------------------------------------


def test_a_trial_at_default_knobs_is_the_default_arm(tmp_path):
    space = {"dropout": {"grid": [0.1]}, "learning_rate_multiplier": {"grid": [1.0]}}
    config = sweep(space, options={**OPTIONS, "dtype": "float64"})
    (trial,) = plan(config)
    make_reference(config, trial, tmp_path)
    result = run_member(config, trial, tmp_path, at_planned(config, trial), ignore)
    expected = read_reference(tmp_path)["default"]
    np.testing.assert_allclose(result["test_loss"], expected, atol=1e-9)
    assert result["score"] == pytest.approx(0, abs=1e-9)


def test_a_setting_is_held_all_along_and_scored_against_the_default(begun):
    config, trials, root = begun
    seen = []
    result = run_member(
        config, trials[0], root, at_planned(config, trials[0]), lambda *at: seen.append(at)
    )
    assert [done for done, _, _ in seen] == list(range(4, 40, 4))
    for knob, value in trials[0].changes.items():
        np.testing.assert_allclose(result["schedule"][knob], value, rtol=1e-9)
        assert len(result["schedule"][knob]) == 40
    default = np.mean(read_reference(root)["default"])
    assert result["score"] == pytest.approx(default - np.mean(result["test_loss"]))
    assert result["score_low"] <= result["score"] <= result["score_high"]
    assert merit(result) < 0


def test_a_trial_that_was_killed_ends_as_if_it_never_had_been(begun):
    config, trials, root = begun

    def killed(done, n_control_steps, score):
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_member(config, trials[0], root, at_planned(config, trials[0]), killed)
    late = []
    again = run_member(
        config, trials[0], root, at_planned(config, trials[0]), lambda *at: late.append(at)
    )
    assert [done for done, _, _ in late] == list(range(16, 40, 4))
    (trial_folder(root, trials[0].name) / RESULT).unlink()
    for folder in (trial_folder(root, trials[0].name) / CHECKPOINTS).iterdir():
        (folder / "state.json").write_text("{")  # a damaged checkpoint counts as none
    assert run_member(config, trials[0], root, at_planned(config, trials[0]), ignore) == again


def stopped_at(config, trial, root, step, **going):
    def stop(done, n_control_steps, score):
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_member(config, trial, root, at_planned(config, trial, **going), stop)


def test_a_takeover_goes_on_with_the_runs_of_another(begun):
    config, (source, target, *_), root = begun
    stopped_at(config, source, root, 12)
    stopped_at(config, target, root, 8)
    own, other = at_planned(config, target), at_planned(config, source)
    taken = Going(positions=other.positions, from_trial=source.name, at_most=8)
    result = run_member(config, target, root, taken, ignore)
    expected = run_member(config, source, root, other, ignore)
    assert result["test_loss"] == expected["test_loss"]
    assert result["schedule"] == expected["schedule"]
    assert result["changes"] != expected["changes"] and own.positions != other.positions


def test_a_takeover_is_kept_before_anything_else_is_done(begun):
    config, (source, target, *_), root = begun
    stopped_at(config, source, root, 8)
    stopped_at(config, target, root, 8)
    moved = {"dropout": 0.9, "learning_rate_multiplier": 0.5}
    stopped_at(config, target, root, 12, positions=moved, from_trial=source.name, at_most=8)
    folder = trial_folder(root, target.name) / CHECKPOINTS
    at_8 = load_newest_checkpoint(folder, at_most=8)
    of_source = load_newest_checkpoint(trial_folder(root, source.name) / CHECKPOINTS, at_most=8)
    assert at_8[1]["positions"] == moved != of_source[1]["positions"]
    apart = [
        name
        for name, value in of_source[0].items()
        if not value.nan_to_num().equal(at_8[0][name].nan_to_num())
    ]
    assert apart == ["positions"]


def test_after_a_stop_all_members_go_on_from_the_same_control_step(begun):
    _, trials, root = begun
    config = sweep(samples=4, scheduler="pbt")
    steps = {trial.name: step for trial, step in zip(trials, (12, 8, 12, 12), strict=True)}
    for trial in trials:
        stopped_at(config, trial, root, steps[trial.name])
    common, points = starting_points(config, trials, root, knobs_of(trials[0]))
    assert common == 8
    for trial in trials:
        assert points[trial.name] == pytest.approx(at_planned(config, trial).positions)
        assert newest_step(trial_folder(root, trial.name) / CHECKPOINTS) == steps[trial.name]
    common, points = starting_points(config, trials, root / "new", knobs_of(trials[0]))
    assert common == 0
    assert points[trials[0].name] == pytest.approx(at_planned(config, trials[0]).positions)


def test_bounds_are_those_of_the_space_as_positions():
    knobs = KnobSet([Knob(name="dropout", low=0.0, high=0.5, default=0.1)])
    config = sweep({"dropout": {"uniform": [0.1, 0.4]}}, samples=4, scheduler="pbt")
    assert position_bounds(config, knobs) == {"dropout": pytest.approx((0.2, 0.8))}


def test_a_trial_stalls_by_reports_without_a_better_return():
    ahead = _Stall()
    seen = [ahead(score)["stalled"] for score in (-3.0, -2.0, -2.0, -2.5, -1.0, -1.5)]
    assert seen == [0, 0, 1, 2, 0, 1]


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"kind": "train", "scheduler": "pbt", "options": {}}, ["'pbt'", "needs kind 'knobs'"]),
        ({"scheduler": "pb2", "samples": 3}, ["'pb2'", "at least 4", "got 3"]),
        (
            {"scheduler": "pbt", "samples": 4, "space": {"dropout": {"grid": [0.1]}}},
            ["uniform or loguniform", "dropout has neither"],
        ),
        ({"searcher": "optuna"}, ["'optuna'", "'train' and 'apply'"]),
        ({"kind": "train"}, ["options are of kinds 'apply' and 'knobs'"]),
        ({"kind": "apply", "stop": {"patience": 3}}, ["patience", "learns nothing"]),
        ({"every": 0}, ["every must be at least 1, got 0"]),
        ({"stop": {"minutes": 0}}, ["minutes must be above 0, got 0"]),
        ({"stop": {"minute": 1}}, ["'stop.minute'", "Did you mean 'minutes'"]),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_in_words(values, parts):
    with pytest.raises(ConfigError) as error:
        sweep(**values)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"dropuot": {"grid": [0.1]}}, r"trial 000-.*'dropuot'.*Did you mean 'dropout'"),
        ({"dropout": {"grid": [0.1, 0.9]}}, r"trial 001-.*dropout must be in \[0, 0.6\], got 0.9"),
    ],
)
def test_a_knob_or_value_that_the_runs_do_not_have_is_refused(space, words):
    config = sweep(space)
    with pytest.raises(ConfigError, match=words):
        check_sweep(config, plan(config))


def test_ends_beyond_a_knobs_range_are_refused_even_if_none_was_drawn_there():
    config = sweep({"dropout": {"uniform": [0.0, 0.60001]}}, samples=4, scheduler="pbt")
    with pytest.raises(ConfigError, match=r"space: dropout must be in \[0, 0.6\], got 0.60001"):
        check_sweep(config, plan(config))


def test_pb2_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("metactl.sweep.check.find_spec", lambda name: None)
    config = sweep(samples=4, scheduler="pb2")
    with pytest.raises(ConfigError, match=r"pip install 'metactl\[pb2\]'"):
        check_sweep(config, plan(config))


# On Ray ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_a_population_takes_over_and_is_compared_with_the_policy(tmp_path, scheduler):
    config = tmp_path / "sweep.yaml"
    values = {
        **{"kind": "knobs", "space": SPACE, "options": OPTIONS, "n_tasks": 2, "samples": 4},
        **{"scheduler": scheduler, "every": 14},
    }
    config.write_text(json.dumps(values))
    root = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "metactl", "sweep", "--config", config, "--run-dir", root],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr and "Warning" not in done.stderr
    assert "The policy on the same tasks" in " ".join(done.stdout.split())
    report = json.loads((root / "results.json").read_text())
    assert len(report["results"]) == report["planned"] == 4
    merits = [result["merit"] for result in report["results"]]
    assert merits == sorted(merits, reverse=True)
    first = [tuple(r["schedule"][knob][0] for knob in SPACE) for r in report["results"]]
    assert len(set(first)) < 4  # somebody ended with runs that began as another's
    reference = read_reference(root)
    apart = np.subtract(report["results"][0]["test_loss"], reference["policy"]).mean()
    assert report["best_minus_policy"]["estimate"] == pytest.approx(apart)
    with (root / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    assert (root / "search.png").stat().st_size > 5_000
