"""Which settings of a sweep over meta-training matter.

    metactl sweep --config configs/sweep_study.yaml --run-dir runs/study
    metactl sweep --config configs/sweep_confirm.yaml --run-dir runs/confirm
    python -m benchmarks.sweep_study --run-dirs runs/study runs/confirm --json FILE

The gap lies between the best static setting on average and the best for each task, of a grid, on
the tasks that scored the trials; both are chosen by runs with other seeds than those that score.
Where choosing for each task gains nothing there is no gap, and what is said is how far trials end
below the best static setting. Of every setting that was drawn: Spearman's rank correlation with the
trials' score, with a bootstrap interval over trials. Of settings that were repeated with other
training seeds: the mean score of each, and the difference with an interval over seeds.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import yaml
from scipy.stats import spearmanr

from benchmarks.provenance import write
from metactl.config import parse
from metactl.evaluation import play_arms, static_arm
from metactl.evaluation.arms import static_grid
from metactl.evaluation.headroom import per_task_best
from metactl.evaluation.summary import column
from metactl.policy import Policy
from metactl.shards import ShardRow, default_workers
from metactl.statistics import paired_difference
from metactl.sweep.config import SweepConfig
from metactl.sweep.score import runs_of

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which sweeps, and what their trials are measured by."""

    run_dirs: tuple[Path, ...]
    """Directories of finished sweeps of kind 'train', alike but for what they vary."""
    json: Path
    """Where the figures go."""
    grid: int = 33
    """Static settings, the default among them."""


def main(options: Options) -> None:
    gap = measure_gap(options.run_dirs[0], options.grid)
    figures: dict[str, Any] = {"gap": gap, "sweeps": []}
    for run_dir in options.run_dirs:
        config, results = read_sweep(run_dir)
        for result in results:
            below = gap["best_static"] - result["loss"]
            room = gap["best_static"] - gap["per_task_best"]
            result["below_best_static"] = below
            result["gap_closed"] = below / room if room > 0 else None
        figures["sweeps"].append(
            {
                "results": results,
                "correlations": {
                    key: correlation([r["changes"][key] for r in results], scores(results))
                    for key, values in config.space.items()
                    if values.grid is None
                },
                "repeated": repeated(results),
            }
        )
        print(json.dumps({k: v for k, v in figures["sweeps"][-1].items() if k != "results"}))
    write(options.json, figures)


def read_sweep(run_dir: Path) -> tuple[SweepConfig, list[dict[str, Any]]]:
    record = yaml.safe_load((run_dir / "config.yaml").read_text())
    results = json.loads((run_dir / "results.json").read_text())["results"]
    config = {name: value for name, value in record["config"].items() if name != "resolved"}
    return parse(SweepConfig, config, str(run_dir)), results


def scores(results: Sequence[dict[str, Any]]) -> list[float]:
    return [result["score"] for result in results]


def measure_gap(run_dir: Path, n_points: int) -> dict[str, float]:
    config, results = read_sweep(run_dir)
    policy = Policy.load(run_dir / "trials" / results[0]["trial"] / "policy")
    env_id, options = runs_of(policy, {})
    with ShardRow(env_id, 16, options, default_workers()) as shards:
        points = static_grid(shards.knobs, n_points)
        arms = [static_arm(str(i), point) for i, point in enumerate(points)]
        again = [replace(arm, other_seed=True) for arm in arms]
        chosen_on = play_arms(shards, again, config.n_tasks, config.seed)
        played = play_arms(shards, arms, config.n_tasks, config.seed)
    names = [arm.name for arm in arms]
    best = min(names, key=lambda name: column(chosen_on[name], "final_probe").mean())
    return {
        "settings": n_points,
        "default": float(column(played["0"], "final_test").mean()),
        "best_static": float(column(played[best], "final_test").mean()),
        "per_task_best": float(per_task_best(chosen_on, played, names).mean()),
    }


def correlation(values: Sequence[float], score: Sequence[float]) -> dict[str, float]:
    x, y = np.array(values, dtype=np.float64), np.array(score)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_RESAMPLES):
        index = rng.integers(0, len(x), len(x))
        if len(set(x[index])) > 1:
            drawn.append(spearmanr(x[index], y[index]).statistic)
    low, high = np.quantile(drawn, (0.025, 0.975))
    estimate = float(spearmanr(x, y).statistic)
    return {"estimate": estimate, "low": float(low), "high": float(high)}


def repeated(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By setting, without its seed, best first: how it does on average, and minus the best.

    Empty where settings were not all tried with the same seeds, at least two.
    """

    def setting(result: dict[str, Any]) -> str:
        return json.dumps({k: v for k, v in result["changes"].items() if k != "seed"})

    ordered = sorted(results, key=lambda r: (setting(r), r["changes"].get("seed", 0)))
    groups = [
        (json.loads(key), list(found)) for key, found in itertools.groupby(ordered, key=setting)
    ]
    seeds = {tuple(r["changes"].get("seed") for r in found) for _, found in groups}
    if len(seeds) > 1 or len(next(iter(seeds))) < 2:
        return []
    groups.sort(key=lambda group: -float(np.mean(scores(group[1]))))
    best = np.array(scores(groups[0][1]))
    return [
        {
            "setting": key,
            "seeds": [result["changes"]["seed"] for result in found],
            "scores": scores(found),
            "below_best_static": float(np.mean([r["below_best_static"] for r in found])),
            "minus_best": asdict(paired_difference(np.array(scores(found)), best)),
        }
        for key, found in groups
    ]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
