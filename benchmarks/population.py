"""Optimizer steps per second, beside what a user would write instead, and the limit of the shape.

    python -m benchmarks.population --json FILE [--device cuda]

Sides, in turn, all in one run; medians, and ratios within each round:

- `single`: ordinary torch modules, one training run in one process, no control at all.
- `plain`: the same, as many processes as cores.
- `subproc`: Stable-Baselines3's `SubprocVecEnv` over our environment of one run, random actions.
- `ours`: our populations: signals, probe evaluation, random actions.
- `compiled`: the same, its optimizer step fused by `torch.compile`.
- `coarse`: that with products at `matmul_precision=medium` (bfloat16, where the machine has it).
- `ppo`: `compiled` under PPO, learning included.
- `limit`: the batched matrix products of a step of such a population, and nothing else.

On a CPU one process per core, with one thread each; on a GPU populations and the `limit` are one
process and replayed CUDA graphs, and the processes of the others share the GPU.
"""

import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from benchmarks import limit, plain
from benchmarks.provenance import write
from metactl.config import EnvironmentConfig, PPOConfig, TrainConfig
from metactl.shards import ShardRow, default_workers
from metactl.train import train
from metactl.worker import set_up_torch

SHAPES = {
    "tiny": {"d_model": 32, "n_heads": 4, "n_layers": 2, "context": 32},
    "small": {"d_model": 64, "n_heads": 4, "n_layers": 2, "context": 64},
    "medium": {"d_model": 128, "n_heads": 4, "n_layers": 4, "context": 128},
}
BATCH_SIZE = 8
PER_CONTROL_STEP = 10  # optimizer steps
ENV_ID = "envs:AdaptiveTransformer-v0"
ALONE = ("single", "plain", "subproc")  # sides that know no populations
TOGETHER = ("ours", "compiled", "coarse", "ppo", "limit")
POPULATION: dict[str, dict[str, Any]] = {  # what its options are
    "ours": {"compile": False},
    "compiled": {"compile": True},
    "coarse": {"compile": True, "matmul_precision": "medium"},
    "ppo": {"compile": True},
}
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
    sides: tuple[str, ...] = (*ALONE, *TOGETHER)
    """Which of them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the runs train."""


def _options(side: str, shape: dict[str, int], device: str) -> dict[str, Any]:
    return {
        **shape,
        **POPULATION[side],
        "device": device,
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


def _populations_memory(device: str) -> float | None:
    """MiB at the peak, of the worker processes or of the GPU."""
    if device == "cuda":
        return plain.peak_memory(device)
    return _peak_memory([process.pid or 0 for process in multiprocessing.active_children()])


def _steps_per_second(step: Callable[[], None], n_runs: int, seconds: float) -> float:
    for _ in range(2):
        step()
    start, n_steps = time.perf_counter(), 0
    while n_steps < 3 or time.perf_counter() - start < seconds:
        step()
        n_steps += 1
    return n_runs * n_steps * PER_CONTROL_STEP / (time.perf_counter() - start)


def _workers(device: str, n_runs: int) -> int:
    """Processes that share the runs evenly: one per core where that comes out."""
    cores = 1 if device == "cuda" else default_workers()
    return max(n for n in range(1, min(cores, n_runs) + 1) if n_runs % n == 0)


def population(
    side: str, shape: dict[str, int], n_runs: int, seconds: float, device: str
) -> Figures:
    """Our populations under random actions."""
    workers = _workers(device, n_runs)
    each = n_runs // workers
    if device == "cuda":  # what the sides before it left
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    options = _options(side, shape, device)
    with ShardRow(ENV_ID, each, options, 0 if device == "cuda" else workers) as row:
        row.call("reset", [(i * each,) for i in range(workers)])
        n_knobs = len(row.knobs)
        rng = np.random.default_rng(0)

        def step() -> None:
            row.call("step", [(rng.uniform(-1, 1, (each, n_knobs)),) for _ in range(workers)])

        rate = _steps_per_second(step, each * workers, seconds)
        return rate, _populations_memory(device)


def subproc(shape: dict[str, int], seconds: float, device: str) -> Figures:
    """Stable-Baselines3's way: a process and an environment of its own for each run."""
    from stable_baselines3.common.vec_env import SubprocVecEnv

    workers = default_workers()
    options = _options("ours", shape, device)
    env = SubprocVecEnv([_Single(options) for _ in range(workers)], start_method="spawn")
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

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def __call__(self) -> Any:
        import gymnasium

        set_up_torch()
        return gymnasium.make(ENV_ID, **self.options)


def ppo(shape: dict[str, int], n_runs: int, device: str) -> Figures:
    """Our populations under PPO: two whole rounds of playing and learning, after a first one."""
    workers, n_steps = _workers(device, n_runs), 20
    each = n_runs // workers
    config = TrainConfig(
        environment=EnvironmentConfig(
            options=_options("ppo", shape, device),
            n_envs=each,
            n_workers=0 if device == "cuda" else workers,
        ),
        ppo=PPOConfig(
            total_timesteps=4 * n_runs * n_steps,
            n_steps=n_steps,
            batch_size=n_runs * n_steps // 4,
            paired_runs=1,
        ),
        set_point_runs=0,
        checkpoint_every=1_000,  # saving is not what is measured
    )
    at: dict[int, float] = {}  # after how many control steps of all runs
    peak: list[float | None] = [None]

    def note(done: int, *_: object) -> None:
        at[done] = time.perf_counter()
        peak[0] = _populations_memory(device)

    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder), progress=note)
    round_ = n_runs * n_steps
    elapsed = at[3 * round_ + n_runs] - at[round_ + n_runs]  # from first step to first step
    return 2 * round_ * PER_CONTROL_STEP / elapsed, peak[0]


