"""`metactl evaluate` end to end at toy size."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from command_line import metactl, refused, train_arguments

from metactl.policy import Policy
from metactl.signals import INTERNAL_NAMES


def test_a_policy_works_where_there_is_no_base_to_move(trained: Path, tmp_path: Path) -> None:
    small = ("--rotation", "nope", "--n-tasks", 2, "--grid", 2, "--n-envs", 4, "--n-workers", 0)
    assert metactl("evaluate", "--policy", trained / "policy", *small) == 0


def test_evaluate_reports_every_arm_with_intervals(trained: Path, tmp_path: Path) -> None:
    report, figure = tmp_path / "new" / "report.json", tmp_path / "runs.png"
    static = ("--static", "dropout=0,embedding_width=0.5")
    twin = shutil.copytree(trained / "policy", tmp_path / "twin")
    small = (*static, "--n-tasks", 3, "--grid", 3, "--n-envs", 6, "--n-workers", 0)
    small += ("--rival", twin, "--json", report, "--figure", figure, "--beforehand")
    small += ("--disturbed",)
    assert metactl("evaluate", "--policy", trained / "policy", *small) == 0
    summary = json.loads(report.read_text())
    assert set(summary["disturbed"]["arms"]) >= {"policy", "best static", "yoked", f"rival {twin}"}
    arms = {"policy", "default", "best static", "per-task best static", "replay", "responsive rule"}
    arms |= {"static dropout=0, embedding_width=0.5", "best static of the grid"}
    arms |= {"random moves", "yoked", "another run's all signals", "gap rule (dropout)"}
    arms |= {"responsive rule, no smoothing", "window warm-up (span)"}
    arms |= {f"rival {twin}", "best static of training tasks", "the same, told the task"}
    arms |= {"policy from there", "policy from the worst static"}  # beforehand
    arms |= {"policy without its guard"}
    assert summary["grid_points"] == 4
    assert set(summary["arms"]) == arms
    for arm in arms - {"policy"}:
        interval = summary["policy_minus"][arm]["final_test"]
        assert interval["low"] <= interval["estimate"] <= interval["high"]
        assert len(summary["arms"][arm]["final_test_per_task"]) == 3
    assert summary["policy_minus"][f"rival {twin}"]["final_test"]["estimate"] == 0
    assert summary["arms"]["default"]["flops"] > 0
    assert 0 <= summary["arms"]["default"]["homeostasis_index"] <= 1
    ends = summary["arms"]["default"]["final_knobs"]
    assert ends["dropout"]["median"] == 0.1 and ends["dropout"]["at_lowest"] == 0
    assert ends["embedding_width"] == {
        **{"tenth": 1, "median": 1, "ninetieth": 1},
        **{"at_lowest": 0, "at_highest": 1},
    }
    assert summary["policy_minus"][f"rival {twin}"]["within_2_percent"] == 1
    assert set(summary["moves_explained_by_progress"]) >= {"dropout", "rope_base"}
    assert figure.stat().st_size > 5_000


def test_the_full_suite_adds_populations_single_signals_and_disturbed_runs(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    small = ("--n-tasks", 2, "--grid", 2, "--n-envs", 24, "--n-workers", 0, "--suite", "full")
    small += ("--schedule-runs", 1, "--linear-runs", 0, "--static", "dropout=0")
    small += ("--optimizer-steps", 10)
    code = metactl("evaluate", "--policy", trained / "policy", "--json", report, *small)
    assert code == 0
    summary = json.loads(report.read_text())
    arms = summary["arms"]
    for kind in ("PBT", "PB2"):
        assert arms[f"{kind}, best of 8"]["flops"] > 2 * arms["default"]["flops"]
    assert {"another run's probe loss", "another run's train loss"} <= set(arms)
    assert {"policy, dropout alone", "policy, without dropout"} <= set(arms)
    assert {"policy from there", "policy from the worst static"} <= set(arms)
    assert {"best static of training tasks", "the same, told the task"} <= set(arms)
    assert {"best schedule", "schedule told the task"} <= set(arms)
    rules = {"responsive rule", "responsive rule, no smoothing", "gap rule (dropout)"}
    rules |= {"window warm-up (span)"}
    there = summary["begun_at_best_static"]["arms"]
    moving = rules | {"policy", "replay", "yoked", "random moves", "PBT, best of 8"}
    moving |= {"policy without its guard"}
    moving |= {"PB2, best of 8", "best schedule", "schedule told the task"}
    assert set(there) == moving | {"best static of training tasks"}
    assert there["policy"]["final_test"] != arms["policy"]["final_test"]
    disturbed = summary["disturbed"]
    blind = {"best static", "replay", "yoked", "best schedule", "schedule told the task"}
    assert set(disturbed["arms"]) == rules | blind | {"policy", "policy without its guard"}
    for figures in disturbed["arms"].values():
        assert 0 <= figures["settling_time"] <= 1 and figures["peak_drive"] >= 0
        assert figures["excess_loss_area"] != 0
    assert "something befalling each" in capsys.readouterr().out


def test_a_policy_may_learn_from_inside_its_models_and_be_judged_there(tmp_path: Path) -> None:
    inside = ("--set", "environment.options.internal=true", "--set", "set_point_runs=4")
    assert metactl(*train_arguments(tmp_path / "run", *inside)) == 0
    policy = Policy.load(tmp_path / "run" / "policy")
    assert {f"signal/{name}" for name in INTERNAL_NAMES} <= set(policy.card.observations)
    report = tmp_path / "report.json"
    small = ("--n-tasks", 2, "--grid", 2, "--n-envs", 4, "--n-workers", 0, "--json", report)
    assert metactl("evaluate", "--policy", tmp_path / "run" / "policy", *small) == 0
    found = json.loads(report.read_text())["arms"]["policy"]["mean_signals"]
    assert set(found) == set(INTERNAL_NAMES) and found["stable_rank"] > 0
    blind = ("--set", "internal=false")  # a run that nobody looks into
    assert metactl("evaluate", "--policy", tmp_path / "run" / "policy", *small, *blind) == 0
    assert "mean_signals" not in json.loads(report.read_text())["arms"]["policy"]


def test_an_evaluation_goes_on_in_its_directory_and_no_other_runs(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--n-tasks", 2, "--grid", 2, "--n-envs", 24, "--n-workers", 0)
    small += ("--linear-runs", 1, "--optimizer-steps", 5)
    kept = ("--run-dir", tmp_path / "run")
    reports = []
    for name in ("first.json", "again.json"):
        report = tmp_path / name
        evaluate = ("evaluate", "--policy", trained / "policy", *small, *kept, "--json", report)
        assert metactl(*evaluate) == 0
        files = {path.name for path in (tmp_path / "run" / "played").iterdir()}
        reports.append((report.read_bytes(), files))
    assert reports[0] == reports[1]
    linear = tmp_path / "run" / "linear"
    assert Policy.load(linear).card.hidden == ()
    assert metactl(*evaluate, "--rival", linear) == 0
    arms = json.loads(report.read_text())["arms"]
    assert arms[f"rival {linear}"]["final_test"] == arms["linear policy"]["final_test"]
    foreign = ("evaluate", "--run-dir", trained, *small)
    assert "holds a run of 'train', not of 'evaluate'" in refused(capsys, *foreign)


def test_evaluate_says_what_room_there_is_in_each_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "room.json"
    small = ("--n-tasks", 2, "--grid", 2, "--n-envs", 8, "--n-workers", 0)
    options = ("--optimizer-steps", 40, "--set", "knobs=[dropout]", "--json", report)
    families = ("--families", "recall", "waves")
    assert metactl("evaluate", "--headroom", *families, *small, *options) == 0
    found = json.loads(report.read_text())["families"]
    assert set(found) == {"recall", "waves"}
    for family in found.values():
        assert set(family["knobs"]) == {"dropout"} and family["horizon"] == 40
        assert family["knobs"]["dropout"]["best value minus default"]["high"] is not None
    printed = capsys.readouterr().out
    assert "Room for gain" in printed and "One knob alone" in printed and "waves" in printed


def test_what_was_asked_for_is_written_before_it_is_shown(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(*parts: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("metactl.report.evaluation_report", full)
    policy = shutil.copytree(trained / "policy", tmp_path / "policy")
    files = ("--json", tmp_path / "report.json", "--figure", tmp_path / "runs.png")
    small = ("--n-tasks", 2, "--grid", 1, "--n-envs", 2, "--n-workers", 0, "--optimizer-steps", 5)
    code = metactl("evaluate", "--policy", policy, *small, *files, "--update-card")
    assert code == 2 and "No space left" in capsys.readouterr().err
    arms = json.loads((tmp_path / "report.json").read_text())["arms"]
    assert set(Policy.load(policy).card.evaluation["arms"]) == set(arms)
    assert (tmp_path / "runs.png").stat().st_size > 5_000


def test_headroom_takes_its_families_by_their_flag(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("evaluate", "--headroom", "--set", "task=digits")
    assert "name families by --families" in refused(capsys, *arguments)


def test_a_card_that_cannot_be_updated_is_refused_before_the_work(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("metactl.rundir.require_place", denied)
    policy = shutil.copytree(trained / "policy", tmp_path / "policy")
    words = refused(capsys, "evaluate", "--policy", policy, "--update-card")
    assert "policy.json' cannot be written: Permission denied" in words
