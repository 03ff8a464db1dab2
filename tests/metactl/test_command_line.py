"""Commands end to end at toy size, and every refusal: one line, exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import TEXT, metactl, refused, train_arguments
from safetensors.numpy import load_file

from metactl import cli
from metactl.policy import Policy
from metactl.rundir import open_run_directory


def test_train_writes_a_policy_and_says_what_made_it(trained: Path) -> None:
    policy = Policy.load(trained / "policy")
    assert {knob.name for knob in policy.card.knobs} == {
        "rope_base",
        "attention_span",
        "embedding_width",
        "dropout",
    }
    record = (trained / "config.yaml").read_text()
    assert "command:" in record and "torch:" in record and "total_timesteps: 40" in record
    assert list((trained / "tb").glob("events.*"))


def test_apply_twice_gives_identical_losses_and_saves_the_model(
    trained: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        code = metactl(
            "apply", "--policy", trained / "policy", "--run-dir", tmp_path / name, "--compare"
        )
        assert code == 0
    first, second = (json.loads((tmp_path / n / "summary.json").read_text()) for n in "ab")
    assert first["arms"] == second["arms"]
    assert set(first["arms"]) == {"policy", "default"}
    single = first["policy_minus"]["default"]["final_test"]
    assert single["estimate"] is not None
    assert single["low"] is single["high"] is None  # one pair says nothing of the spread
    assert (tmp_path / "a" / "runs.png").stat().st_size > 5_000
    for board in ("tb", "tb/default"):  # the twins beside what is controlled
        assert len(list((tmp_path / "a" / board).glob("events.*"))) == 1
    weights = load_file(tmp_path / "a" / "model-0" / "model.safetensors")
    assert all(np.isfinite(value).all() for value in weights.values())
    shape = json.loads((tmp_path / "a" / "model-0" / "config.json").read_text())
    assert shape["d_model"] == 16


def test_apply_takes_other_text_and_another_size(trained: Path, tmp_path: Path) -> None:
    text = tmp_path / "fox.txt"
    text.write_bytes(TEXT)
    arguments = ("--d-model", 24, "--n-heads", 4, "--n-layers", 1, "--optimizer-steps", 30)
    code = metactl(
        "apply",
        "--policy",
        trained / "policy",
        "--data",
        text,
        "--run-dir",
        tmp_path / "run",
        *arguments,
    )
    assert code == 0
    shape = json.loads((tmp_path / "run" / "model-0" / "config.json").read_text())
    assert (shape["d_model"], shape["n_layers"]) == (24, 1)


def test_apply_takes_a_rotation_and_prints_what_the_model_writes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--rotation", "givens+t5", "--sample", 40)
    code = metactl(
        "apply", "--policy", trained / "policy", "--run-dir", tmp_path / "run", *arguments
    )
    assert code == 0
    _, _, after = capsys.readouterr().out.partition("What the first model writes:\n")
    text, _, _ = after.partition("\nNext:")
    assert len(text) >= 40
    shape = json.loads((tmp_path / "run" / "model-0" / "config.json").read_text())
    assert shape["rotation"] == "givens+t5"
    weights = load_file(tmp_path / "run" / "model-0" / "model.safetensors")
    assert "rotation.givens.angles" in weights and "rotation.relative.table" in weights


def test_train_takes_a_rotation(tmp_path: Path) -> None:
    assert metactl(*train_arguments(tmp_path / "run", "--rotation", "conditional")) == 0
    card = Policy.load(tmp_path / "run" / "policy").card
    assert card.training["config"]["environment"]["options"]["rotation"] == "conditional"


def test_refusals_are_one_line_that_names_the_thing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, policy = tmp_path / "new", trained / "policy"
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_bytes(b"abc")
    (tmp_path / "no_text").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")

    def train(*more: object) -> str:
        return refused(capsys, *train_arguments(new, *more))

    assert "'/nowhere' does not exist" in train("--data", "/nowhere")
    assert "empty" in train("--data", tmp_path / "empty.txt")
    assert "too short" in train("--data", tmp_path / "short.txt")
    assert "no text" in train("--data", tmp_path / "no_text")
    assert "Did you mean 'learning_rate'?" in train("--set", "ppo.learning_rat=1e-3")
    assert "Did you mean 'horizon'?" in train("--set", "environment.options.horizonn=9")
    assert "Did you mean 'givens'?" in train("--rotation", "givns")
    assert "contradicts itself" in train("--rotation", "givens+butterfly")
    assert "n_envs" in train("--n-envs", 0)
    assert "--set takes KEY=VALUE" in train("--set", "seed")
    assert "neither a file nor a recipe" in train("--config", "trian")
    assert not new.exists(), "a refused command leaves nothing behind"
    assert "already holds a run" in refused(capsys, *train_arguments(trained))
    assert "not empty" in refused(capsys, *train_arguments(tmp_path / "foreign"))
    assert "no run to resume" in refused(capsys, *train_arguments(new, "--resume"))
    other = (*train_arguments(trained, "--resume"), "--seed", 7)
    assert "seed differ" in refused(capsys, *other)
    assert "policy.json" in refused(capsys, "apply", "--policy", tmp_path, "--run-dir", new)
    apply = ("apply", "--policy", policy, "--run-dir", new)
    assert "n_heads=3" in refused(capsys, *apply, "--n-heads", 3)
    assert "at least n_control_steps" in refused(capsys, *apply, "--optimizer-steps", 2)
    assert "--n-runs" in refused(capsys, *apply, "--n-runs", 0)
    assert "--sample" in refused(capsys, *apply, "--sample", -1)
    assert "--seed must be at least 0, got -1" in refused(capsys, *apply, "--seed", -1)
    assert "device" in refused(capsys, *apply, "--device", "warp")
    assert "device 'meta' cannot be used" in refused(capsys, *apply, "--device", "meta")
    assert "--n-tasks" in refused(capsys, "evaluate", "--policy", policy, "--n-tasks", 1)
    evaluate = ("evaluate", "--policy", policy, "--n-tasks", 2, "--n-workers", 0)
    assert "--static takes KNOB=NUMBER" in refused(capsys, *evaluate, "--static", "dropout")
    assert "Did you mean 'dropout'?" in refused(capsys, *evaluate, "--static", "dropuot=0")
    twice = ("--static", "dropout=0", "--static", "dropout=0")
    assert "'static dropout=0' is there 2 times" in refused(capsys, *evaluate, *twice)
    assert "Unknown policy 'defualt'" in refused(capsys, *evaluate, "--rival", "defualt")
    assert "rival default decides 40 times" in refused(capsys, *evaluate, "--rival", "default")
    assert "Unknown task 'txet'" in refused(capsys, *evaluate, "--set", "task=txet")
    assert "d_modle" in refused(capsys, *evaluate, "--set", "d_modle=64")
    in_the_way = ("--json", tmp_path / "foreign")
    assert "foreign' cannot be written: it is a dir" in refused(capsys, *evaluate, *in_the_way)
    headroom = (*evaluate, "--headroom")
    assert "Unknown task 'txet'" in refused(capsys, *headroom, "--families", "txet")
    assert "--families needs" in refused(capsys, *headroom, "--families")
    assert "--figure is about a policy" in refused(capsys, *headroom, "--figure", new / "a.png")
    assert "--rival is about a policy" in refused(capsys, *headroom, "--rival", policy)
    assert "--static is about a policy" in refused(capsys, *headroom, "--static", "dropout=0")
    assert "--beforehand is about a policy" in refused(capsys, *headroom, "--beforehand")
    assert "--disturbed is about a policy" in refused(capsys, *headroom, "--disturbed")
    assert "--suite full is about a policy" in refused(capsys, *headroom, "--suite", "full")
    late = ("--families", "text", "digits", "--run-dir", new)
    assert "task 'digits' needs a context of 64" in refused(capsys, *headroom, *late)
    assert not any((new / "played").iterdir()), "text was played before digits were refused"
    shutil.rmtree(new)
    assert "--families is of --headroom" in refused(capsys, *evaluate, "--families", "waves")
    assert "--set data: give it by --data" in refused(capsys, *evaluate, "--set", "data=x")
    assert "Unknown option 'whole'" in refused(capsys, *evaluate, "--set", "whole=true")
    assert "Did you mean 'random_start'?" in refused(capsys, *evaluate, "--set", "randm_start=1")
    assert "--optimizer-steps must be" in refused(capsys, *evaluate, "--optimizer-steps", 0)
    assert "with the flags: unknown" in train("--config", "train", "--set", "ppo.lerning_rate=1")
    kept = tmp_path / "kept"
    assert metactl(*evaluate, "--grid", 1, "--n-envs", 2, "--run-dir", kept) == 0
    shutil.rmtree(kept / "played")
    (kept / "played").touch()
    assert f"File exists: '{kept / 'played'}'" in refused(capsys, *evaluate, "--run-dir", kept)
    check = ("check", "envs:AdaptiveTransformer-v0", "--rotation", "givns")
    assert "Did you mean 'givens'?" in refused(capsys, *check)
    assert "built without arguments" in refused(capsys, "check", "a:Plant", "--rotation", "rope")
    assert not new.exists()
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "~nobody-of-that-name/x"), "Data '~nobody-of-that-name/x' is no path"),
        (("--data", "loop"), "loop"),
        (("--run-dir", "loop/run"), "loop"),
        (("--set", "environment.options.data=3"), "Data '3' is no path"),
        (("--config", "x" * 300), "File name too long"),
        (("--data", "x" * 300), "File name too long"),
        (("--set", "seed=" + "[" * 5000), "--set seed: '[[["),
        (("--set", "seed=!!timestamp x"), "--set seed: '!!timestamp x' is not a YAML value"),
        (("--set", "seed=2024-13-45"), "--set seed: '2024-13-45' is not a YAML value"),
        (("--config", "deep.yaml"), "'deep.yaml' is not YAML"),
        (("--set", "environment.id=toy_plant:Toy-v7"), "No environment 'toy_plant:Toy-v7'"),
        (("--set", "environment.id=toy_plant:Toy-v0"), "unexpected keyword argument 'context'"),
        (("--set", "environment.options.horizon=[4, 40]"), "horizon must be at least n_control"),
    ],
)
def test_what_cannot_be_read_at_all_is_one_line(
    arguments: tuple[str, str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "deep.yaml").write_text("seed: " + "[" * 5000)
    (tmp_path / "demo").mkdir()  # a folder does not hide the recipe of its name
    assert words in refused(capsys, *train_arguments(tmp_path / "new"), *arguments)


def test_an_argument_that_a_variable_left_empty_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = refused(capsys, "train", "--data", "", "--run-dir", tmp_path / "run")
    assert "an argument is empty" in empty
    assert not (tmp_path / "run").exists()


def test_train_finds_a_module_where_the_user_stands(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant = Path(__file__).parents[2] / "examples" / "tracking_plant.py"
    text = plant.read_text().replace('"Tracking', '"MyTracking')
    text = text.replace("tracking_plant", "plant_of_mine")
    (here / "plant_of_mine.py").write_text(text)
    place = ("--set", "environment.id=plant_of_mine:MyTracking-v0", "--n-workers", 0)
    short = ("--n-envs", 4, "--total-timesteps", 160, "--set", "ppo.batch_size=40")
    short += ("--set", "set_point_runs=0")
    assert metactl("train", "--run-dir", "run", *place, *short) == 0
    assert Policy.load(here / "run" / "policy").card.knobs
    where = ("--policy", "run/policy", "--run-dir", "applied")
    said = refused(capsys, "apply", *where)
    assert "may not choose which code runs here" in said and "--environment plant_of_mine:" in said
    named = ("--environment", "plant_of_mine:MyTracking-v0")
    assert metactl("apply", *where, *named) == 0
    small = ("--n-tasks", 2, "--grid", 2, "--n-envs", 4, "--n-workers", 0)
    assert metactl("evaluate", "--policy", "run/policy", *named, *small) == 0
    no_single_run = refused(capsys, "check", "plant_of_mine:MyTracking-v0")
    assert "vector_entry_point alone" in no_single_run and "MODULE:CLASS" in no_single_run


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    script = (
        "import sys, metactl.cli; "
        "print([m for m in ('torch', 'stable_baselines3', 'ray', 'gymnasium') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_commands_work_beside_foreign_folders_called_models_and_envs(tmp_path: Path) -> None:
    for name in ("models", "envs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('foreign')")
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    for start in (["-m", "metactl"], ["-c", "from metactl.cli import main; main()"]):
        if start[0] == "-c":  # as the console script: the working directory is not on the path
            start = ["-P", *start]
        done = subprocess.run(
            [sys.executable, *start, "check", "envs:AdaptiveTransformer-v0"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "0 problems" in done.stdout


def test_a_checkout_is_used_where_one_stands_in_it_whatever_is_installed(tmp_path: Path) -> None:
    checkout = Path(cli.__file__).parent.parent
    for name in ("metactl", "models", "envs"):
        shutil.copytree(checkout / name, tmp_path / name)
    arguments = ("train", "--run-dir=run", "--n-workers=0", "--set=environment.options.context=0")
    done = subprocess.run(
        [sys.executable, "-m", "metactl", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "context" in done.stderr, done.stderr


def test_a_foreign_package_called_envs_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").touch()
    script = tmp_path / "mine.py"
    script.write_text(
        "from metactl.cli import main\nmain(['check', 'envs:AdaptiveTransformer-v0'])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "metactl needs its own package 'envs'" in done.stderr
    assert str(tmp_path / "envs") in done.stderr and "Rename" in done.stderr


def test_commands_that_are_proposed_can_be_pasted(capsys):
    cli._print_next(("tensorboard --logdir", Path("my runs/tb")))
    assert capsys.readouterr().out == "Next:\n  tensorboard --logdir 'my runs/tb'\n"


def test_data_of_variants_is_kept_by_its_whole_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_bytes(TEXT)
    variants = ("--set", "environment.variants=[{data: a.txt}, {data: b.txt}]")
    run = ("--n-workers", 2, *variants)
    assert metactl(*train_arguments("run", *run)) == 0
    kept = Policy.load("run/policy").card.training["config"]["environment"]["variants"]
    assert kept == [{"data": str(tmp_path / name)} for name in ("a.txt", "b.txt")]
    missing = ("--set", "environment.variants=[{data: nowhere.txt}, {}]", "--n-workers", 2)
    assert metactl(*train_arguments("other", *missing)) == 2


def test_data_is_found_again_where_options_were_given_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(TEXT)
    whole = "environment.options={horizon: 20, n_control_steps: 5, context: 16, d_model: 16}"
    assert metactl(*train_arguments("run", "--set", whole, "--data", "text")) == 0
    assert f"data: {tmp_path / 'text'}\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_demo_that_cannot_run_leaves_the_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_run_directory(tmp_path / "demo", "demo", {})
    (tmp_path / "demo" / "summary.json").write_text("{}")
    arguments = ("demo", "--run-dir", tmp_path / "demo", "--rotation", "roep")
    assert "Unknown rotation 'roep'" in refused(capsys, *arguments)
    assert (tmp_path / "demo" / "summary.json").exists()


@pytest.mark.parametrize("argument", ["--data=", ""])
def test_a_variable_that_was_not_set_is_said(
    argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *train_arguments(tmp_path / "new"), argument)
    assert "is empty: is a variable of the shell not set?" in said


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("metactl --help | head -1", "usage: metactl"),
        ("rm -r . 2>&-; metactl --help", "usage: metactl"),
        ("rm -r . 2>&-; python -m metactl --help", "usage: metactl"),
        ("rm -r . 2>&-; metactl check os:path", "error: the current folder is gone"),
    ],
)
def test_help_is_read_in_part_and_from_a_folder_that_is_gone(
    command: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    gone = command.replace("rm -r .", f"rm -r {tmp_path / 'here'}")
    done = subprocess.run(
        ["bash", "-c", gone],
        cwd=tmp_path / "here",
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
