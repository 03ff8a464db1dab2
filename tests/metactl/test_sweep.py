"""Sweeps: the plan, one trial, and trials on Ray."""

import datetime
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import metactl, refused

from metactl.cluster import check_resources, cluster
from metactl.config import ConfigError, dump, parse, read_config
from metactl.deployment import deployment
from metactl.evaluation import play_arms, policy_arm
from metactl.policy import Policy
from metactl.rundir import open_run_directory
from metactl.shards import ShardRow
from metactl.sweep.check import check_sweep, check_trials
from metactl.sweep.config import SweepConfig, plan, resolved, trial_folder
from metactl.sweep.report import missing_members, write_report
from metactl.sweep.result import RESULT, STOPPED, read_result
from metactl.sweep.run import Outcome, _asha
from metactl.sweep.score import play_kinds, play_pair
from metactl.sweep.searcher import POINT, placed, require_searcher
from metactl.sweep.trial import run_trial
from metactl.sweep.watcher import tune_watcher

TINY = {
    "environment.options.horizon": 40,
    "environment.options.d_model": 8,
    "environment.options.n_layers": 1,
    "environment.options.n_heads": 4,
    "environment.options.context": 8,
    "environment.options.knobs": ["dropout"],
    "environment.n_envs": 4,
    "ppo.total_timesteps": 480,
    "ppo.n_epochs": 2,
    "ppo.batch_size": 80,
    "set_point_runs": 4,
}


def sweep(tmp_path, space, **options):
    """A sweep over a recipe that takes a second."""
    values = {"ppo": {}, "environment": {"options": {}}}
    for key, value in TINY.items():
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    return parse(
        SweepConfig, {"recipe": str(recipe), "space": space, "n_tasks": 2, **options}, "here"
    )


def ignore(steps, mean_return):
    """Nobody to report to."""


# The plan ------------------------------------------------------------------------------------


def test_a_plan_combines_grids_and_draws_the_rest(tmp_path):
    space = {
        "seed": {"grid": [0, 1, 2]},
        "ppo.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "ppo.use_sde": {"choice": [True, False]},
    }
    trials = plan(sweep(tmp_path, space, samples=20))
    assert len(trials) == 60
    assert len({trial.name for trial in trials}) == 60
    assert [t.changes["seed"] for t in trials] == [0] * 20 + [1] * 20 + [2] * 20
    rates = sorted(trial.changes["ppo.learning_rate"] for trial in trials)
    assert 1e-4 < rates[0] < 3e-4
    assert 6e-4 < rates[30] < 2e-3
    assert {trial.changes["ppo.use_sde"] for trial in trials} == {True, False}
    assert plan(sweep(tmp_path, space, samples=20)) == trials
    assert plan(sweep(tmp_path, space, samples=20, seed=1)) != trials


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"space": {}}, ["space is empty"]),
        ({"space": {"seed": {"grid": [1], "choice": [2]}}}, ["exactly one of", "grid"]),
        ({"space": {"seed": {"grid": []}}}, ["grid needs at least one value"]),
        ({"space": {"seed": {"uniform": [2, 1]}}}, ["low < high, got 2.0, 1.0"]),
        ({"space": {"seed": {"loguniform": [0, 1]}}}, ["low < high, got 0.0, 1.0"]),
        ({"space": {"seed": {"gird": [1]}}}, ["'space.seed.gird'", "Did you mean 'grid'"]),
        ({"samples": 0}, ["samples must be at least 1, got 0"]),
        ({"kind": "aply"}, ["kind", "'train', 'apply' or 'knobs'", "'aply'"]),
        ({"resources": {"cpu": 0}}, ["cpu > 0"]),
        ({"sampels": 3}, ["'sampels'", "Did you mean 'samples'"]),
        ({"kind": "apply", "scheduler": "asha"}, ["'asha'", "learns nothing"]),
        ({"kind": "apply", "mean_of": 2}, ["mean_of is of kind 'train'", "'apply'"]),
        ({"kind": "apply", "options": {"split": "all"}}, ["split", "meta_train"]),
        ({"mean_of": 0}, ["mean_of must be at least 1, got 0"]),
        (
            {"space": {"environment.n_workers": {"grid": [0, 2]}}},
            ["environment.n_workers is not to vary", "resources"],
        ),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_in_words(changes, parts):
    values = {"space": {"seed": {"grid": [1]}}, **changes}
    with pytest.raises(ConfigError) as error:
        parse(SweepConfig, values, "sweep.yaml")
    for part in parts:
        assert part in str(error.value)


