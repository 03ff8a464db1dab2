"""Optimizer steps per second, beside what a user would write instead, and the limit of the shape.

    python -m benchmarks.population --json FILE

Sides, in turn, all in one run; medians, and ratios within each round:

- `plain`: ordinary torch modules, one training run per process, no control at all.
- `subproc`: Stable-Baselines3's `SubprocVecEnv` over our environment of one run, random actions.
- `ours`: our populations in worker processes: signals, probe evaluation, random actions.
- `ppo`: the same under PPO, learning included.
- `limit`: the batched matrix products of a step of such a population, and nothing else.

One process per core everywhere, with one thread each.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks import limit, plain
from benchmarks.provenance import commit, machine
from metactl.config import EnvironmentConfig, PPOConfig, TrainConfig
from metactl.shards import ShardRow, default_workers
from metactl.train import train

SHAPES = {
    "tiny": {"d_model": 32, "n_heads": 4, "n_layers": 2, "context": 32},
    "small": {"d_model": 64, "n_heads": 4, "n_layers": 2, "context": 64},
    "medium": {"d_model": 128, "n_heads": 4, "n_layers": 4, "context": 128},
}
BATCH_SIZE = 8
PER_CONTROL_STEP = 10  # optimizer steps
ENV_ID = "envs:AdaptiveTransformer-v0"
SIDES = ("plain", "subproc", "ours", "ppo", "limit")
Figures = tuple[float, float | None]  # optimizer steps per second of all runs; MiB at the peak


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    json: Path
    """Where the figures go."""
    rounds: int = 3
    """How often all sides are measured, in turn."""
    seconds: float = 6.0
    """Seconds of a side in each round, about."""
    shapes: tuple[str, ...] = ("tiny", "small", "medium")
    """Of the transformer: tiny, small, medium."""
    n_runs: tuple[int, ...] = (8, 32)
    """Runs of a population, over all workers."""
    sides: tuple[str, ...] = SIDES
    """Which of them."""


def _options(shape: dict[str, int]) -> dict[str, Any]:
    return {
        **shape,
        "batch_size": BATCH_SIZE,
        "horizon": 40 * PER_CONTROL_STEP,
        "n_control_steps": 40,
    }


def _peak_memory(pids: list[int]) -> float | None:
    """MiB that processes had at their peaks, together; None where the system does not say."""
    total = 0.0
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        if not status.exists():
            return None
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        total += int(peak.split()[1]) / 1024
    return total


def _steps_per_second(step: Callable[[], None], n_runs: int, seconds: float) -> float:
    for _ in range(2):
        step()
    start, n_steps = time.perf_counter(), 0
    while n_steps < 3 or time.perf_counter() - start < seconds:
        step()
        n_steps += 1
    return n_runs * n_steps * PER_CONTROL_STEP / (time.perf_counter() - start)


def ours(shape: dict[str, int], n_runs: int, seconds: float) -> Figures:
    """Our populations under random actions."""
    workers = default_workers()
    each = max(1, n_runs // workers)
    with ShardRow(ENV_ID, each, _options(shape), workers) as row:
        row.call("reset", [(i * each,) for i in range(workers)])
        n_knobs = len(row.describe()["knobs"])
        rng = np.random.default_rng(0)

        def step() -> None:
            row.call("step", [(rng.uniform(-1, 1, (each, n_knobs)),) for _ in range(workers)])

        rate = _steps_per_second(step, each * workers, seconds)
        return rate, _peak_memory([worker.process.pid or 0 for worker in row._workers])


def subproc(shape: dict[str, int], n_runs: int, seconds: float) -> Figures:
    """Stable-Baselines3's way: a process and an environment of its own for each run."""
    from stable_baselines3.common.vec_env import SubprocVecEnv

    workers = default_workers()
    env = SubprocVecEnv([_Single(shape) for _ in range(workers)], start_method="spawn")
    env.reset()
    rng = np.random.default_rng(0)
    n_knobs = env.action_space.shape[0]  # type: ignore[index]
    rate = _steps_per_second(
        lambda: env.step(rng.uniform(-1, 1, (workers, n_knobs))) and None, workers, seconds
    )
    memory = _peak_memory([process.pid for process in env.processes])
    env.close()
    return rate, memory


class _Single:
    """Makes an environment of one run, in the process where it is called."""

    def __init__(self, shape: dict[str, int]) -> None:
        self.shape = shape

    def __call__(self) -> Any:
        import gymnasium

        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        return gymnasium.make(ENV_ID, **_options(self.shape))


def ppo(shape: dict[str, int], n_runs: int, seconds: float) -> Figures:
    """Our populations under PPO, from the first control step to the last of the third update."""
    workers, n_steps = default_workers(), 20
    each = max(1, n_runs // workers)
    config = TrainConfig(
        environment=EnvironmentConfig(options=_options(shape), n_envs=each, n_workers=workers),
        ppo=PPOConfig(
            total_timesteps=3 * each * workers * n_steps,
            n_steps=n_steps,
            batch_size=each * workers * n_steps // 4,
            paired_runs=1,
        ),
        set_point_runs=0,
    )
    times: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder), progress=lambda done, *_: times.append((_now(), done)))
    (start, first), (end, last) = times[0], times[-1]
    return (last - first) * PER_CONTROL_STEP / (end - start), None


def _now() -> float:
    return time.perf_counter()


def measure(side: str, shape: dict[str, int], n_runs: int, seconds: float) -> Figures:
    """One side once."""
    workers = default_workers()
    if side == "plain":
        return plain.steps_per_second(shape, BATCH_SIZE, workers, seconds)
    if side == "limit":
        each = max(1, n_runs // workers)
        return limit.steps_per_second(shape, BATCH_SIZE, each, workers, seconds)
    return {"ours": ours, "subproc": subproc, "ppo": ppo}[side](shape, n_runs, seconds)


def compare(shape: dict[str, int], n_runs: int, options: Options) -> dict[str, Any]:
    """All sides in turn, and the ratios of `ours` and `ppo` to the others within a round."""
    rounds = [
        {side: measure(side, shape, n_runs, options.seconds) for side in options.sides}
        for _ in range(options.rounds)
    ]
    report: dict[str, Any] = {"n_runs": n_runs, "steps_per_second": {}, "peak_mib": {}, "ratio": {}}
    for side in options.sides:
        report["steps_per_second"][side] = statistics.median(each[side][0] for each in rounds)
        report["peak_mib"][side] = rounds[-1][side][1]
    for side in ("ours", "ppo"):
        for other in options.sides:
            if side in options.sides and other != side:
                report["ratio"][f"{side} / {other}"] = statistics.median(
                    each[side][0] / each[other][0] for each in rounds
                )
    return report


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"batch_size": BATCH_SIZE, "shapes": {}}
    for name in options.shapes:
        rows = [compare(SHAPES[name], n, options) for n in options.n_runs]
        report["shapes"][name] = {"shape": SHAPES[name], "populations": rows}
        for row in rows:
            rates = "  ".join(f"{k} {v:.0f}" for k, v in row["steps_per_second"].items())
            print(f"{name:7s} {row['n_runs']:3d} runs: {rates} optimizer steps/s")
            print("  " + "  ".join(f"{k} {v:.2f}" for k, v in row["ratio"].items()))
    report |= {"machine": machine(), "commit": commit()}
    options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
