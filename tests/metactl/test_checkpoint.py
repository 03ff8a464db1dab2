import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from metactl.checkpoint import (
    from_tensors,
    load_newest_checkpoint,
    save_checkpoint,
    to_tensors,
)

# Forks a process that saves as fast as it can, kills it, and says what is left; five times.
SAVE_AND_KILL = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from metactl.checkpoint import load_newest_checkpoint, save_checkpoint

torch.set_num_threads(1)

def save_for_ever(folder):
    step = 0
    while True:
        step += 1
        tensors = {f"t{i}": torch.full((200, 500), step) for i in range(4)}
        save_checkpoint(folder, step, tensors, {"step": step})
        (folder / "done").write_text(str(step))

for trial, delay in enumerate((0.0, 0.013, 0.05, 0.111, 0.3)):
    folder = Path(sys.argv[1]) / str(trial)
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        save_for_ever(folder)
    deadline = time.monotonic() + 10
    while not (folder / "done").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    alive = os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1] if alive else None
    loaded = load_newest_checkpoint(folder)
    values = sorted({float(x) for t in loaded[0].values() for x in t.unique()}) if loaded else None
    print(json.dumps({
        "alive": alive,
        "killed": status == signal.SIGKILL,
        "done": int((folder / "done").read_text() or 0),
        "mid_work": any(p.name.startswith(".") for p in folder.iterdir()),
        "values": values,
        "step": loaded[1]["step"] if loaded else None,
    }))