def measure_alone(side: str, shape: dict[str, int], options: Options) -> Figures:
    """A side that knows no populations, once."""
    if side == "subproc":
        return subproc(shape, options.seconds, options.device)
    n_processes = 1 if side == "single" else default_workers()
    return plain.steps_per_second(shape, BATCH_SIZE, n_processes, options.seconds, options.device)


def measure_together(side: str, shape: dict[str, int], n_runs: int, options: Options) -> Figures:
    """A side with a population, once."""
    device, seconds = options.device, options.seconds
    if side == "ppo":
        return ppo(shape, n_runs, device)
    if side in POPULATION:
        return population(side, shape, n_runs, seconds, device)
    workers = _workers(device, n_runs)
    each = n_runs // workers
    return limit.steps_per_second(shape, BATCH_SIZE, each, workers, seconds, device)


def compare(
    shape: dict[str, int], options: Options
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """All sides in turn; figures of the population measured just now, and of all so far."""
    alone = [side for side in ALONE if side in options.sides]
    together = [side for side in TOGETHER if side in options.sides]
    rounds: dict[int, list[dict[str, Figures]]] = {n: [] for n in options.n_runs}
    for _ in range(options.rounds):
        figures = {side: measure_alone(side, shape, options) for side in alone}
        for n, of_n in rounds.items():
            with_n = {side: measure_together(side, shape, n, options) for side in together}
            of_n.append(figures | with_n)
            so_far = [_summary(m, of_m) for m, of_m in rounds.items() if of_m]
            yield _summary(n, of_n), so_far


def _summary(n_runs: int, rounds: list[dict[str, Figures]]) -> dict[str, Any]:
    sides = list(rounds[0])
    rates = {side: statistics.median(each[side][0] for each in rounds) for side in sides}
    ratios = {
        f"{side} / {other}": statistics.median(each[side][0] / each[other][0] for each in rounds)
        for side in POPULATION
        for other in sides
        if side in sides and other != side
    }
    memory = {side: rounds[-1][side][1] for side in sides}
    return {
        "n_runs": n_runs,
        "steps_per_second": rates,
        "peak_mib": memory,
        "ratio": ratios,
        "rounds": [{side: each[side][0] for side in sides} for each in rounds],
    }


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "batch_size": BATCH_SIZE,
        "seconds": options.seconds,
        "shapes": {},
    }
    for name in options.shapes:
        for row, so_far in compare(SHAPES[name], options):
            report["shapes"][name] = {"shape": SHAPES[name], "populations": so_far}
            write(options.json, report, options.device)
            rates = "  ".join(f"{k} {v:.0f}" for k, v in row["steps_per_second"].items())
            print(f"{name:7s} {row['n_runs']:3d} runs: {rates} optimizer steps/s", flush=True)


if __name__ == "__main__":
    main()
