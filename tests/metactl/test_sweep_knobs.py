"""Sweeps over settings of the knobs themselves: static ones, and populations that take over."""

import csv
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from metactl.checkpoint import load_newest_checkpoint
from metactl.config import ConfigError, parse
from metactl.knobs import Knob, KnobSet
from metactl.sweep.check import about_runs, check_sweep, position_bounds
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
from metactl.sweep.run import _Told

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
    knobs = about_runs(trial).knobs
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
    taken = Going(positions=other.positions, from_trial=source.name, done=8)
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
    stopped_at(config, target, root, 12, positions=moved, from_trial=source.name, done=8)
    folder = trial_folder(root, target.name) / CHECKPOINTS
    at_8 = load_newest_checkpoint(folder, at_most=8)
    of_source = load_newest_checkpoint(trial_folder(root, source.name) / CHECKPOINTS, at_most=8)
    assert at_8[1]["positions"] == moved != of_source[1]["positions"]
    apart = [
        name
        for name, value in of_source[0].items()
        if not value.nan_to_num().equal(at_8[0][name].nan_to_num())
    ]
    assert apart == ["array/positions"]


def test_after_a_stop_all_members_go_on_from_the_same_control_step(begun, caplog):
    _, trials, root = begun
    config = sweep(samples=4, scheduler="pbt")
    knobs = about_runs(trials[0]).knobs
    moved = {
        trial.name: {"dropout": 0.1 * i, "learning_rate_multiplier": 0.2 * i}
        for i, trial in enumerate(trials)
    }
    for trial, step in zip(trials, (12, 8, 12, 16), strict=True):
        stopped_at(config, trial, root, step, positions=moved[trial.name])
    assert starting_points(config, trials, root, knobs) == (8, moved)
    place = trial_folder(root, trials[1].name) / CHECKPOINTS / "step-000000000008"
    (place / "state.safetensors").write_bytes(b"torn")
    assert starting_points(config, trials[:3], root, knobs) == (4, moved_of(trials[:3], moved))
    common, points = starting_points(config, trials, root, knobs)  # one has none of 4 any more
    assert common == 0 and "begin anew" in caplog.text
    assert points[trials[0].name] == pytest.approx(at_planned(config, trials[0]).positions)


def moved_of(trials, moved):
    return {trial.name: moved[trial.name] for trial in trials}


def test_a_trial_that_is_to_go_on_where_nothing_is_says_so(begun):
    config, (source, target, *_), root = begun
    stopped_at(config, source, root, 8)
    with pytest.raises(OSError, match=f"{source.name} has no intact checkpoint of .* step 12"):
        run_member(
            config,
            target,
            root,
            at_planned(config, target, from_trial=source.name, done=12),
            ignore,
        )


def test_bounds_are_those_of_the_space_as_positions():
    knobs = KnobSet([Knob(name="dropout", low=0.0, high=0.5, default=0.1)])
    config = sweep({"dropout": {"uniform": [0.1, 0.4]}}, samples=4, scheduler="pbt")
    assert position_bounds(config, knobs) == {"dropout": pytest.approx((0.2, 0.8))}


def test_a_trial_stalls_by_reports_without_a_better_return():
    told = _Told()
    seen = [told(0.1, score)["stalled"] for score in (-3.0, -2.0, -2.0, -2.5, -1.0, -1.5)]
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
        (
            {"scheduler": "pbt", "samples": 4, "stop": {"patience": 2}},
            ["patience gives trials up", "'pbt'"],
        ),
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
        ({"dropout": {"grid": [{"low": 0.1}]}}, r"trial 000-"),
        ({"dropout": {"grid": [0.1, 0.9]}}, r"trial 001-.*dropout must be in \[0, 0.6\], got 0.9"),
    ],
)
def test_a_knob_or_value_that_the_runs_do_not_have_is_refused(space, words):
    config = sweep(space)
    with pytest.raises(ConfigError, match=words):
        check_sweep(config, plan(config))


def test_a_population_that_would_never_take_over_is_refused():
    config = sweep(samples=4, scheduler="pbt", every=40)
    with pytest.raises(ConfigError, match=r"every must be below the 40 control steps .*; got 40"):
        check_sweep(config, plan(config))


def test_ends_beyond_a_knobs_range_are_refused_even_if_none_was_drawn_there():
    config = sweep({"dropout": {"uniform": [0.0, 0.60001]}}, samples=4, scheduler="pbt")
    with pytest.raises(ConfigError, match=r"space: dropout must be in \[0, 0.6\], got 0.60001"):
        check_sweep(config, plan(config))


def test_pb2_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("metactl.sweep.check.find_spec", lambda name: None)
    config = sweep(samples=4, scheduler="pb2")
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        check_sweep(config, plan(config))


# On Ray ----------------------------------------------------------------------------------------


def start(tmp_path, **changes):
    config = tmp_path / "sweep.yaml"
    values = {
        **{"kind": "knobs", "space": SPACE, "options": OPTIONS, "n_tasks": 2, "samples": 4},
        **changes,
    }
    config.write_text(json.dumps(values))
    return subprocess.Popen(
        [sys.executable, "-m", "metactl", "sweep", "--config", config, "--run-dir", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.soak
@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_a_population_takes_over_and_is_compared_with_the_policy(tmp_path, scheduler):
    run = start(tmp_path, scheduler=scheduler, every=20)
    out, err = run.communicate(timeout=250)
    assert run.returncode == 0, err
    assert "Traceback" not in out + err and "Warning" not in err
    assert "The policy on the same tasks" in " ".join(out.split())
    root = tmp_path / "run"
    report = json.loads((root / "results.json").read_text())
    assert len(report["results"]) == report["planned"] == 4
    merits = [result["merit"] for result in report["results"]]
    assert merits == sorted(merits, reverse=True)
    first, last = (
        {tuple(result["schedule"][knob][i] for knob in SPACE) for result in report["results"]}
        for i in (0, -1)
    )
    assert len(first) < len(last) == 4  # takeovers, each at knobs of its own
    reference = read_reference(root)
    apart = np.subtract(report["results"][0]["test_loss"], reference["policy"]).mean()
    assert report["best_minus_policy"]["estimate"] == pytest.approx(apart)
    with (root / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and {f"began_at/{knob}" for knob in SPACE} <= set(rows[0])
    assert (root / "search.png").stat().st_size > 5_000


@pytest.mark.soak
def test_a_population_waits_for_no_member_that_has_failed_for_good(tmp_path):
    run = start(tmp_path, scheduler="pbt", every=14, max_failures=0)
    *_, victim = plan(sweep(scheduler="pbt", samples=4))
    place = trial_folder(tmp_path / "run", victim.name) / CHECKPOINTS / "step-000000000014"
    deadline = time.monotonic() + 120
    while not place.exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (place / "state.safetensors").write_bytes(b"torn")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1, err
    assert f"Failed: {victim.name}: OSError" in err and "Traceback" not in out + err
    report = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(report["results"]) == 3 and list(report["failed"]) == [victim.name]
    again = start(tmp_path, scheduler="pbt", every=14, max_failures=0)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["results"]) == 4