def test_a_sweep_does_not_go_on_where_what_it_names_has_changed(tmp_path, capsys):
    config = sweep(tmp_path, {"seed": {"grid": [0, 1]}})
    file, root = tmp_path / "sweep.yaml", tmp_path / "run"
    file.write_text(json.dumps({"recipe": config.recipe, "space": {"seed": {"grid": [0, 1]}}}))
    config = read_config(SweepConfig, file, {})

    def record():
        return {**dump(config), "resolved": resolved(plan(config))}

    open_run_directory(root, "sweep", record(), resume=False)
    open_run_directory(root, "sweep", record(), resume=True)
    recipe = Path(config.recipe)
    longer = json.loads(recipe.read_text())
    longer["ppo"]["total_timesteps"] = 800
    recipe.write_text(json.dumps(longer))
    said = refused(capsys, "sweep", "--config", file, "--run-dir", root)
    assert "resolved.recipe.ppo.total_timesteps differ" in said


def test_a_sweep_over_policies_knows_each_by_its_checksum(tmp_path):
    shipped, copies = Policy.load("default"), [tmp_path / "a", tmp_path / "b"]
    for folder in copies:
        shipped.save(folder)
    space = {"policy": {"grid": [str(folder) for folder in copies]}}
    config = sweep(tmp_path, space, kind="apply", options={"d_model": 8})
    before = resolved(plan(config))
    assert before["options"] == {"d_model": 8}
    assert set(before["policies"]) == {str(folder) for folder in copies}
    other = {name: weight + (name == "bias_0") for name, weight in shipped.weights.items()}
    Policy(shipped.card, other).save(copies[1])
    after = resolved(plan(config))
    changed = set(before["policies"].items()) - set(after["policies"].items())
    assert {folder for folder, _ in changed} == {str(copies[1])}


def test_progress_goes_on_from_what_finished_before(tmp_path):
    results = [{"score": 0.02, "merit": -2.0}, {"score": 0.05, "merit": -1.5}]
    assert tune_watcher(tmp_path, 4, 2, None, results).best == (-1.5, 0.05)
    assert tune_watcher(tmp_path, 4, 4, None).best is None


def test_a_value_that_the_recipe_does_not_take_is_refused_before_anything_starts(tmp_path):
    space = {"ppo.learning_rate": {"grid": [1e-3, -1.0]}}
    said = r"trial 001-\w+ \(ppo.learning_rate=-1\).*must be in \(0, 1\], got -1"
    with pytest.raises(ConfigError, match=said):
        plan(sweep(tmp_path, space))
    with pytest.raises(ConfigError, match=r"ppo.learning_rat.*Did you mean 'learning_rate'"):
        plan(sweep(tmp_path, {"ppo.learning_rat": {"grid": [1e-3]}}))
    named = {"kind": "apply", "space": {"policy": {"grid": [3]}}}
    with pytest.raises(ConfigError, match=r"policy must be a folder or a name, got 3"):
        plan(parse(SweepConfig, named, "sweep.yaml"))


def test_a_rotation_is_that_of_all_trials(capsys, tmp_path):
    arguments = ["--rotation", "givens", "--dry-run", "--run-dir", str(tmp_path / "run")]
    for config, key in (("sweep", "environment.options.rotation"), ("sweep_apply", "rotation")):
        assert metactl("sweep", "--config", config, *arguments) == 0
        first, *trials = capsys.readouterr().out.splitlines()
        assert first.startswith("4 trials")
        assert len(trials) == 4 and all(f"{key}=givens" in line for line in trials)


# The searcher ----------------------------------------------------------------------------------

