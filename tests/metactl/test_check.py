"""`metactl check`: what it finds, and what it says of it."""

import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import metactl, refused

from metactl import Knob, Measurement, TrainingRun
from metactl.check import check_training_run


@pytest.mark.parametrize("text", ["1 / 0", "def", "import nowhere"])
def test_a_module_that_cannot_be_imported_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert f"Module {name!r} cannot be imported" in refused(capsys, "check", f"{name}:Run")
    assert "Module '.foo' cannot be imported" in refused(capsys, "check", ".foo:Run")


def test_check_finds_nothing_wrong_with_our_environment(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert metactl("check", "envs:AdaptiveTransformer-v0") == 0
    assert "0 problems" in capsys.readouterr().out


FAULTY_RUN = '''
import numpy as np
from metactl import Knob, Measurement, TrainingRun

class Forgetful(TrainingRun):
    """Ignores its seed, cannot be restored, and one of its knobs does nothing."""
    n_runs, horizon = 2, 40
    knobs = (Knob(name="rate", low=0.0, high=1.0, default=0.5),
             Knob(name="decoration", low=0.0, high=1.0, default=0.5))
    def reset(self, rows, tasks, seeds):
        self.loss = np.full(2, 3.0)
    def apply(self, values):
        self.rate = values["rate"]
    def advance(self, n_steps):
        self.loss = self.loss * (1 - 0.1 * self.rate)
        return Measurement(train_loss=self.loss.copy(), diverged=np.zeros(2, dtype=bool))
    def evaluate(self, split, rows=None):
        return self.loss.copy()[slice(None) if rows is None else list(rows)]
    def state_dict(self, rows):
        return {}
    def load_state_dict(self, rows, state):
        pass
'''


def test_check_says_in_words_what_is_wrong_with_a_faulty_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "my_faulty_run.py").write_text(FAULTY_RUN)
    assert metactl("check", "my_faulty_run:Forgetful") == 1
    out = capsys.readouterr().out
    assert "the seed has no effect" in out
    assert "no effect: decoration" in out
    assert "restored to" in out
    assert "4 problems" in out  # resetting one run also resets its neighbour


def test_check_finds_what_only_whole_runs_would_stumble_over(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = "horizon = property(lambda self: 20)"
    all_rows = "[slice(None) if rows is None else list(rows)]"
    assert all_rows in FAULTY_RUN
    faulty = FAULTY_RUN.replace("n_runs, horizon = 2, 40", f"n_runs = 2\n    {fixed}")
    (here / "my_other_run.py").write_text(faulty.replace(all_rows, ""))
    assert metactl("check", "my_other_run:Forgetful") == 1
    out = capsys.readouterr().out
    assert "it is 20, and there are 40 control steps" in out
    assert "evaluate('probe', rows=[1]) gave [" in out
    (here / "my_fixed_run.py").write_text(faulty.replace("20)", "40)"))
    assert metactl("check", "my_fixed_run:Forgetful") == 1
    assert "it cannot be set, and is rounded" in capsys.readouterr().out


class Careless(TrainingRun):
    """Gives back one array that it goes on writing in; restores the first rows, whichever it is."""

    n_runs, horizon = 2, 40
    knobs = (Knob(name="rate", low=0.0, high=1.0, default=0.5),)

    def __init__(self, restores):
        self.loss, self.restores = np.full(2, 3.0), restores

    def reset(self, rows, tasks, seeds):
        self.loss[list(rows)] = 3.0 + np.array(seeds) / 1000

    def apply(self, values):
        self.rate = values["rate"]

    def advance(self, n_steps):
        self.loss *= 1 - 0.1 * self.rate
        return Measurement(train_loss=self.loss, diverged=np.zeros(2, dtype=bool))

    def evaluate(self, split, rows=None):
        return self.loss.copy()[slice(None) if rows is None else list(rows)]

    def state_dict(self, rows):
        return {"loss": self.loss[list(rows)].copy()}

    def load_state_dict(self, rows, state):
        if self.restores:
            self.loss[: len(rows)] = state["loss"]


@pytest.mark.parametrize(("restores", "said"), [(False, "restored to"), (True, "restored alone")])
def test_check_is_not_deceived_by_one_array_nor_by_rows_that_are_ignored(restores, said):
    found = [finding.text for finding in check_training_run(Careless(restores))]
    assert any(said in text for text in found)


def test_check_says_what_somebodys_environment_failed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_env.py").write_text(
        "import gymnasium\n"
        "class Bad(gymnasium.Env):\n"
        "    def __init__(self): raise RuntimeError('no data here')\n"
        "gymnasium.register('Bad-v0', entry_point=Bad)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    said = refused(capsys, "check", "failing_env:Bad-v0")
    assert "failing_env:Bad-v0 failed: RuntimeError: no data here" in said
