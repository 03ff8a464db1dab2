"""The command line: what each command does. Nothing heavy at import."""

import contextlib
import errno
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metactl.commands import Apply, Check, Demo, Evaluate, Sweep, Train, read_command
from metactl.errors import WorkerDied, harmless, is_of_size

if TYPE_CHECKING:
    from metactl.config import EnvironmentConfig
    from metactl.evaluation import Where

_OF_THE_PLACE = (  # errors that say where somebody wanted something written, not what went wrong
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS, errno.ENOENT),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
_ROTATION = "environment.options.rotation"


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; a user's mistake is one line on standard error and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    runners: dict[type, Callable[[Any], int]] = {
        Train: _train,
        Apply: _apply,
        Evaluate: _evaluate,
        Sweep: _sweep,
        Check: _check,
        Demo: _demo,
    }
    try:
        command = read_command(arguments)
        code = runners[type(command)](command)
    except KeyboardInterrupt:
        print("\nmetactl: stopped", file=sys.stderr)
        code = 130
    except (ValueError, ImportError, WorkerDied) as error:
        code = _refuse(str(error))
    except (MemoryError, OverflowError, RuntimeError) as error:
        if not is_of_size(error):
            raise
        code = _refuse(f"too large for this machine: {error}")
    except BrokenPipeError:  # somebody reads no further, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.errno not in _OF_THE_PLACE:
            raise
        where = f": {error.filename!r}" if error.filename else ""
        code = _refuse(f"{error.strerror}{where}")
    sys.exit(code)


def _refuse(reason: str) -> int:
    print(f"metactl: error: {harmless(reason)}", file=sys.stderr)
    return 2


def _train(command: Train) -> int:
    import torch

    from metactl.config import (
        TrainConfig,
        changed,
        dump,
        find_config,
        parse_assignment,
        read_config,
    )
    from metactl.deployment import flag_for
    from metactl.progress import bar
    from metactl.rundir import discard_if_refused, open_run_directory, resolve_data_of
    from metactl.train import train

    changes: dict[str, Any] = dict(parse_assignment(text) for text in command.set)
    flags = {
        "ppo.total_timesteps": command.total_timesteps,
        "environment.n_envs": command.n_envs,
        "environment.n_workers": command.workers,
        "environment.shards": command.shards,
        "environment.gpus_per_shard": command.gpus_per_shard,
        "environment.options.data": None if command.data is None else str(command.data),
        _ROTATION: command.rotation,
        "seed": command.seed,
    }
    changes |= {key: value for key, value in flags.items() if value is not None}
    path = None if command.config is None else find_config(command.config)
    config = read_config(TrainConfig, path, changes)
    config = changed(config, resolve_data_of(config.environment))
    run_dir = open_run_directory(command.run_dir, "train", dump(config), resume=command.resume)
    torch.set_num_threads(1)
    with (
        discard_if_refused(run_dir, resume=command.resume),
        _place_for(config.environment, command.address),
        bar("Training the controller") as progress,
    ):
        train(config, run_dir, resume=command.resume, progress=progress)
    print(f"Policy: {run_dir / 'policy'}")
    flag = flag_for(config.environment.id)
    _print_next(
        (f"metactl evaluate {flag}--policy", run_dir / "policy"),
        (
            f"metactl apply {flag}--run-dir runs/new --compare --n-runs 4 --policy",
            run_dir / "policy",
        ),
        ("tensorboard --logdir", run_dir / "tb"),
    )
    return 0


@contextlib.contextmanager
def _place_for(environment: "EnvironmentConfig", address: str | None) -> Iterator[None]:
    """A Ray cluster with room for all shards, where they are to live on one."""
    if environment.shards != "ray":
        if address is not None:
            raise ValueError("--address is of a Ray cluster: it needs --shards ray")
        yield
        return
    from metactl.cluster import check_resources, cluster
    from metactl.train import n_shards

    n = n_shards(environment)
    with cluster(address) as available:
        check_resources(f"a row of {n} shards", n, n * environment.gpus_per_shard, available)
        yield


