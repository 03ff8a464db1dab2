"""The main job in minutes: train a policy, apply it to what it never saw, compare honestly."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metactl.config import TrainConfig, dump
from metactl.deployment import deployment
from metactl.evaluation import (
    Evaluation,
    EvaluationPlan,
    Where,
    evaluate,
    headline,
    play_arms,
    policy_arm,
    static_arm,
    summarise,
)
from metactl.evaluation.place import RunCounter
from metactl.policy import Policy
from metactl.progress import Progress, bar, console
from metactl.report import draw_compared, gap_sentence, paired_table
from metactl.rundir import (
    LOCK,
    RunDirectoryError,
    is_trace,
    kind_of,
    lock,
    open_run_directory,
    write_json,
)
from metactl.shards import default_workers
from metactl.train import train

_LEFT = (
    *("config.yaml", "tb", "checkpoints", "policy", "policies", "demo.png", "summary.json"),
    LOCK,
)


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """What the demo compares.

    Args:
        n_tasks: Held-out tasks.
        grid_points: Static settings, the default among them.
        n_larger_tasks: Held-out tasks for a larger model.
        d_model: Channels of the larger model.
        n_layers: Its blocks.
        n_envs: Runs per worker process.
        seed: Of tasks and runs.
    """

    n_tasks: int = 20
    grid_points: int = 16
    n_larger_tasks: int = 8
    d_model: int = 48
    n_layers: int = 3
    n_envs: int = 16
    seed: int = 0


def run_demo(run_dir: Path, config: TrainConfig, plan: DemoPlan) -> Path:
    """Trains a policy, compares it on held-out runs, and writes what came of it.

    Args:
        run_dir: Replaced if it holds an earlier demo.
        config: How the policy is trained.
        plan: How it is compared.

    Returns:
        The run directory, with `summary.json`, `demo.png`, `policy/` and `tb/`.
    """
    started = time.monotonic()
    say = console().print
    torch.set_num_threads(1)
    environment = config.environment
    for changes in environment.variants or ({},):  # before an earlier demo goes
        Where(
            env_id=environment.id, options={**environment.options, **changes}, n_envs=1, n_workers=0
        ).open().close()
    clear_demo(run_dir)
    run_dir = open_run_directory(run_dir, "demo", dump(config))
    say("1/3  PPO learns on small transformers to move their knobs while they train.")
    with bar("Training the controller") as progress:
        policy = train(config, run_dir, progress=progress)
    trained = time.monotonic()
    say("2/3  New runs on text it never saw, beside a grid of static settings.")
    with bar("Paired held-out runs") as progress:
        held_out = _same_size(policy, plan, progress)
    say("3/3  New runs of a larger model, beside the default setting.")
    with bar("Paired larger runs") as progress:
        larger = _larger(policy, plan, progress)
    policy.with_evaluation(headline(held_out.summary)).save(run_dir / "policy")
    title = "Held-out runs: default, best static, policy"
    draw_compared(run_dir / "demo.png", held_out.results, title)
    write_json(
        run_dir / "summary.json",
        {
            "held_out": held_out.summary,
            "larger_model": larger,
            "seconds": {
                "training": round(trained - started, 1),
                "total": round(time.monotonic() - started, 1),
            },
        },
    )
    say(paired_table(held_out.summary, f"{plan.n_tasks} held-out tasks, nats per byte"))
    say(gap_sentence(held_out.summary))
    size = f"{plan.n_layers} layers, d_model {plan.d_model}"
    say(paired_table(larger, f"{plan.n_larger_tasks} runs of a larger model ({size})"))
    return run_dir


def _same_size(policy: Policy, plan: DemoPlan, progress: Progress) -> Evaluation:
    env_id, options = deployment(policy)
    where = Where(env_id=env_id, options=options, n_envs=plan.n_envs, n_workers=default_workers())
    chosen = EvaluationPlan(n_tasks=plan.n_tasks, grid_points=plan.grid_points, seed=plan.seed)
    return evaluate(policy, where, chosen, progress)


def _larger(policy: Policy, plan: DemoPlan, progress: Progress) -> dict[str, Any]:
    """The policy and the default setting on a shape that training never saw."""
    env_id, options = deployment(policy, {"d_model": plan.d_model, "n_layers": plan.n_layers})
    n_envs = max(1, plan.n_larger_tasks // 2)
    where = Where(env_id=env_id, options=options, n_envs=n_envs, n_workers=default_workers())
    with where.open() as shards:
        default = shards.knobs.default_positions(1)[0]
        arms = [static_arm("default", default), policy_arm(policy, default)]
        count = RunCounter(len(arms) * plan.n_larger_tasks, progress)
        count(0)
        return summarise(play_arms(shards, arms, plan.n_larger_tasks, plan.seed, count))


def clear_demo(run_dir: Path) -> None:
    """Removes an earlier demo, and nothing else.

    Raises:
        RunDirectoryError: If the directory holds something else.
    """
    run_dir = run_dir.resolve()
    if not run_dir.exists() or (run_dir.is_dir() and all(map(is_trace, run_dir.iterdir()))):
        return
    record = run_dir / "config.yaml"
    if not record.is_file() or kind_of(record) != "demo":
        raise RunDirectoryError(
            f"Run directory {str(run_dir)!r} exists and holds no demo; choose another"
        )
    foreign = [path.name for path in run_dir.iterdir() if not _is_of_demo(path.name)]
    if foreign:
        raise RunDirectoryError(
            f"Run directory {str(run_dir)!r} holds {foreign[0]!r} beside an earlier demo; choose "
            f"another"
        )
    lock(run_dir)
    for path in sorted(run_dir.iterdir(), key=lambda path: path == record):  # killed, go on
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _is_of_demo(name: str) -> bool:
    return name in _LEFT or (name.startswith(".") and name.endswith(".tmp"))
