"""What a sweep leaves for people: a table, CSV and JSON, TensorBoard's hparams, a figure."""

import csv
import io
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from metactl.files import write_atomically
from metactl.policy import Policy
from metactl.report import panels, plain_table, wide
from metactl.rundir import write_json
from metactl.statistics import paired_difference
from metactl.sweep.config import SweepConfig, Trial, trial_folder
from metactl.sweep.member import read_reference
from metactl.sweep.run import Outcome
from metactl.sweep.score import gain
from metactl.sweep.searcher import read_point

_SHOWN = 10
_COLUMNS = 4  # panels side by side
_WIDEST = 24  # characters of a value below a panel
_FIGURES = ("score", "score_low", "score_high", "default_loss", "loss")


def write_report(config: SweepConfig, trials: list[Trial], outcome: Outcome, root: Path) -> None:
    """Writes `results.json`, `results.csv`, `search.png` and `tb/`.

    The policy of the best trial, or the mean of the best ones, becomes `policy/`.
    """
    write_json(
        root / "results.json",
        {
            **against_policy(outcome, root),
            "results": outcome.results,
            "stopped": outcome.stopped,
            "failed": outcome.failed,
            "left": outcome.left,
            "planned": len(trials),
            "points": {trial.name: _point(trial, root) for trial in trials},
        },
    )
    keys = list(config.space)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    began = "began_at/" if config.is_population else ""  # its members move on from there
    rows.writerow(["trial", *(began + key for key in keys), *_FIGURES])
    for result in outcome.results:
        varied = [result["changes"].get(key) for key in keys]
        rows.writerow([result["trial"], *varied, *(result[name] for name in _FIGURES)])
    write_atomically(root / "results.csv", text.getvalue().encode())
    if not outcome.results:
        return
    _write_hparams(outcome.results, root, began)
    if config.is_population:
        draw_schedules(root / "search.png", outcome.results, keys)
    else:
        draw_search(root / "search.png", outcome.results, keys)
    best = outcome.results[: config.mean_of]
    winners = [trial_folder(root, result["trial"]) / "policy" for result in best]
    if len(winners) > 1:
        _mean_policy(winners, best).save(root / "policy")
    elif winners[0].exists():
        Policy.load(winners[0]).save(root / "policy")


def _point(trial: Trial, root: Path) -> dict[str, Any]:
    """What a trial varies, whether it finished or not; a searcher may have placed it elsewhere."""
    return {**trial.changes, **(read_point(trial_folder(root, trial.name)) or {})}


def _mean_policy(folders: list[Path], results: list[dict[str, Any]]) -> Policy:
    """What several trials do on average; its card says which."""
    policy = Policy.mean_of([Policy.load(folder) for folder in folders])
    members = [{name: result[name] for name in ("changes", "score")} for result in results]
    training = {**policy.card.training, "mean_of": members}
    return Policy(replace(policy.card, training=training), policy.weights)


def missing_members(config: SweepConfig, outcome: Outcome) -> str:
    """Says that a mean is of fewer policies than it should be; empty where it is not."""
    n = len(outcome.results)
    if config.mean_of <= n:
        return ""
    return f"The policy is made of {n} trials, not of mean_of={config.mean_of}: no more ended"


def against_policy(outcome: Outcome, root: Path) -> dict[str, Any]:
    """Of kind `"knobs"`: what the policy gains on the same tasks, and the best trial beside it.

    Returns:
        `policy`: its gain over default knobs with its interval; `best_minus_policy`: difference of
        test losses, above 0 where the policy is better. Empty where there is no such pair.
    """
    reference = read_reference(root)
    if not reference or not outcome.results:
        return {}
    default, policy = (np.array(reference[arm]) for arm in ("default", "policy"))
    best = np.array(outcome.results[0]["test_loss"])
    return {
        "policy": gain(default, policy),
        "best_minus_policy": asdict(paired_difference(best, policy)),
    }


def policy_sentence(compared: dict[str, Any]) -> str:
    """`against_policy` in words."""
    own, apart = compared["policy"], compared["best_minus_policy"]
    return (
        f"The policy on the same tasks: {own['score']:+.4f} "
        f"[{own['score_low']:+.4f}, {own['score_high']:+.4f}]; the loss of the trial with the "
        f"lowest probe loss minus the policy's: {apart['estimate']:+.4f} "
        f"[{apart['low']:+.4f}, {apart['high']:+.4f}]"
    )


