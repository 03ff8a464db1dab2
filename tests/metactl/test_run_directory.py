import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from metactl.commands import Check, Sweep, with_home
from metactl.config import ConfigError, TrainConfig, dump
from metactl.demo import clear_demo
from metactl.rundir import (
    RunDirectoryError,
    differences,
    discard_if_refused,
    open_run_directory,
    resolve_data,
    writable,
)

CONFIG = {"seed": 1, "ppo": {"gamma": 1.0, "hidden": [64, 64]}}


def test_a_new_directory_holds_the_command_the_versions_and_the_config(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/metactl", "train", "--name", "two words"])
    path = open_run_directory(tmp_path / "deep" / "run", "train", CONFIG)
    assert path == tmp_path / "deep" / "run"
    record = yaml.safe_load((path / "config.yaml").read_text())
    assert record["command"] == "metactl train --name 'two words'"
    assert record["kind"] == "train"
    assert record["config"] == CONFIG
    assert record["versions"]["torch"] == version("torch")
    assert record["versions"]["python"] == sys.version.split()[0]
    assert {"metactl", "numpy", "gymnasium", "stable-baselines3"} <= record["versions"].keys()


def test_an_empty_directory_can_be_used(tmp_path):
    assert open_run_directory(tmp_path, "train", CONFIG) == tmp_path
    assert (tmp_path / "config.yaml").exists()


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(tmp_path):
    open_run_directory(tmp_path, "train", CONFIG)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(RunDirectoryError, match=r"already holds a run; .*--resume") as caught:
        open_run_directory(tmp_path, "train", {"seed": 2})
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_foreign_directory_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="exists and is not empty"):
        open_run_directory(tmp_path, "train", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunDirectoryError, match="run"):
        open_run_directory(tmp_path / "run", "train", CONFIG)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p], ids=["missing", "empty"])
def test_there_must_be_a_run_to_resume(tmp_path, make):
    with pytest.raises(RunDirectoryError, match="holds no run to resume"):
        open_run_directory(make(tmp_path), "train", CONFIG, resume=True)
    assert not list(tmp_path.iterdir())


def test_the_same_run_can_be_resumed(tmp_path):
    config = dump(TrainConfig())
    open_run_directory(tmp_path, "train", config)
    assert open_run_directory(tmp_path, "train", config, resume=True) == tmp_path


def test_resuming_with_another_config_names_the_keys_that_differ(tmp_path):
    open_run_directory(tmp_path, "train", CONFIG)
    other = {"seed": 1, "ppo": {"gamma": 0.9, "hidden": [64]}, "extra": True}
    with pytest.raises(RunDirectoryError, match=r": extra, ppo\.gamma, ppo\.hidden differ"):
        open_run_directory(tmp_path, "train", other, resume=True)


def test_resuming_another_command_names_both(tmp_path):
    open_run_directory(tmp_path, "evaluate", CONFIG)
    with pytest.raises(RunDirectoryError, match="holds a run of 'evaluate', not of 'train'"):
        open_run_directory(tmp_path, "train", CONFIG, resume=True)


@pytest.mark.parametrize(
    "text", ["", "[]", "a: [", "kind: train", "\0", "{versions: 1, kind: train, config: 7}"]
)
def test_a_damaged_record_cannot_be_resumed(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"config\.yaml' is damaged"):
        open_run_directory(tmp_path, "train", CONFIG, resume=True)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written: Not a directory"):
        open_run_directory(tmp_path / "file" / "run", "train", CONFIG)


def test_a_name_that_the_file_system_refuses_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match="cannot be written: File name too long"):
        open_run_directory(tmp_path / ("x" * 300), "train", CONFIG)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c"]),
        ({"a": 1}, {"b": 1}, ["a", "b"]),
        ({"a": {"b": 1}}, {"a": 1}, ["a"]),
    ],
)
def test_differences_are_dotted_keys(left, right, expected):
    assert differences(left, right) == expected


def test_a_data_path_becomes_absolute_and_must_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("x")
    assert resolve_data({"data": "text", "context": 16}) == {
        "data": str(tmp_path / "text"),
        "context": 16,
    }
    assert resolve_data({"context": 16}) == {"context": 16}
    with pytest.raises(ConfigError, match="Data 'nowhere' does not exist"):
        resolve_data({"data": "nowhere"})