SEARCHED = {
    "ppo.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "ppo.n_epochs": {"choice": [2, 4, 8]},
    "seed": {"grid": [0, 1]},
}


def finished(root, trial, score):
    """As if a trial had ended: better, the closer its rate is to 3e-3, with 8 epochs."""
    folder = trial_folder(root, trial.name)
    (folder / RESULT).write_text(json.dumps({"score": score, "changes": trial.changes}))


def merit(changes):
    off = abs(math.log(changes["ppo.learning_rate"] / 3e-3))
    return -off - (changes["ppo.n_epochs"] != 8)


def fits(trial):
    """Every point does."""


def test_a_searcher_learns_from_finished_trials_and_keeps_to_its_points(tmp_path):
    config = sweep(tmp_path, SEARCHED, samples=25, searcher="optuna")
    trials, merits = plan(config), []
    for trial in trials:
        at = placed(config, trial, tmp_path, check=fits)
        assert at.changes["seed"] == trial.changes["seed"] == at.recipe.seed
        assert at.recipe.ppo.learning_rate == at.changes["ppo.learning_rate"]
        assert at.recipe.ppo.n_epochs == at.changes["ppo.n_epochs"] in (2, 4, 8)
        assert placed(config, trial, tmp_path, check=fits) == at  # it starts again where it was
        merits.append(merit(at.changes))
        finished(tmp_path, at, merits[-1])
    random = [merit(trial.changes) for trial in trials]
    assert merits[:8] == random[:8]
    assert np.mean(merits[-20:]) > np.mean(random) + 0.5


def searched(tmp_path, n_finished, **options):
    """A sweep of which some trials are finished, and its plan."""
    tmp_path.mkdir(exist_ok=True)
    config = sweep(tmp_path, SEARCHED, samples=20, searcher="optuna", **options)
    trials = plan(config)
    for trial in trials[:n_finished]:
        at = placed(config, trial, tmp_path, check=fits)
        finished(tmp_path, at, merit(at.changes))
    return config, trials


def begun(root, trial, rate, epochs):
    folder = trial_folder(root, trial.name)
    folder.mkdir(parents=True)
    point = {"ppo.learning_rate": rate, "ppo.n_epochs": epochs}
    (folder / POINT).write_text(json.dumps(point))


def test_trials_under_way_keep_others_away_from_their_points(tmp_path):
    away = []
    for root, crowd in ((tmp_path / "alone", 0), (tmp_path / "crowd", 12)):
        config, trials = searched(root, 20)
        for i, trial in enumerate(trials[20 : 20 + crowd]):
            begun(root, trial, 3e-3 * 1.02 ** (i - 6), 8)  # at the best place there is
        rates = [
            placed(config, trial, root, check=fits).changes["ppo.learning_rate"]
            for trial in trials[34:]
        ]
        away.append(np.mean([abs(math.log(rate / 3e-3)) for rate in rates]))
    assert away[1] > away[0] + 0.1


def test_a_trial_that_was_given_up_counts_as_one_that_is_over(tmp_path):
    config, trials = searched(tmp_path, 4, seed=70_000)  # and a large seed does not matter
    for trial in trials[4:8]:
        begun(tmp_path, trial, 5e-4, 2)
    planned = trials[8].changes
    before = placed(config, trials[8], tmp_path, check=fits).changes
    for trial in trials[4:8]:
        (trial_folder(tmp_path, trial.name) / STOPPED).write_text("given up")
    after = placed(config, trials[9], tmp_path, check=fits).changes
    assert before == planned and after != trials[9].changes


@pytest.mark.parametrize(
    "point",
    [
        {"ppo.learning_rate": "fast", "ppo.n_epochs": 2},
        {"ppo.learning_rate": 7.0, "ppo.n_epochs": 2},
        {"ppo.learning_rate": 1e-3, "ppo.n_epochs": [1]},
        {"ppo.learning_rate": 1e-3},
    ],
)
def test_points_that_are_not_of_the_space_are_not_learned_from(tmp_path, point):
    config, trials = searched(tmp_path / "clean", 12)
    expected = placed(config, trials[13], tmp_path / "clean", check=fits)
    config, trials = searched(tmp_path / "soiled", 12)
    begun(tmp_path / "soiled", trials[12], 1e-3, 2)
    (trial_folder(tmp_path / "soiled", trials[12].name) / POINT).write_text(json.dumps(point))
    assert placed(config, trials[13], tmp_path / "soiled", check=fits) == expected