def result_table(outcome: Outcome) -> Table:
    """The best trials, with intervals."""
    shown = min(_SHOWN, len(outcome.results))
    of_knobs = any("merit" in result for result in outcome.results)
    order = ", by probe loss" if of_knobs else ""
    title = f"The best {shown} of {len(outcome.results)} trials{order}"
    title = title if shown else "No trial finished"
    table = plain_table(title, "trial", "gain over default (95 %), nats")
    table.add_column("began at" if of_knobs else "varied")
    for result in outcome.results[:shown]:
        low, high = result["score_low"], result["score_high"]
        table.add_row(
            result["trial"],
            f"{result['score']:+.4f} [{low:+.4f}, {high:+.4f}]",
            ", ".join(f"{key} {_short(value)}" for key, value in result["changes"].items()),
        )
    return table


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _write_hparams(results: list[dict[str, Any]], root: Path, prefix: str) -> None:
    """One entry per trial; a text value stays text."""
    from torch.utils.tensorboard import SummaryWriter

    folder = root / "tb"
    shutil.rmtree(folder, ignore_errors=True)
    for result in results:
        plain = {
            prefix + key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in result["changes"].items()
        }
        figures = {f"sweep/{name}": result[name] for name in _FIGURES}
        with SummaryWriter(str(folder / result["trial"])) as writer:
            writer.add_hparams(plain, figures, run_name=".")


def draw_search(path: Path, results: list[dict[str, Any]], keys: list[str]) -> None:
    """Draws the score over every key that was varied, one panel each."""
    columns = min(_COLUMNS, len(keys))
    rows = math.ceil(len(keys) / columns)
    size = (3.4 * columns + 0.8, 3.2 * rows + 0.2)
    title = f"{len(results)} trials; the one that is chosen in green; 95 % intervals over tasks"
    with panels(path, title, rows, columns, figsize=size, sharey=True) as axes:
        for axis in axes.flat[len(keys) :]:
            axis.set_visible(False)
        for axis, key in zip(axes.flat, keys, strict=False):
            _draw_key(axis, key, results)
        for first in axes[:, 0]:
            first.set_ylabel("gain over default (nats)")


def _draw_key(axis: Any, key: str, results: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import NullFormatter

    values = [result["changes"].get(key) for result in results]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        places = [float(v) for v in values]
        if wide(places):
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        names = sorted({str(v) for v in values})
        places = [float(names.index(str(v))) for v in values]
        shown = [n if len(n) <= _WIDEST else f"no. {i}" for i, n in enumerate(names, start=1)]
        axis.set_xticks(range(len(names)), shown, rotation=20, ha="right")
    for place, result in zip(places, results, strict=True):
        best = result is results[0]
        colour = "tab:green" if best else "tab:blue"
        axis.plot([place] * 2, [result["score_low"], result["score_high"]], color=colour, lw=1)
        axis.plot(place, result["score"], "o", color=colour, ms=8 if best else 5)
    axis.axhline(0, color="0.7", lw=1, zorder=0)
    axis.set_xlabel(key)


def draw_schedules(path: Path, results: list[dict[str, Any]], keys: list[str]) -> None:
    """Draws where every knob was in the runs that each trial ended with, one panel each."""
    size = (3.4 * len(keys) + 0.8, 3.4)
    title = f"{len(results)} trials; the best, by probe loss, in green"
    with panels(path, title, 1, len(keys), figsize=size, sharex=True) as axes:
        for axis, key in zip(axes[0], keys, strict=True):
            for result in reversed(results):
                style: dict[str, Any] = {"color": "tab:blue", "lw": 0.8}
                if result is results[0]:
                    style = {"color": "tab:green", "lw": 2.5}
                values = result["schedule"][key]
                axis.step(np.arange(1, len(values) + 1), values, where="mid", **style)
            if wide([value for result in results for value in result["schedule"][key]]):
                axis.set_yscale("log")
            axis.set_xlabel("control step")
            axis.set_title(key, fontsize=10)
