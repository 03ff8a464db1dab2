"""How the time of an optimizer step grows with runs, width, context, and what the knobs leave.

    OMP_NUM_THREADS=1 python -m benchmarks.cost --json docs/cost.json --figure docs/cost.png

One process, one thread; each curve changes one thing and keeps the rest. Times are of a control
step of ten optimizer steps (data, forward, backward, clipping, AdamW, signals, probe evaluation),
per optimizer step of one run. All sides take turns; medians.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.provenance import write
from benchmarks.timing import Run, in_turn, medians
from envs.transformer_run import build_run
from metactl.report import panels

BASE = {"d_model": 64, "n_heads": 4, "n_layers": 2, "context": 64, "batch_size": 8}
N_RUNS = 4
_STEPS = 10  # optimizer steps of a control step
_LARGER = {"d_model": 128, "context": 256}  # of which knobs leave a part
Point = tuple[str, float]  # the curve, and where on it


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    json: Path
    """Where the figures go."""
    figure: Path | None = None
    """A picture of them, as PNG."""
    rounds: int = 3
    """How often all are measured, in turn."""
    runs: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    d_model: tuple[int, ...] = (32, 64, 128, 256)
    context: tuple[int, ...] = (32, 64, 128, 256, 512)
    width: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    span: tuple[int, ...] = (8, 32, 128, 256)


TITLES = {
    "runs": "runs together",
    "d_model": "d_model",
    "context": "context, tokens",
    "width": "width of one run, share",
    "span": "span of one run, tokens",
}


def control_step(n_runs: int, changes: Mapping[str, Any], knobs: Mapping[str, float]) -> Run:
    """Ten optimizer steps of a population, and what is measured after them.

    Args:
        n_runs: Its size; a single one computes only what its knobs leave.
        changes: In the shape.
        knobs: That are not at their defaults.
    """
    run = build_run(n_runs, {**BASE, **changes, "horizon": 100_000})
    run.reset(range(n_runs), [run.sample_task(i) for i in range(n_runs)], range(n_runs))
    values = {knob.name: knob.default for knob in run.knobs} | dict(knobs)
    run.apply({name: np.full(n_runs, value) for name, value in values.items()})
    return lambda: run.advance(_STEPS)


def sides(options: Options) -> dict[Point, tuple[int, Run]]:
    """By point: the number of runs, and a control step of them."""
    found: dict[Point, tuple[int, Run]] = {}
    for n in options.runs:
        found["runs", n] = n, control_step(n, {}, {})
    for d_model in options.d_model:
        found["d_model", d_model] = N_RUNS, control_step(N_RUNS, {"d_model": d_model}, {})
    for context in options.context:
        found["context", context] = N_RUNS, control_step(N_RUNS, {"context": context}, {})
    for width in options.width:
        found["width", width] = 1, control_step(1, _LARGER, {"embedding_width": width})
    for span in options.span:
        found["span", span] = 1, control_step(1, _LARGER, {"attention_span": span})
    return found


def curves(options: Options) -> dict[str, dict[str, float]]:
    """By curve and point: milliseconds per optimizer step of one run."""
    points = sides(options)
    seconds = medians(in_turn({point: run for point, (_, run) in points.items()}, options.rounds))
    found: dict[str, dict[str, float]] = {name: {} for name in TITLES}
    for (name, x), (n_runs, _) in points.items():
        found[name][f"{x:g}"] = 1e3 * seconds[name, x] / (n_runs * _STEPS)
    return found


def draw(path: Path, found: Mapping[str, Mapping[str, float]]) -> None:
    """A panel for each curve, all axes logarithmic; times on one scale."""
    layout = {"figsize": (3.2 * len(found), 3.4), "sharey": True}
    with panels(path, "", 1, len(found), **layout) as (axes,):
        for axis, (name, curve) in zip(axes, found.items(), strict=True):
            axis.loglog([float(x) for x in curve], list(curve.values()), "o-", color="tab:blue")
            axis.set_xlabel(TITLES[name])
            axis.set_xticks([float(x) for x in curve], list(curve))
            axis.minorticks_off()
            axis.grid(axis="y", alpha=0.3)
        axes[0].set_ylabel("ms per optimizer step of a run")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    found = curves(options)
    shape = {"shape": BASE, "runs": N_RUNS, "of_one_run": {**BASE, **_LARGER}}
    write(options.json, {**shape, "milliseconds": found})
    for name, curve in found.items():
        print(name, *(f"{x}: {each:.2f}" for x, each in curve.items()), flush=True)
    if options.figure is not None:
        draw(options.figure, found)


if __name__ == "__main__":
    main()
