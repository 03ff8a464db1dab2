"""Commands at toy size, for the tests of them."""

from pathlib import Path

import pytest

from metactl import cli

SMALL_RUNS = (
    "environment.options.horizon=20",
    "environment.options.n_control_steps=5",
    "environment.options.context=16",
    "environment.options.d_model=16",
)
SMALL_PPO = ("ppo.n_steps=5", "ppo.batch_size=20", "ppo.hidden=[8]", "set_point_runs=4")
TEXT = b"the quick brown fox jumps over the lazy dog; " * 200


def metactl(*arguments: object) -> int:
    """Runs a command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def train_arguments(run_dir: Path, *more: object) -> tuple[object, ...]:
    sets = [part for text in (*SMALL_RUNS, *SMALL_PPO) for part in ("--set", text)]
    small = ("--n-envs", 4, "--n-workers", 0, "--total-timesteps", 40)
    return ("train", "--run-dir", run_dir, *small, *sets, *more)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert metactl(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("metactl: error: ")
    return lines[0]