def test_a_damaged_point_is_placed_anew_and_one_that_does_not_fit_stays_as_planned(tmp_path):
    config, trials = searched(tmp_path, 12)
    damaged = trial_folder(tmp_path, trials[0].name) / POINT
    damaged.write_bytes(b"{")
    again = placed(config, trials[0], tmp_path, check=fits)
    assert json.loads(damaged.read_text()) == {
        key: again.changes[key] for key in ("ppo.learning_rate", "ppo.n_epochs")
    }

    def never(trial):
        raise ConfigError("these values do not fit together")

    kept = placed(config, trials[13], tmp_path, check=never)
    assert kept.changes == trials[13].changes
    assert placed(config, trials[13], tmp_path, check=fits) == kept


def test_a_searched_trial_runs_and_reports_where_it_was_placed(tmp_path):
    config = sweep(tmp_path, {"ppo.learning_rate": {"uniform": [1e-3, 2e-3]}}, searcher="optuna")
    (trial,) = plan(config)
    result = run_trial(config, trial, tmp_path, ignore)
    assert result["changes"] == json.loads((trial_folder(tmp_path, trial.name) / POINT).read_text())


def test_a_search_that_cannot_be_is_refused_in_words(tmp_path, monkeypatch):
    def refusal(space):
        with pytest.raises(ConfigError) as error:
            require_searcher(sweep(tmp_path, space, searcher="optuna"))
        return str(error.value)

    assert "nothing to choose" in refusal({"seed": {"grid": [1]}})
    assert "cannot choose 'environment.options.data'" in refusal(
        {"environment.options.data": {"choice": ["a.txt"]}}
    )
    assert "JSON knows, got datetime.date" in refusal(
        {"ppo.n_epochs": {"choice": [datetime.date(2020, 1, 1)]}}
    )
    monkeypatch.setattr("metactl.sweep.searcher.find_spec", lambda name: None)
    assert "pip install optuna" in refusal({"seed": {"choice": [1, 2]}})


# One trial -----------------------------------------------------------------------------------


def test_a_trial_that_was_killed_ends_as_if_it_never_had_been(tmp_path):
    config = sweep(tmp_path, {"seed": {"grid": [3]}})
    (trial,) = plan(config)
    seen = []
    whole = run_trial(config, trial, tmp_path / "whole", lambda *at: seen.append(at))
    assert [steps for steps, _ in seen] == [160, 320, 480]

    def killed(steps, mean_return):
        if steps == 320:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(config, trial, tmp_path / "parts", killed)
    assert read_result(trial_folder(tmp_path / "parts", trial.name)) is None
    late = []
    assert run_trial(config, trial, tmp_path / "parts", lambda *at: late.append(at)) == whole
    assert late == seen[-2:]  # the update that was cut short is done again, and no other


def test_a_finished_trial_is_not_done_again(tmp_path):
    config = sweep(tmp_path, {"seed": {"grid": [3]}})
    (trial,) = plan(config)
    first = run_trial(config, trial, tmp_path, ignore)

    def fail(steps, mean_return):
        raise AssertionError

    assert run_trial(config, trial, tmp_path, fail) == first
    (trial_folder(tmp_path, trial.name) / "result.json").write_text('{"score": 1')
    assert run_trial(config, trial, tmp_path, ignore) == first  # a torn file counts as none