"""


def tensors(value):
    return {"a": torch.full((3, 2), float(value)), "b": torch.tensor([value], dtype=torch.int64)}


def save(folder, *steps):
    return [save_checkpoint(folder, step, tensors(step), {"step": step}) for step in steps]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_holds_what_was_saved(tmp_path):
    state = {
        "weights": torch.randn(3, 4),
        "transposed": torch.randn(3, 4).T,
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "seeds": torch.tensor([2**62, -1]),
        "exact": torch.tensor([1 / 3], dtype=torch.float64),
    }
    scalars = {"step": 3, "rate": 0.1, "nested": {"list": [1, None, "x"]}}
    save_checkpoint(tmp_path, 3, state, scalars)
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0].keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[0][name].dtype == tensor.dtype
        assert torch.equal(loaded[0][name], tensor)
    assert loaded[1] == scalars


def test_the_newest_three_are_kept(tmp_path):
    save(tmp_path, 1, 2, 9, 10, 30)
    assert names(tmp_path) == [f"step-{step:012d}" for step in (9, 10, 30)]


def test_the_newest_is_the_one_with_the_most_steps_not_the_last_written(tmp_path):
    older, _ = save(tmp_path, 99, 100)
    os.utime(older, (2**33, 2**33))
    assert load_newest_checkpoint(tmp_path)[1] == {"step": 100}


def test_where_a_run_begins_anew_what_it_keeps_is_not_dropped_for_what_was_damaged(tmp_path):
    for later in save(tmp_path, 8, 12, 16):
        (later / "state.json").write_text("{}")
    save(tmp_path, 4)
    assert load_newest_checkpoint(tmp_path)[1] == {"step": 4}
    assert names(tmp_path) == [f"step-{4:012d}"]
    save(tmp_path, 9)
    save(tmp_path, 5)  # of whom could not read the later one just then
    assert names(tmp_path) == [f"step-{step:012d}" for step in (4, 5, 9)]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, tensors(7), {"step": "again"})
    state, scalars = load_newest_checkpoint(tmp_path)
    assert scalars == {"step": "again"}
    assert state["b"].tolist() == [7]


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p], ids=["no", "empty"])
def test_there_is_nothing_to_load_in_a_folder_without_checkpoints(tmp_path, make):
    assert load_newest_checkpoint(make(tmp_path)) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    path.write_bytes(blob)


def remove(path):
    path.unlink()


def blank(path):
    path.write_bytes(b"\0" * path.stat().st_size)


def tamper_scalars(path):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "scalars": manifest["scalars"].replace("2", "3")}))


DAMAGES = [
    *((damage, "state.safetensors") for damage in (truncate, flip, remove, blank)),
    *((damage, "state.json") for damage in (truncate, flip, remove, blank, tamper_scalars)),
]


@pytest.mark.parametrize(
    ("damage", "file"), DAMAGES, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage, file):
    _, newest = save(tmp_path, 1, 2)
    damage(newest / file)
    with caplog.at_level(logging.WARNING, logger="metactl"):
        state, scalars = load_newest_checkpoint(tmp_path)
    assert scalars == {"step": 1}
    assert state["b"].tolist() == [1]
    assert [str(newest) in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("manifest", [[], 1, None, {}, {"scalars": 1}])
def test_a_manifest_that_is_no_manifest_is_passed_over_with_a_warning(tmp_path, caplog, manifest):
    _, newest = save(tmp_path, 1, 2)
    (newest / "state.json").write_text(json.dumps(manifest))
    assert load_newest_checkpoint(tmp_path)[1] == {"step": 1}
    assert len(caplog.records) == 1


def test_there_is_nothing_to_load_when_all_checkpoints_are_damaged(tmp_path, caplog):
    for path in save(tmp_path, 1, 2):
        (path / "state.json").unlink()
    assert load_newest_checkpoint(tmp_path) is None
    assert len(caplog.records) == 2


def test_a_draft_that_a_kill_left_behind_is_no_checkpoint_and_in_no_way(tmp_path):
    (checkpoint,) = save(tmp_path, 1)
    draft = tmp_path / ".step-000000000002.draft"
    draft.mkdir()
    (draft / "state.safetensors").write_bytes((checkpoint / "state.safetensors").read_bytes())
    assert load_newest_checkpoint(tmp_path)[1] == {"step": 1}
    save(tmp_path, 2)
    assert load_newest_checkpoint(tmp_path)[1] == {"step": 2}
    assert not draft.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have_are_no_state_and_spoil_nothing(tmp_path, value):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 2, tensors(2), {"bad": value})
    assert load_newest_checkpoint(tmp_path)[1] == {"step": 1}


def test_a_kill_at_any_moment_leaves_a_newest_checkpoint_that_is_whole(tmp_path):
    command = [sys.executable, "-c", SAVE_AND_KILL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == 5
    assert all(kill["alive"] and kill["killed"] for kill in kills)
    assert any(kill["mid_work"] for kill in kills)
    assert max(kill["done"] for kill in kills) > 3
    for kill in kills:
        assert kill["values"] == [kill["step"]]
        assert kill["step"] >= max(kill["done"], 1)


def test_what_was_an_array_is_one_again_and_a_tensor_a_tensor():
    state = {
        "run/weights": torch.ones(2),
        "run/flags": np.array([True, False]),
        "positions": np.zeros((1, 2)),
    }
    back = from_tensors(to_tensors(state))
    assert {name: type(value) for name, value in back.items()} == {
        name: type(value) for name, value in state.items()
    }
    assert back["run/flags"].dtype == bool


def test_what_is_no_checkpoint_folder_is_passed_over_and_replaced(tmp_path):
    save(tmp_path, 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"step-{7:012d}").symlink_to(elsewhere)
    (tmp_path / f"step-{8:012d}").write_text("a file")
    (tmp_path / f"step-{9:012d}").mkdir()
    (tmp_path / f"step-{9:012d}" / "state.json").write_text("[" * 100_000)
    os.mkfifo(tmp_path / f"step-{9:012d}" / "state.safetensors")
    assert load_newest_checkpoint(tmp_path)[1] == {"step": 1}
    save(tmp_path, 7, 8, 9)
    assert load_newest_checkpoint(tmp_path)[1] == {"step": 9}
    assert elsewhere.is_dir()