HOLD = """
import sys, time
from metactl.rundir import open_run_directory
open_run_directory(sys.argv[1], "train", {"seed": 1})
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_are_not_at_work_in_one_directory(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match="is in use by another process"):
            open_run_directory(tmp_path, "train", {"seed": 1}, resume=True)
        other.kill()
    for _ in range(2):  # free after a kill, and this process may come back
        assert open_run_directory(tmp_path, "train", {"seed": 1}, resume=True) == tmp_path


def test_whoever_comes_second_does_not_write_over_the_record(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        record = (tmp_path / "config.yaml").read_text()
        (tmp_path / "config.yaml").unlink()  # as if it were not written yet
        with pytest.raises(RunDirectoryError, match="is in use by another process"):
            open_run_directory(tmp_path, "train", {"seed": 2})
        assert not (tmp_path / "config.yaml").exists()
        (tmp_path / "config.yaml").write_text(record.replace("kind: train", "kind: demo"))
        with pytest.raises(RunDirectoryError, match="is in use by another process"):
            clear_demo(tmp_path)
        assert (tmp_path / "config.yaml").exists()
        other.kill()
    (tmp_path / "tb").mkdir()
    clear_demo(tmp_path)
    assert open_run_directory(tmp_path, "demo", {"seed": 1}) == tmp_path
    shutil.rmtree(tmp_path)
    open_run_directory(tmp_path, "train", {"seed": 1})  # made anew by one process: locked anew
    assert subprocess.run(command, capture_output=True).returncode == 1


def test_what_is_resumed_is_never_taken_back(tmp_path):
    open_run_directory(tmp_path / "a", "train", CONFIG)
    with pytest.raises(ValueError, match="no"), discard_if_refused(tmp_path / "a", resume=True):
        raise ValueError("no")
    assert (tmp_path / "a" / "config.yaml").exists()
    with pytest.raises(ValueError, match="no"), discard_if_refused(tmp_path / "a"):
        raise ValueError("no")
    assert not (tmp_path / "a").exists()


def test_a_picture_of_an_unknown_kind_is_refused_before_the_work(tmp_path):
    assert writable(tmp_path / "a.PDF", picture=True) == tmp_path / "a.PDF"
    with pytest.raises(ConfigError, match=r"must end in .png, .pdf, .svg, got 'a.bmp'"):
        writable(tmp_path / "a.bmp", picture=True)


def test_a_foreign_folder_with_a_config_of_its_own_is_no_demo(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    record = tmp_path / "config.yaml"
    for text in ("kind: demographics\n", "kind: demo\n", "about: 'kind: demo'\nversions: {}\n"):
        record.write_text(text)
        with pytest.raises(RunDirectoryError, match="holds no demo"):
            clear_demo(tmp_path)
    record.unlink()
    (tmp_path / "thesis.tex").unlink()
    open_run_directory(tmp_path, "demo", CONFIG)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"holds 'notes\.txt' beside an earlier demo"):
        clear_demo(tmp_path)
    assert (tmp_path / "notes.txt").exists() and record.exists()


def test_a_run_that_was_killed_in_its_first_write_left_no_run(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.123.tmp").write_text("ki")
    assert open_run_directory(tmp_path, "train", CONFIG) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]


def test_the_folder_where_somebody_stands_is_emptied_and_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = open_run_directory(".", "train", CONFIG)
    with pytest.raises(ValueError, match="no"), discard_if_refused(run_dir):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_demo_may_begin_in_an_empty_folder_and_where_one_kept_its_policies(tmp_path):
    clear_demo(tmp_path)
    open_run_directory(tmp_path, "demo", CONFIG)
    (tmp_path / "policies" / "000000040").mkdir(parents=True)
    clear_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    clear_demo(tmp_path)


def test_a_home_that_the_shell_did_not_spell_out_is_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    command = with_home(Sweep(run_dir=Path("~/sweep")))
    assert command.run_dir == tmp_path / "sweep"
    assert with_home(Check(target="a:B")) == Check(target="a:B")
