"""The command line: `metactl train | apply | evaluate | check | demo`. Nothing heavy at import."""

import errno
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from metactl.errors import WorkerDied


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a meta-controller on many small runs; the policy lands in RUN_DIR/policy."""

    run_dir: Path
    """New directory for the policy, TensorBoard files, checkpoints and the resolved config."""
    config: str | None = None
    """YAML file, or the name of a packaged recipe such as 'train' or 'demo'."""
    data: Path | None = None
    """File or folder of text to train on (default: the Python standard library's sources)."""
    rotation: str | None = None
    """Rotation variant by name, several joined by +, e.g. givens+t5 (see docs/rotations.md)."""
    total_timesteps: int | None = None
    """Control steps to learn from, over all runs."""
    n_envs: int | None = None
    """Training runs per worker process."""
    n_workers: int | None = None
    """Worker processes (-1: one per core, 0: none)."""
    seed: int | None = None
    """Determines tasks, runs and learning."""
    resume: bool = False
    """Go on from the newest checkpoint in RUN_DIR."""
    set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Any config key, e.g. --set ppo.learning_rate=3e-4 --set environment.options.context=64."""


@dataclass(frozen=True, kw_only=True)
class Apply:
    """Train new models under a policy; with --compare, beside paired twins at default knobs."""

    policy: Path
    """Folder of a trained policy, such as RUN_DIR/policy."""
    run_dir: Path
    """New directory for the trained models, losses, figure and TensorBoard files."""
    data: Path | None = None
    """File or folder of text to learn (default: the Python standard library's sources)."""
    optimizer_steps: int | None = None
    """Optimizer steps per run (default: as in the policy's training)."""
    d_model: int | None = None
    """Channels of the transformer."""
    n_layers: int | None = None
    """Blocks of the transformer."""
    n_heads: int | None = None
    """Attention heads of the transformer."""
    context: int | None = None
    """Tokens (bytes) per sequence."""
    batch_size: int | None = None
    """Sequences per optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate."""
    unique_bytes: int | None = None
    """Bytes of training data (default: all of --data, or drawn as in the policy's training)."""
    rotation: str | None = None
    """Rotation variant by name, several joined by +, e.g. givens+t5 (see docs/rotations.md)."""
    device: str | None = None
    """Torch device, such as cpu or cuda."""
    n_runs: int = 1
    """New training runs, advanced together."""
    seed: int = 0
    """Determines data, weights, batches and noise."""
    compare: bool = False
    """Also train paired twins at default knobs, and print the paired table."""
    sample: int = 0
    """Bytes of text to print that the first trained model writes."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare a policy with default, static, rule and replay on paired held-out runs."""

    policy: Path
    """Folder of a trained policy, such as RUN_DIR/policy."""
    json: Path | None = None
    """Write the report here as JSON."""
    update_card: bool = False
    """Also write the figures into the policy's own card."""
    figure: Path | None = None
    """Draw losses and knobs of some tasks here, as PNG."""
    data: Path | None = None
    """File or folder of text (default: what the policy was trained on, its held-out part)."""
    n_tasks: int = 32
    """Paired held-out tasks."""
    grid: int = 16
    """Static settings over all knobs, the default among them."""
    static: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """A further static setting, e.g. --static dropout=0,attention_span=8."""
    optimizer_steps: int | None = None
    """Optimizer steps per run (default: as in the policy's training)."""
    rotation: str | None = None
    """Rotation variant by name, several joined by +, e.g. givens+t5 (see docs/rotations.md)."""
    n_envs: int = 16
    """Training runs per worker process."""
    n_workers: int = -1
    """Worker processes (-1: one per core, 0: none)."""
    seed: int = 0
    """Determines tasks and runs."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check somebody's own TrainingRun or environment against the contract, in words."""

    target: tyro.conf.Positional[str]
    """An environment id such as 'envs:AdaptiveTransformer-v0', or MODULE:CLASS."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The main job in minutes: train a policy, apply it to text it never saw, compare."""

    run_dir: Path = Path("runs/demo")
    """Directory for everything the demo makes; an earlier demo in it is replaced."""
    config: str = "demo"
    """YAML file, or the name of a packaged recipe."""
    rotation: str | None = None
    """Rotation variant by name, several joined by +, e.g. givens+t5 (see docs/rotations.md)."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Apply, tyro.conf.subcommand("apply")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


_ROTATION = "environment.options.rotation"


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; a user's mistake is one line on standard error and exit code 2."""
    command = tyro.cli(
        Command,
        args=arguments,
        prog="metactl",
        description="A learned controller that adjusts a transformer's knobs while it trains.",
    )
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    runners: dict[type, Callable[[Any], int]] = {
        Train: _train,
        Apply: _apply,
        Evaluate: _evaluate,
        Check: _check,
        Demo: _demo,
    }
    try:
        code = runners[type(command)](command)
    except KeyboardInterrupt:
        print("\nmetactl: stopped", file=sys.stderr)
        code = 130
    except (ValueError, ImportError, WorkerDied) as error:
        code = _refuse(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        where = f": {error.filename!r}" if error.filename else ""
        code = _refuse(f"{error.strerror}{where}")
    sys.exit(code)


def _refuse(reason: str) -> int:
    print(f"metactl: error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _train(command: Train) -> int:
    import torch

    from metactl.config import TrainConfig, dump, find_config, parse_assignment, read_config
    from metactl.progress import bar
    from metactl.rundir import discard_if_refused, open_run_directory, resolve_data
    from metactl.train import train

    changes: dict[str, Any] = dict(parse_assignment(text) for text in command.set)
    flags = {
        "ppo.total_timesteps": command.total_timesteps,
        "environment.n_envs": command.n_envs,
        "environment.n_workers": command.n_workers,
        "environment.options.data": None if command.data is None else str(command.data),
        _ROTATION: command.rotation,
        "seed": command.seed,
    }
    changes |= {key: value for key, value in flags.items() if value is not None}
    path = None if command.config is None else find_config(command.config)
    config = read_config(TrainConfig, path, changes)
    options = resolve_data(config.environment.options)
    config = read_config(TrainConfig, path, {**changes, "environment.options": options})
    run_dir = open_run_directory(command.run_dir, "train", dump(config), resume=command.resume)
    torch.set_num_threads(1)
    with discard_if_refused(run_dir), bar("Training the controller") as progress:
        train(config, run_dir, resume=command.resume, progress=progress)
    print(f"Policy: {run_dir / 'policy'}")
    _print_next(
        f"metactl evaluate --policy {run_dir / 'policy'}",
        f"metactl apply --policy {run_dir / 'policy'} --run-dir runs/new --compare --n-runs 4",
        f"tensorboard --logdir {run_dir / 'tb'}",
    )
    return 0


def _apply(command: Apply) -> int:
    from metactl.apply import apply_policy
    from metactl.config import ConfigError
    from metactl.deployment import deployment
    from metactl.policy import Policy
    from metactl.progress import bar, console
    from metactl.report import draw_runs, paired_table
    from metactl.rundir import discard_if_refused, open_run_directory, write_json

    policy = Policy.load(command.policy)
    if command.n_runs < 1:
        raise ConfigError(f"--n-runs must be at least 1, got {command.n_runs}")
    if command.sample < 0:
        raise ConfigError(f"--sample must be at least 0 bytes, got {command.sample}")
    shape = ("d_model", "n_layers", "n_heads", "context", "rotation")
    flags = (*shape, "batch_size", "learning_rate", "device")
    changes = {name: getattr(command, name) for name in flags}
    changes["horizon"] = command.optimizer_steps
    if command.unique_bytes is not None:
        changes["unique_bytes"] = [command.unique_bytes, command.unique_bytes]
    env_id, options = deployment(policy, data=command.data, whole=True, **changes)
    record = {
        "environment": {"id": env_id, "options": options},
        "policy": str(command.policy.resolve()),
        "n_runs": command.n_runs,
        "seed": command.seed,
        "compare": command.compare,
    }
    run_dir = open_run_directory(command.run_dir, "apply", record)
    with discard_if_refused(run_dir), bar("New runs under the policy") as progress:
        done = apply_policy(
            policy,
            env_id,
            options,
            run_dir,
            n_runs=command.n_runs,
            seed=command.seed,
            compare=command.compare,
            sample_bytes=command.sample,
            progress=progress,
        )
    write_json(run_dir / "summary.json", done.summary)
    order = [name for name in ("default", "policy") if name in done.results]
    arms: dict[str, Any] = {name: done.results[name] for name in order}
    draw_runs(run_dir / "runs.png", arms, "New runs under the policy")
    console().print(
        paired_table(done.summary, f"{command.n_runs} new run{'s' * (command.n_runs > 1)}")
    )
    print(f"Models: {run_dir}/model-*   Picture: {run_dir / 'runs.png'}")
    if done.sample:
        print(f"What the first model writes:\n{done.sample}")
    _print_next(f"tensorboard --logdir {run_dir / 'tb'}")
    return 0


def _evaluate(command: Evaluate) -> int:
    from metactl.config import ConfigError, parse_setting
    from metactl.deployment import deployment
    from metactl.evaluate import evaluate, headline
    from metactl.policy import Policy
    from metactl.progress import bar, console
    from metactl.report import draw_runs, gap_sentence, paired_table
    from metactl.rundir import write_json
    from metactl.shards import ShardRow, default_workers

    for flag, low in (("n_tasks", 2), ("grid", 1), ("n_envs", 1), ("n_workers", -1)):
        if getattr(command, flag) < low:
            name = flag.replace("_", "-")
            raise ConfigError(f"--{name} must be at least {low}, got {getattr(command, flag)}")
    policy = Policy.load(command.policy)
    for path in (command.json, command.figure):
        if path is not None:
            path.resolve().parent.mkdir(parents=True, exist_ok=True)
    settings = [parse_setting(text) for text in command.static]
    env_id, options = deployment(
        policy, data=command.data, horizon=command.optimizer_steps, rotation=command.rotation
    )
    workers = default_workers() if command.n_workers < 0 else command.n_workers
    with (
        ShardRow(env_id, command.n_envs, options, workers) as shards,
        bar("Paired held-out runs") as progress,
    ):
        evaluation = evaluate(
            policy,
            shards,
            n_tasks=command.n_tasks,
            grid_points=command.grid,
            seed=command.seed,
            settings=settings,
            progress=progress,
        )
    say = console().print
    say(paired_table(evaluation.summary, f"{command.n_tasks} held-out tasks, nats per token"))
    say(gap_sentence(evaluation.summary))
    if command.json is not None:
        write_json(command.json, evaluation.summary)
    if command.update_card:
        policy.with_evaluation(headline(evaluation.summary)).save(command.policy)
    if command.figure is not None:
        draw_runs(command.figure, _drawn(evaluation.results), "Held-out runs")
    return 0


def _check(command: Check) -> int:
    from metactl.check import check_target

    findings = check_target(command.target)
    for finding in findings:
        print(f"{'ok     ' if finding.passed else 'PROBLEM'}  {finding.text}")
    problems = sum(not finding.passed for finding in findings)
    print(f"{command.target}: {problems} problem{'s' * (problems != 1)}")
    return 1 if problems else 0


def _demo(command: Demo) -> int:
    from metactl.config import TrainConfig, find_config, read_config
    from metactl.demo import DemoPlan, run_demo

    rotation = {} if command.rotation is None else {_ROTATION: command.rotation}
    config = read_config(TrainConfig, find_config(command.config), rotation)
    run_dir = run_demo(command.run_dir, config, DemoPlan())
    policy = run_dir / "policy"
    print(f"Report: {run_dir / 'summary.json'}   Picture: {run_dir / 'demo.png'}")
    _print_next(
        f"metactl apply --policy {policy} --data YOUR_TEXT --run-dir runs/mine --compare",
        "metactl train --config train --run-dir runs/train",
        f"tensorboard --logdir {run_dir / 'tb'}",
    )
    return 0


# Shared pieces -------------------------------------------------------------------------------


def _drawn(results: dict[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("default", "best static", "policy")}


def _print_next(*commands: str) -> None:
    print("Next:")
    for command in commands:
        print(f"  {command}")


if __name__ == "__main__":
    main()