def _apply(command: Apply) -> int:
    from metactl.apply import apply_policy
    from metactl.deployment import deployment
    from metactl.policy import Policy, find_policy
    from metactl.progress import bar, console
    from metactl.report import draw_runs, paired_table
    from metactl.rundir import discard_if_refused, open_run_directory, write_json

    policy = Policy.load(command.policy)
    _require_at_least(command, n_runs=1, sample=0, seed=0, optimizer_steps=1)
    shape = ("d_model", "n_layers", "n_heads", "context", "rotation")
    flags = (*shape, "batch_size", "learning_rate", "device")
    changes = {name: getattr(command, name) for name in flags}
    changes["horizon"] = command.optimizer_steps
    if command.unique_bytes is not None:
        changes["unique_bytes"] = [command.unique_bytes, command.unique_bytes]
    env_id, options = deployment(
        policy, changes, data=command.data, whole=True, environment=command.environment
    )
    record = {
        "environment": {"id": env_id, "options": options},
        "policy": str(find_policy(command.policy).resolve()),
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
    models = f"none ({done.unsaved})" if done.unsaved else f"{run_dir}/model-*"
    print(f"Models: {models}   Picture: {run_dir / 'runs.png'}")
    if done.sample:
        print(f"What the first model writes:\n{done.sample}")
    _print_next(("tensorboard --logdir", run_dir / "tb"))
    return 0


def _evaluate(command: Evaluate) -> int:
    from metactl.config import ConfigError, parse_assignment, parse_setting
    from metactl.deployment import deployment
    from metactl.evaluation import EvaluationPlan, Where, evaluate, headline
    from metactl.policy import Policy, find_policy
    from metactl.progress import bar, console
    from metactl.report import draw_compared, evaluation_report
    from metactl.rundir import writable, write_json
    from metactl.shards import default_workers

    _require_at_least(command, n_tasks=2, grid=1, n_envs=1, n_workers=-1, seed=0)
    _require_at_least(command, schedule_runs=0, linear_runs=0, optimizer_steps=1)
    if command.headroom:
        command.check_headroom()
    elif command.families != Evaluate.families:
        raise ConfigError("--families is of --headroom: name another task by --set task=")
    policy = Policy.load(command.policy)
    if command.update_card and find_policy(command.policy) != command.policy:
        raise ConfigError("--update-card writes into a policy's folder: give that, not a name")
    if command.update_card:
        writable(command.policy / "policy.json")
    figure = writable(command.figure, picture=True)
    command = replace(command, json=writable(command.json), figure=figure)
    full = command.suite == "full"
    plan = EvaluationPlan(
        **command.sizes(),
        seed=command.seed,
        settings=[parse_setting(text) for text in command.static],
        rivals={f"rival {path}": Policy.load(path) for path in command.rival},
        controls=True,
        each_group=full,
        each_knob=full,
        beforehand=full or command.beforehand,
        population=8 if full else 0,
        disturbed=full or command.disturbed,
    )
    flags = {"horizon": command.optimizer_steps, "rotation": command.rotation}
    changes = flags | dict(parse_assignment(text) for text in command.set)
    if "data" in changes:
        raise ConfigError("--set data: give it by --data")
    env_id, options = deployment(
        policy, changes, data=command.data, environment=command.environment
    )
    workers = default_workers() if command.n_workers < 0 else command.n_workers
    kept = None if command.run_dir is None else _folder_of_runs(command.run_dir)
    where = Where(
        env_id=env_id, options=options, n_envs=command.n_envs, n_workers=workers, folder=kept
    )
    if command.headroom:
        return _headroom(command, where)
    with bar("Paired held-out runs") as progress:
        evaluation = evaluate(policy, where, plan, progress)
    if command.json is not None:  # what was asked for is there before anything can fail to be read
        write_json(command.json, evaluation.summary)
    if command.run_dir is not None and evaluation.linear is not None:
        evaluation.linear.save(command.run_dir / "linear")
    if command.update_card:
        policy.with_evaluation(headline(evaluation.summary)).save(command.policy)
    if command.figure is not None:
        draw_compared(command.figure, evaluation.results, "Held-out runs")
    for part in evaluation_report(evaluation.summary):
        console().print(part)
    return 0


def _folder_of_runs(run_dir: Path) -> Path:
    from metactl.rundir import open_run_directory

    begun = (run_dir / "config.yaml").exists()
    folder = open_run_directory(run_dir, "evaluate", {}, resume=begun) / "played"
    folder.mkdir(exist_ok=True)
    return folder


def _headroom(command: Evaluate, where: "Where") -> int:
    from metactl.evaluation import by_family, headroom
    from metactl.progress import bar, console
    from metactl.report import headroom_table, knob_headroom_table
    from metactl.rundir import write_json

    found, sizes = {}, command.sizes()
    del sizes["linear_runs"]  # of a policy
    for family, place in by_family(where, command.families).items():
        with bar(f"Room in {family}") as progress:
            found[family] = headroom(place, **sizes, seed=command.seed, progress=progress)
        if command.json is not None:
            write_json(command.json, {"families": found})
    console().print(headroom_table(found))
    console().print(knob_headroom_table(found))
    return 0


def _sweep(command: Sweep) -> int:
    from metactl.config import dump, find_config, parse_assignment, read_config
    from metactl.deployment import flag_for
    from metactl.progress import bar, console
    from metactl.rundir import discard_if_refused, open_run_directory
    from metactl.sweep.config import SweepConfig, described, plan, resolved, with_rotation

    changes = dict(parse_assignment(text) for text in command.set)
    config = read_config(SweepConfig, find_config(command.config), changes)
    if command.rotation is not None:
        config = with_rotation(config, command.rotation)
    trials = plan(config)
    from metactl.sweep.check import check_sweep

    check_sweep(config, trials)
    needs = f"{config.resources.cpu:g} CPU and {config.resources.gpu:g} GPU each"
    if command.dry_run:
        chosen = ", the later ones placed by what the first show" * (config.searcher != "random")
        print(f"{len(trials)} trials, {needs}{chosen}")
        for trial in trials:
            print(f"  {trial.name}  {described(trial.changes)}")
        return 0
    begun = (command.run_dir / "config.yaml").exists()
    record = {**dump(config), "resolved": resolved(trials)}
    root = open_run_directory(command.run_dir, "sweep", record, resume=begun)
    from metactl.sweep.report import (
        against_policy,
        missing_members,
        policy_sentence,
        result_table,
        write_report,
    )
    from metactl.sweep.run import run_sweep

    print(f"{len(trials)} trials, {needs}; stopped, the same command goes on")
    with discard_if_refused(root), bar("Sweep") as progress:
        outcome = run_sweep(config, trials, root, address=command.address, progress=progress)
    write_report(config, trials, outcome, root)
    console().print(result_table(outcome))
    compared = against_policy(outcome, root)
    if compared:
        console().print(policy_sentence(compared))
    for name, why in outcome.failed.items():
        print(f"Failed: {name}: {why}", file=sys.stderr)
    if outcome.stopped:
        print(f"Given up early: {', '.join(outcome.stopped)}")
    if outcome.left:  # Tune takes Ctrl-C for itself, and ends as if all were done
        print(f"Stopped with {len(outcome.left)} trials left; the same command goes on")
        return 130
    if not outcome.results:
        return 1
    print(f"Results: {root / 'results.csv'}   Picture: {root / 'search.png'}")
    if missing := missing_members(config, outcome):
        print(missing, file=sys.stderr)
    policy = root / "policy"
    recipe = trials[0].recipe
    flag = "" if recipe is None else flag_for(recipe.environment.id)
    following = [(f"metactl evaluate {flag}--policy", policy)] if policy.exists() else []
    _print_next(*following, ("tensorboard --logdir", root / "tb"))
    return 1 if outcome.failed else 0


def _check(command: Check) -> int:
    from metactl.check import check_target

    options = {} if command.rotation is None else {"rotation": command.rotation}
    findings = check_target(command.target, options)
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
        ("metactl apply --data YOUR_TEXT --run-dir runs/mine --compare --policy", policy),
        ("metactl train --config train --run-dir", Path("runs/train")),
        ("tensorboard --logdir", run_dir / "tb"),
    )
    return 0


# Shared pieces -------------------------------------------------------------------------------


def _require_at_least(command: Any, **least: int) -> None:
    for flag, low in least.items():
        value = getattr(command, flag)
        if value is not None and value < low:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least {low}, got {value}")


def _print_next(*commands: tuple[str, Path]) -> None:
    """Commands, each with the path that it ends in."""
    print("Next:")
    for command, path in commands:
        print(f"  {command} {shlex.quote(str(path))}")


if __name__ == "__main__":
    main()
