"""An evaluation that was stopped goes on where it was."""

import io
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_plant import TOY

from metactl.config import ConfigError
from metactl.controllers import Replay
from metactl.evaluation import kept
from metactl.evaluation.arms import Arm, paired_episodes, play_arms, static_arm
from metactl.evaluation.kept import KeepingRow, _keep, _packed, _read, sources_that_play
from metactl.rollout import PlannedRun

N = 8
DEFAULT = np.array([0.5, 0.5])


class Counting(KeepingRow):
    """Counts the populations that it really plays."""

    def __init__(self, folder, **options):
        super().__init__(folder, TOY, 4, {"n_control_steps": N, **options}, 0)
        self.played = 0
        inner = self._local.play

        def play(chunk, between=None):
            self.played += 1
            return inner(chunk, between)

        self._local.play = play


def ramp():
    return Replay(np.linspace(0.2, 0.8, N + 1)[:, None].repeat(2, axis=1))


def arms():
    return [
        static_arm("default", DEFAULT),
        Arm(name="ramp", positions=DEFAULT, controllers=(ramp(),)),
    ]


def trials(n=8):
    episodes, controller = paired_episodes(n, 0, DEFAULT), ramp()
    return [PlannedRun(arm="ramp", episode=episode, controller=controller) for episode in episodes]


def same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.arm == b.arm and a.final_test == b.final_test and a.diverged == b.diverged
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_array_equal(a.observations, b.observations)
        assert a.values.keys() == b.values.keys()
        for name in a.values:
            np.testing.assert_array_equal(a.values[name], b.values[name])


def test_what_was_played_is_not_played_again_but_for_one_population(tmp_path):
    with Counting(tmp_path) as row:
        first = play_arms(row, arms(), 8, 0)
        assert row.played == 4
    with Counting(tmp_path) as row:
        again = play_arms(row, arms(), 8, 0)
        other = play_arms(row, arms(), 8, 1)
        assert row.played == 1 + 4
    for arm in first:
        same(first[arm], again[arm])
        assert [r.final_test for r in other[arm]] != [r.final_test for r in first[arm]]


def test_a_play_that_was_stopped_goes_on_where_it_was(tmp_path):
    wanted = trials()
    chunks = [wanted[:4], wanted[4:]]
    with Counting(tmp_path) as row:
        list(itertools.islice(row.play_chunks(chunks, None), 1))
    with Counting(tmp_path) as row:
        results = row.play(wanted)
        assert row.played == 2  # one to see that it comes out the same, one that was left
    with Counting(tmp_path / "..") as row:
        same(results, row.play(wanted))


def test_runs_of_other_options_are_others(tmp_path):
    with Counting(tmp_path) as row:
        near = row.play(trials(4))
    with Counting(tmp_path, farther=2.0) as row:
        far = row.play(trials(4))
        assert row.played == 1
    assert near[0].final_test < far[0].final_test


def test_damaged_files_are_played_again(tmp_path):
    with Counting(tmp_path) as row:
        results = row.play(trials())
    halved, emptied = sorted(tmp_path.glob("*.played"))
    whole = halved.read_bytes()
    halved.write_bytes(whole[: len(whole) // 2])
    emptied.write_bytes(b"")
    with Counting(tmp_path) as row:
        same(results, row.play(trials()))
        assert row.played == 2
    for place in range(0, len(whole), len(whole) // 64):  # a flipped bit, wherever it is
        halved.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        assert _read(halved) is None
    halved.write_bytes(whole)
    assert _read(halved) is not None


def test_files_under_each_others_names_and_pipes_are_played_again(tmp_path):
    def again(n_played):
        with Counting(tmp_path) as row:
            same(results, row.play(trials()))
            assert row.played == n_played

    with Counting(tmp_path) as row:
        results = row.play(trials())
    one, other = sorted(tmp_path.glob("*.played"))
    other.write_bytes(one.read_bytes())
    assert _read(one) is not None and _read(other) is None
    again(2)  # the other, and the first once more: whether it comes out the same
    for path in (one, other):
        path.unlink()
        os.mkfifo(path)
    again(2)
    assert one.is_file() and other.is_file()


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_file_with_code_in_it_is_played_again_and_its_code_is_not_run(tmp_path):
    with Counting(tmp_path) as row:
        results = row.play(trials(4))
    (path,) = tmp_path.glob("*.played")
    mark = tmp_path / "it ran"
    hostile = np.empty(4, dtype=object)
    hostile[:] = [Hostile(mark)] * 4
    np.savez(packed := io.BytesIO(), arm=hostile)
    _keep(path, packed.getvalue())
    with Counting(tmp_path) as row:
        same(results, row.play(trials(4)))
        assert row.played == 1
    assert not mark.exists()
    np.load(io.BytesIO(packed.getvalue()), allow_pickle=True)["arm"]
    assert mark.exists()  # so it would have run


def test_runs_of_other_code_are_refused(tmp_path):
    with Counting(tmp_path) as row:
        row.play(trials(4))
    (path,) = tmp_path.glob("*.played")
    changed = [replace(run, final_test=run.final_test + 1e-9) for run in _read(path)]
    _keep(path, _packed(changed))
    with Counting(tmp_path) as row, pytest.raises(ConfigError, match="come out otherwise now"):
        row.play(trials(4))


def test_names_are_the_same_in_every_process(tmp_path):
    program = (
        "import sys; from pathlib import Path; import test_kept_runs as t\n"
        "with t.Counting(Path(sys.argv[1])) as row:\n"
        "    row.play(t.trials(4))\n"
        "print(row.played)"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        command = [sys.executable, "-c", program, str(tmp_path)]
        subprocess.run(command, env=environment, check=True, timeout=120)
    assert len(list(tmp_path.glob("*.played"))) == 1


def test_runs_are_kept_by_the_code_that_plays_them_and_not_by_what_reports(monkeypatch, tmp_path):
    sources = sources_that_play()
    plays = {"env", "rollout", "signals", "knobs", "policy", "run", "evaluation.bandit"}
    plays |= {"controllers", "controllers.guard", "controllers.learned", "evaluation.pbt"}
    assert {f"metactl.{name}" for name in plays} <= sources.keys()
    reports = {"cli", "report", "evaluation.summary", "evaluation.suite", "attach", "sweep.run"}
    assert not {f"metactl.{name}" for name in reports} & sources.keys()

    def name_of_a_file():
        kept._source.cache_clear()
        with KeepingRow(tmp_path, TOY, 4, {"n_control_steps": N}, 0) as row:
            return row._path(trials(4), None)

    before = name_of_a_file()
    assert name_of_a_file() == before
    other = {**sources, "metactl.controllers.guard": b"pass"}
    monkeypatch.setattr(kept, "sources_that_play", lambda: other)
    assert name_of_a_file() != before
    kept._source.cache_clear()