def test_a_sweep_leaves_the_mean_of_its_best_policies(tmp_path):
    config = sweep(tmp_path, {"seed": {"grid": [3, 4, 5]}}, mean_of=2)
    trials = plan(config)
    results = [run_trial(config, trial, tmp_path, ignore) for trial in trials]
    results.sort(key=lambda result: result["score"], reverse=True)
    outcome = Outcome(results=results, stopped=[], failed={}, left=[])
    write_report(config, trials, outcome, tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["points"] == {trial.name: trial.changes for trial in trials}
    left = Policy.load(tmp_path / "policy")
    best = [Policy.load(trial_folder(tmp_path, r["trial"]) / "policy") for r in results[:2]]
    seen = np.random.default_rng(0).normal(size=(5, len(left.card.observations)))
    expected = np.mean([policy.act(seen) for policy in best], axis=0)
    np.testing.assert_allclose(left.act(seen), expected, atol=1e-12)
    members = left.card.training["mean_of"]
    assert [member["score"] for member in members] == [r["score"] for r in results[:2]]
    assert missing_members(config, outcome) == ""
    one = Outcome(results=results[:1], stopped=[], failed={trials[1].name: "died"}, left=[])
    assert "made of 1 trials, not of mean_of=2: no more ended" in missing_members(config, one)


def test_a_trial_is_not_given_up_at_its_last_report_which_comes_before_its_score():
    scheduler, trial = _asha(), SimpleNamespace(trial_id="0")
    scheduler.on_trial_add(None, trial)
    for percent in (50, 100):
        decision = scheduler.on_trial_result(None, trial, {"percent": percent, "return": 1.0})
        assert decision == scheduler.CONTINUE


def test_a_mean_of_more_policies_than_trials_is_refused_before_anything_starts(tmp_path):
    config = sweep(tmp_path, {"seed": {"grid": [3, 4]}}, mean_of=3)
    with pytest.raises(ConfigError, match="mean_of must be at most 2, the number of trials, got 3"):
        check_sweep(config, plan(config))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("ppo.hidden", [[8], [4]]),
        ("environment.options.knobs", [["dropout"], ["dropout", "attention_span"]]),
        ("environment.options.internal", [False, True]),
    ],
)
def test_policies_of_unlike_kinds_are_not_averaged(tmp_path, key, values):
    config = sweep(tmp_path, {key: {"grid": values}}, mean_of=2)
    with pytest.raises(ConfigError, match=r"mean_of needs policies of one kind, and this one's"):
        check_sweep(config, plan(config))


def test_a_policy_is_scored_where_the_space_says(tmp_path):
    trained = sweep(tmp_path, {"seed": {"grid": [3]}})
    (trial,) = plan(trained)
    run_trial(trained, trial, tmp_path, ignore)
    policy = trial_folder(tmp_path, trial.name) / "policy"
    config = sweep(tmp_path, {"d_model": {"grid": [8, 16]}}, kind="apply", policy=str(policy))
    others = sweep(tmp_path, {"n_control_steps": {"grid": [4]}}, kind="apply", policy=str(policy))
    with pytest.raises(ConfigError, match=r"the policy decides \d+ times per run, got n_control"):
        check_sweep(others, plan(others))
    small, large = (run_trial(config, t, tmp_path / "apply", ignore) for t in plan(config))
    assert small["default_loss"] != large["default_loss"]
    for result in (small, large):
        gain = result["default_loss"] - result["loss"]
        assert result["score"] == pytest.approx(gain)
        assert result["score_low"] <= result["score"] <= result["score_high"]
    env_id, options = deployment(Policy.load(policy), {"d_model": 16})
    with ShardRow(env_id, 2, {**options, "split": "meta_train"}, 0) as shards:
        start = shards.knobs.default_positions(1)[0]
        played = play_arms(shards, [policy_arm(Policy.load(policy), start)], 2, config.seed)
    assert large["loss"] == pytest.approx(np.mean([run.final_test for run in played["policy"]]))
    assert large["loss"] != large["default_loss"]


