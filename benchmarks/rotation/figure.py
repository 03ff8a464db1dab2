"""The picture of the report: a column per task, and the claims below."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.rotation.recipes import USUAL
from models.rotary import VARIANTS

BETTER, WORSE, NEITHER = "#1b7837", "#b2182b", "#777777"
_WIDEST = 4.0  # the panels' half width, in medians of what is shown
_CLAIMS = 4.6  # inches
_LONGER = {
    "test": "1x",
    "2x, gaps as in training": "2x",
    "2x, longer gaps": "2x far",
    "4x, gaps as in training": "4x",
    "4x, longer gaps": "4x far",
}
_DEPTH_COLOURS = {"rope": "#4477aa", "block": "#ee6677"}


def draw(path: Path, report: dict[str, Any], tasks: list[str]) -> None:
    """Draws differences to plain RoPE per task, recall by length, and the four claims.

    Args:
        path: PNG to write.
        report: As in the JSON.
        tasks: Columns.
    """
    compared, results = report["comparison"], report["results"]
    names = [*VARIANTS, USUAL]
    arms = [name for name in names if any(name in compared.get(task, {}) for task in tasks)]
    columns = [*tasks, *(["lengths"] if "recall" in tasks else [])]
    heights = 2.2 + 0.24 * len(arms)
    size = (3.6 * max(4, len(columns)), heights + _CLAIMS)
    figure = plt.figure(figsize=size, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[heights, _CLAIMS])
    upper, lower = parts
    axes = upper.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        if column == "lengths":
            _lengths(axis, compared["recall"], arms)
        else:
            _forest(axis, compared[column], arms)
            _title(axis, column, compared[column]["rope"], results[f"{column}/rope"]["chance"])
    axes[0].set_yticks(range(len(arms)), [_label(arm, compared, tasks) for arm in arms])
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    claims = lower.subplots(1, 4, squeeze=False)[0]
    _norms(claims[0], compared, tasks)
    _correlations(claims[1], compared, tasks)
    _depths(claims[2], compared["depth"])
    _costs(claims[3], results["cost"])
    where = report["machine"]
    figure.suptitle(
        f"Rotations beside plain RoPE: {report['settings']['seeds']} paired seeds, 95 % bootstrap "
        f"intervals, none corrected for their number ({where['processor']}, torch "
        f"{where['torch']}, commit {report['commit']})\n"
        f"Behind each name: parameters beyond RoPE's, and the time of a step beside RoPE's",
        x=0.005,
        ha="left",
        fontsize=12,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _label(arm: str, compared: dict[str, Any], tasks: list[str]) -> str:
    """An arm's name, what it has in parameters beyond plain RoPE, and how long a step takes."""
    found = [task for task in tasks if arm in compared.get(task, {})]
    own = [compared[task][arm] for task in found]
    more = own[0]["parameters"] - compared[found[0]]["rope"]["parameters"]
    return f"{arm}  {more:+d}  x{np.median([each['time_ratio'] for each in own]):.2f}"


def _title(axis: Axes, task: str, rope: dict[str, Any], chance: dict[str, float]) -> None:
    test = rope["tests"]["test"]
    right = f", {100 * test['accuracy']:.0f} % right" if task in ("recall", "digits") else ""
    axis.set_title(
        f"{task}: RoPE {test['loss']:.3f} nats{right}\n(by frequency {chance['frequencies']:.2f}, "
        f"by last token {chance['last_token']:.2f})",
        fontsize=10,
    )


def _forest(axis: Axes, compared: dict[str, Any], arms: list[str]) -> None:
    """Intervals at equal steps, and a ring for the estimate at equal time."""
    shown = [arm for arm in arms if arm in compared and arm != "rope"]
    differences = {arm: compared[arm]["tests"]["test"]["loss_minus_rope"] for arm in shown}
    spans = [max(abs(d["low"]), abs(d["high"])) for d in differences.values() if d]
    edge = min(max(spans, default=1.0), _WIDEST * float(np.median(spans or [1.0]))) * 1.05
    for arm, d in differences.items():
        y = arms.index(arm)
        if d is None:
            axis.text(0, y, "diverged", ha="center", va="center", fontsize=8, color=WORSE)
            continue
        colour = BETTER if d["high"] < 0 else WORSE if d["low"] > 0 else NEITHER
        if abs(d["estimate"]) > edge:
            _outside(axis, d["estimate"], edge, y, colour)
            continue
        axis.plot([d["low"], d["high"]], [y, y], color=colour, lw=2, solid_capstyle="butt")
        axis.plot(d["estimate"], y, "o", color=colour, ms=5)
        timed = compared[arm]["loss_minus_rope_at_equal_time"]
        if timed is not None:
            x, beyond = timed["estimate"], abs(timed["estimate"]) > edge
            marker = (">" if x > 0 else "<") if beyond else "o"
            x = float(np.clip(x, -0.97 * edge, 0.97 * edge)) if beyond else x
            axis.plot(x, y, marker, mfc="none", mec="black", ms=8, mew=0.8)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlim(-edge, edge)
    axis.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    axis.set_xlabel("test loss minus RoPE's (nats)\nleft of 0 is better; ring: at equal time")
    _tidy(axis)


def _outside(axis: Axes, estimate: float, edge: float, y: int, colour: str) -> None:
    right = estimate > 0
    axis.annotate(
        f"{estimate:+.2f} " + ("→" if right else "←"),
        (0.97 * edge if right else -0.97 * edge, y),
        ha="right" if right else "left",
        va="center",
        fontsize=8,
        color=colour,
    )


