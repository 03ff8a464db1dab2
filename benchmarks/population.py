"""Optimizer steps per second: our environment under PPO, and plain modules without any control.

    python -m benchmarks.population --json FILE

Both sides in one run, in turn; medians, and the ratio of each pair. Ours includes signals, probe
evaluation and PPO's learning; the plain side trains and nothing else.
"""

import json
import platform
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.plain import steps_per_second
from metactl.config import EnvironmentConfig, PPOConfig, TrainConfig
from metactl.shards import default_workers
from metactl.train import train

SHAPE = {"d_model": 32, "n_heads": 4, "n_layers": 2, "context": 32}
BATCH_SIZE = 8
OPTIMIZER_STEPS_PER_CONTROL_STEP = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    json: Path
    """Where the figures go."""
    pairs: int = 3
    """How often both sides are measured, in turn."""
    seconds: float = 10.0
    """Seconds of the plain side in each pair."""
    n_envs: int = 16
    """Training runs per worker process."""


def ours_steps_per_second(n_envs: int) -> float:
    """Of all replicas together, under PPO, from the first control step to the last."""
    n_workers, n_steps = default_workers(), 20
    per_update = n_envs * n_workers * n_steps
    options = {**SHAPE, "batch_size": BATCH_SIZE, "horizon": 400, "n_control_steps": 40}
    config = TrainConfig(
        environment=EnvironmentConfig(options=options, n_envs=n_envs, n_workers=n_workers),
        ppo=PPOConfig(total_timesteps=2 * per_update, n_steps=n_steps, batch_size=128),
    )
    times: list[tuple[float, int]] = []

    def note(done: int, total: int, status: str) -> None:
        times.append((time.perf_counter(), done))

    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder), progress=note)
    (start, first), (end, last) = times[0], times[-1]
    return (last - first) * OPTIMIZER_STEPS_PER_CONTROL_STEP / (end - start)


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"processor": model, "cores": default_workers(), "torch": torch.__version__}


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    plain, ours = [], []
    for _ in range(options.pairs):
        plain.append(steps_per_second(SHAPE, BATCH_SIZE, default_workers(), options.seconds))
        ours.append(ours_steps_per_second(options.n_envs))
        print(f"plain {plain[-1]:.0f}   ours {ours[-1]:.0f} optimizer steps/s")
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    report = {
        "shape": {**SHAPE, "batch_size": BATCH_SIZE},
        "plain_steps_per_second": plain,
        "ours_steps_per_second": ours,
        "median_ratio": statistics.median(ratios),
        "machine": machine(),
        "commit": commit(),
    }
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"median ratio {report['median_ratio']:.2f}")


if __name__ == "__main__":
    main()
