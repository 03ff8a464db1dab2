"""The examples run, and stay short enough to be read."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metactl import Knob, KnobSet, Policy
from metactl.policy import FORMAT_VERSION, PolicyCard
from metactl.signals import Codec

NEXT = "--- the next mode"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def policy(tmp_path):
    """A policy that raises dropout."""
    knobs = (Knob(name="dropout", low=0.0, high=0.6, default=0.0),)
    names = Codec(KnobSet(knobs)).names
    card = PolicyCard(
        format_version=FORMAT_VERSION,
        metactl_version="test",
        knobs=knobs,
        observations=names,
        hidden=(),
        n_control_steps=40,
    )
    n = len(names)
    weights = {
        "mean": np.zeros(n),
        "std": np.ones(n),
        "weight_0": np.zeros((1, n)),
        "bias_0": np.full(1, 0.2),
    }
    Policy(card, weights).save(tmp_path / "policy")
    return str(tmp_path / "policy")


def run(name, *arguments):
    return start([str(EXAMPLES / name), *arguments])


def in_modes(name, policy):
    """What an example prints in each mode, in one process: starting takes the longest."""
    script = (
        "import runpy, sys\n"
        "for mode in ('act', 'shadow', 'off'):\n"
        f"    sys.argv = [{name!r}, {policy!r}, mode]\n"
        f"    runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')\n"
        f"    print({NEXT!r})\n"
    )
    lines, modes = start(["-c", script]), [[]]
    for line in lines:
        modes[-1:] = [modes[-1], []] if line == NEXT else [[*modes[-1], line]]
    return modes[:3]


def start(arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_example_is_under_60_lines():
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) >= 6
    assert {f.name: n for f in files if (n := len(f.read_text().splitlines())) >= 60} == {}


def test_the_plain_loop_follows_the_policy_and_shadow_equals_off(policy):
    acted, shadow, off = in_modes("plain_pytorch.py", policy)
    assert [line.split()[1] for line in acted[:-1]] == ["50:", "100:", "150:"]
    dropout = [float(line.split()[3]) for line in acted[:-1]]
    assert dropout == sorted(dropout)
    assert dropout[0] > 0.1
    assert shadow[-1] == off[-1] != acted[-1]


@pytest.mark.parametrize("name", ["hf_trainer.py", "lightning_module.py"])
def test_the_trainers_follow_the_policy_and_shadow_equals_off(name, policy):
    acted, shadow, off = (lines[-1].split() for lines in in_modes(name, policy))
    assert float(acted[-1]) > 0.3
    assert float(off[-1]) <= 0.1
    assert shadow == off
    assert acted[1] != off[1]


def test_the_own_knob_moves_both_ways():
    values = [float(line.split()[-1]) for line in run("own_knob.py")]
    assert len(values) == 19
    assert min(values) < 0.1 < max(values)


def test_a_policy_learned_on_a_plant_of_ones_own_is_ahead_of_its_default(tmp_path):
    figures = dict(line.split() for line in run("own_training_run.py", str(tmp_path / "run")))
    assert float(figures["policy"]) < 0.7 * float(figures["default"])
    assert Policy.load(tmp_path / "run" / "policy").card.knobs[0].name == "learning_rate"