def _lengths(axis: Axes, compared: dict[str, Any], arms: list[str]) -> None:
    """Recall's accuracy on longer sequences, as a table in colours."""
    table = np.full((len(arms), len(_LONGER)), np.nan)
    for row, arm in enumerate(arms):
        for column, test in enumerate(_LONGER):
            if arm in compared:
                table[row, column] = compared[arm]["tests"][test]["accuracy"]
    axis.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="Blues", alpha=0.8)
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(_LONGER)), list(_LONGER.values()), fontsize=9)
    axis.set_title("recall: % right by length of the test", fontsize=10)
    note = ""
    if "scaled_at_test" in compared.get("rope", {}):
        note = "\n".join(
            f"RoPE, then {scaling}: "
            + ", ".join(f"{100 * tests[test]['accuracy']:.0f}" for test in _LONGER)
            for scaling, tests in compared["rope"]["scaled_at_test"].items()
        )
    axis.set_xlabel(f"of training's (far: all gaps longer)\n{note}", fontsize=9)
    axis.tick_params(length=0)


def _norms(axis: Axes, compared: dict[str, Any], tasks: list[str]) -> None:
    """Greatest relative change of a trained query's or key's norm."""
    greatest: dict[str, float] = {}
    for arm in VARIANTS:
        changes = [compared[task].get(arm, {}).get("greatest_norm_change") for task in tasks]
        known = [change for change in changes if change is not None]
        if known:
            greatest[arm] = max(known)
    kept = {arm: change for arm, change in greatest.items() if change < 1e-5}
    rows = {arm: greatest[arm] for arm in greatest if arm not in kept}
    if kept:
        rows[f"the {len(kept)} others"] = max(kept.values())
    axis.barh(range(len(rows)), list(rows.values()), color=_DEPTH_COLOURS["rope"], height=0.6)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_xscale("log")
    axis.set_xlim(1e-8, max(10.0, 2 * max(rows.values())))
    axis.invert_yaxis()
    axis.set_xlabel("greatest | |q'| / |q| - 1 |, any task, trained")
    axis.set_title("Norms through the rotation", fontsize=10)
    _tidy(axis)


def _correlations(axis: Axes, compared: dict[str, Any], tasks: list[str]) -> None:
    """Change of the correlation between features by the static matrices."""
    rows = [
        (arm, compared[tasks[0]][arm]["correlation"])
        for arm in VARIANTS
        if "correlation" in compared[tasks[0]].get(arm, {})
    ]
    for what, label, shift, colour in (
        ("block_minus_before", "block - before it", -0.22, _DEPTH_COLOURS["block"]),
        ("block_minus_plain_rope", "block - plain RoPE's", 0.0, _DEPTH_COLOURS["rope"]),
        ("random_minus_before", "random rotation - before", 0.22, NEITHER),
    ):
        for row, (_, differences) in enumerate(rows):
            d = differences[what]
            if d is not None:
                y, note = row + shift, label if row == 0 else None
                axis.plot([d["low"], d["high"]], [y, y], color=colour, lw=2)
                axis.plot(d["estimate"], y, "o", color=colour, ms=4, label=note)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(rows)), [arm for arm, _ in rows])
    axis.set_ylim(len(rows) + 2.2, -0.6)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_xlabel("change of mean |correlation|\nbetween q, k features of a head")
    axis.set_title(f"Decorrelation ({tasks[0]})", fontsize=10)
    if rows:
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    _tidy(axis)


def _depths(axis: Axes, depths: dict[str, Any]) -> None:
    """Gradient of the first layer over that of the last."""
    layers = [int(n) for n in depths]
    for when, style in zip(next(iter(depths.values()), {}), ("o-", "s--"), strict=False):
        for rotation, colour in _DEPTH_COLOURS.items():
            ratios = [each[when][rotation] for each in depths.values()]
            label = f"{rotation}, {when.replace('_', ' ')}"
            axis.plot(layers, ratios, style, color=colour, ms=4, label=label)
        for n, each in zip(layers, depths.values(), strict=True):
            d, rope = each[when]["log_block_minus_log_rope"], each[when]["rope"]
            if d is not None:
                ends = [rope * np.exp(d[end]) for end in ("low", "high")]
                axis.plot([n, n], ends, color=_DEPTH_COLOURS["block"], lw=1)
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(layers, [str(n) for n in layers])
    axis.set_xlabel("layers (intervals: of block against rope)")
    axis.set_ylabel("|gradient| of first layer / last")
    axis.set_title("Gradients with depth", fontsize=10)
    if layers:
        axis.legend(fontsize=8, frameon=False)
    _tidy(axis)


def _costs(axis: Axes, costs: dict[str, Any]) -> None:
    """Seconds of a Givens product, its build and a dense matrix."""
    for schedule, colour in zip(costs, ("#ee6677", "#228833"), strict=True):
        dims = [int(dim) for dim in costs[schedule]]
        for what, style in (("givens", "o-"), ("build", "^:")):
            values = [1e3 * each[f"{what}_seconds"] for each in costs[schedule].values()]
            label = f"{schedule}: {'build and apply' if what == 'givens' else 'build alone'}"
            axis.plot(dims, values, style, color=colour, ms=4, label=label)
    dense = [1e3 * each["dense_seconds"] for each in costs["butterfly"].values()]
    axis.plot(dims, dense, "s-", color="black", ms=4, label="dense: apply")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(dims, [str(dim) for dim in dims])
    axis.set_xlabel("head dimension (4 heads, 1024 tokens)")
    axis.set_ylabel("ms, forward and backward")
    axis.set_title("Cost of Givens products", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", lw=0.3)
    axis.set_axisbelow(True)
