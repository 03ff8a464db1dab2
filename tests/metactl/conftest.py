import sys
from pathlib import Path

import pytest
from command_line import metactl, train_arguments
from toy_plant import N_DECISIONS, TOY

from metactl.shards import ShardRow


@pytest.fixture(scope="module")
def shards():
    """A row of eight toys in this process."""
    with ShardRow(TOY, 8, {"n_control_steps": N_DECISIONS}, 0) as row:
        yield row


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("cli") / "run"
    assert metactl(*train_arguments(run_dir)) == 0
    return run_dir


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user stands; modules that are found there are forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path