def test_a_policy_is_scored_on_every_kind_of_run_that_it_learned_on(tmp_path):
    config = sweep(tmp_path, {"seed": {"grid": [3]}})
    (trial,) = plan(config)
    run_trial(config, trial, tmp_path, ignore)
    policy = Policy.load(trial_folder(tmp_path, trial.name) / "policy")
    recipe = policy.card.training["config"]
    kinds = [{}, {"d_model": 8, "disturb": 1.0}]
    environment = {**recipe["environment"], "variants": kinds, "n_workers": 2}
    training = {**policy.card.training, "config": {**recipe, "environment": environment}}
    policy = Policy(replace(policy.card, training=training), policy.weights)
    few = play_kinds(replace(config, n_tasks=2), policy)  # two of each kind at least
    assert len(few["policy"]) == 4
    config = replace(config, n_tasks=5)
    both = play_kinds(config, policy)
    alone = [
        play_pair(replace(config, n_tasks=3, seed=config.seed + i), policy, kind)
        for i, kind in enumerate(({}, {"d_model": 8}))
    ]
    for arm, runs in both.items():
        expected = [run.final_test for pair in alone for run in pair[arm]]
        assert [run.final_test for run in runs] == expected


# On Ray --------------------------------------------------------------------------------------


def test_a_trial_for_which_there_is_never_room_is_refused():
    check_resources("a trial", 2, 0, {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"a trial needs 0.5 GPU, .* cluster has 0"):
        check_resources("a trial", 1, 0.5, {"CPU": 2.0})


def test_an_address_where_nobody_listens_is_refused():
    with socket.socket() as free:  # bound, but not listening
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"No Ray cluster at '{address}'"), cluster(address):
            pass


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        ({"environment.options.d_modle": {"grid": [8]}}, ["d_modle", "Did you mean 'd_model'"]),
        ({"ppo.paired_runs": {"grid": [3]}}, ["paired_runs must divide the 4 runs", "got 3"]),
        ({"environment.options.data": {"grid": ["/nowhere"]}}, ["'/nowhere' does not exist"]),
    ],
)
def test_what_a_trial_would_refuse_is_refused_before_anything_starts(tmp_path, space, parts):
    with pytest.raises(ConfigError, match="trial 000-") as error:
        check_trials(plan(sweep(tmp_path, space)))
    for part in parts:
        assert part in str(error.value)


def test_a_policy_that_is_not_there_is_refused_before_anything_starts(tmp_path):
    config = sweep(tmp_path, {"d_model": {"grid": [8]}}, kind="apply", policy="defualt")
    with pytest.raises(ConfigError, match=r"trial 000-.*Did you mean 'default'"):
        check_trials(plan(config))


def test_a_trial_finds_its_files_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    monkeypatch.chdir(tmp_path)
    (trial,) = plan(sweep(tmp_path, {"environment.options.data": {"grid": ["text"]}}))
    assert trial.recipe.environment.options["data"] == str(tmp_path / "text")
    config = sweep(tmp_path, {"d_model": {"grid": [8]}}, kind="apply", policy="text")
    assert plan(config)[0].policy == str(tmp_path / "text")


def start(tmp_path, run_dir):
    config = tmp_path / "sweep.yaml"
    values = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "space": {"seed": {"grid": [1, 2, 3]}, "ppo.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        "n_tasks": 2,
    }
    config.write_text(json.dumps(values))
    return subprocess.Popen(
        [sys.executable, "-m", "metactl", "sweep", "--config", config, "--run-dir", run_dir],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(  # the latter as a batch system says it
    "how", ["Ctrl-C", pytest.param("the end of its time", marks=pytest.mark.soak)]
)
def test_an_interrupted_sweep_says_what_is_left_and_how_to_go_on(tmp_path, how):
    sweep(tmp_path, {"seed": {"grid": [1]}})
    recipe = tmp_path / "recipe.yaml"
    longer = json.loads(recipe.read_text())
    longer["ppo"]["total_timesteps"] = 64_000
    recipe.write_text(json.dumps(longer))
    run = start(tmp_path, tmp_path / "run")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("trials/*/checkpoints/step-*[1-9]0")):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if how == "Ctrl-C":
        os.killpg(run.pid, signal.SIGINT)
    else:
        run.terminate()
    out, err = run.communicate(timeout=200)
    assert run.returncode == 130, err
    assert "Stopped with 3 trials left; the same command goes on" in out
    assert "Traceback" not in out + err
    assert not list((tmp_path / "run").glob("trials/*/stopped.txt"))
