"""What the README shows is what happens."""

import re
from pathlib import Path

import numpy as np
import pytest

from metactl import Policy
from metactl.env import ControlConfig, ControlLoop
from metactl.policy import FORMAT_VERSION, PolicyCard

ROOT = Path(__file__).resolve().parents[2]


def untrained_policy(loop: ControlLoop) -> Policy:
    """A policy that fits a loop and moves every knob a little."""
    card = PolicyCard(
        format_version=FORMAT_VERSION,
        metactl_version="test",
        knobs=loop.knobs.knobs,
        observations=loop.codec.names,
        hidden=(),
        n_control_steps=loop.config.n_control_steps,
    )
    n_in, n_out = len(loop.codec), len(loop.knobs)
    weights = {
        "mean": np.zeros(n_in),
        "std": np.ones(n_in),
        "weight_0": np.zeros((n_out, n_in)),
        "bias_0": np.full(n_out, -0.5),
    }
    return Policy(card, weights)


def test_the_ten_lines_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from envs.transformer_run import build_run

    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 1
    loop = ControlLoop(build_run(1, {"horizon": 200}), ControlConfig())
    untrained_policy(loop).save(tmp_path / "runs" / "demo" / "policy")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert re.fullmatch(r"probe loss \d\.\d{3} at dropout 0\.00\n", capsys.readouterr().out)


def test_every_file_of_the_tree_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    files = [
        path
        for package in ("models", "metactl", "envs")
        for path in (ROOT / package).glob("*.py")
        if not path.stem.startswith("__") and path.stem != "registration"
    ]
    assert len(files) > 20
    missing = [str(path.relative_to(ROOT)) for path in files if path.name not in readme]
    assert missing == []
