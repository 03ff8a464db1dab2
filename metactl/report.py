"""What people look at: the paired table and the picture of losses and knobs."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from metactl.knobs import FloatArray
from metactl.rollout import PlayedRun


def plain_table(title: str, *columns: str, n_text: int = 1) -> Table:
    """A table without lines; the first `n_text` columns are text, the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, header in enumerate(columns):
        table.add_column(header, justify="left" if i < n_text else "right")
    return table


def paired_table(summary: dict[str, Any], title: str) -> Table:
    """Arms, their losses, and the paired difference of the policy to each."""
    headers = ["arm", "test loss", "best ckpt", "policy minus arm (95 %)", "wins"]
    measured = any("homeostasis_index" in figures for figures in summary["arms"].values())
    table = plain_table(title, *headers, *["in balance"] * measured)
    order = sorted(summary["arms"].items(), key=lambda item: -item[1]["final_test"])
    for arm, figures in order:
        difference = summary["policy_minus"].get(arm)
        wins = None if difference is None else difference["probability_of_improvement"]
        table.add_row(
            f"[bold]{arm}[/bold]" if arm == "policy" else escape(arm),
            f"{figures['final_test']:.3f}",
            f"{figures['best_checkpoint_test']:.3f}",
            _difference(summary, arm),
            _share(wins),
            *([_share(figures.get("homeostasis_index"))] if measured else []),
        )
    return table


def disturbed_table(summary: dict[str, Any], title: str) -> Table:
    """Arms that something befell: final loss, what it cost, and how soon they were back."""
    headers = ["arm", "test loss", "policy minus arm (95 %)", "excess area", "settling"]
    table = plain_table(title, *headers, "in balance")
    for arm, figures in sorted(summary["arms"].items(), key=lambda item: -item[1]["final_test"]):
        table.add_row(
            f"[bold]{arm}[/bold]" if arm == "policy" else escape(arm),
            f"{figures['final_test']:.3f}",
            _difference(summary, arm),
            f"{figures['excess_loss_area']:.4f}",
            _share(figures.get("settling_time")),
            _share(figures.get("homeostasis_index")),
        )
    return table


_BEST_OF_GROUP = "best static by epochs"  # that of all tasks may be poor on these


def epochs_table(summary: dict[str, Any]) -> Table:
    """The policy minus the settings, by how often a run saw its data."""
    by_group = any(_BEST_OF_GROUP in group["policy_minus"] for group in summary["by_epochs"])
    best = _BEST_OF_GROUP if by_group else "best static"
    columns = ("default", best, "per-task best static")
    title = "The policy minus them, by epochs of a run's data"
    table = plain_table(title, "epochs", "tasks", *columns)
    for group in summary["by_epochs"]:
        differences = (interval_text(group["policy_minus"][arm]) for arm in columns)
        table.add_row(epochs_range(group), str(group["n_tasks"]), *differences)
    return table


def epochs_range(group: dict[str, Any]) -> str:
    """The bounds of a group of tasks, in words."""
    if group["to"] is None:
        return f"{group['from']:g} or more"
    return f"{group['from']:g} to {group['to']:g}" if group["from"] else f"below {group['to']:g}"


def headroom_table(found: dict[str, dict[str, Any]]) -> Table:
    """By family, what the best static setting, the best for each task and a schedule gain."""
    columns = {
        "best static minus default": "best static - default",
        "per-task best minus best static": "per task - best static",
        "best schedule minus best static": "schedule - best static",
    }
    title = "Room for gain, nats per token"
    table = plain_table(title, "family", "default", *columns.values(), "run to run")
    for family, figures in found.items():
        table.add_row(
            family,
            f"{figures['default']:.3f}",
            *(interval_text(figures[key]) if key in figures else "" for key in columns),
            f"{figures['run_to_run']:.3f}",
        )
    return table


def knob_headroom_table(found: dict[str, dict[str, Any]]) -> Table:
    """By family and knob, what moving that knob alone gains."""
    headers = ("family", "knob", "best value", "it - default", "per task - it")
    table = plain_table("One knob alone", *headers, n_text=2)
    for family, figures in found.items():
        for knob, room in figures["knobs"].items():
            table.add_row(
                family,
                knob,
                f"{room['best_value']:g}",
                interval_text(room["best value minus default"]),
                interval_text(room["per-task best minus best value"]),
            )
    return table


def _difference(summary: dict[str, Any], arm: str) -> str:
    difference = summary["policy_minus"].get(arm)
    return "" if difference is None else interval_text(difference["final_test"])


def interval_text(difference: dict[str, float | None]) -> str:
    """An estimate with its 95 % interval."""
    spread = " (one pair)"
    if difference["low"] is not None:
        spread = f" [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return f"{difference['estimate']:+.3f}{spread}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def gap_sentence(summary: dict[str, Any]) -> str:
    """The share of the gap that is closed, in words, where there is a gap that could be."""
    closed, gap = summary["gap_closed"], summary["gap"]
    if closed["estimate"] is None or not (gap["low"] or 0) > 0:
        return (
            f"The best static setting minus the per-task best: {interval_text(gap)}, which is too "
            f"little to say what share of it the policy closes."
        )

    def percent(value: float | None) -> str:
        return "unbounded" if value is None else f"{100 * value:.0f} %"

    return (
        f"Gap from best static to per-task best that the policy closes: "
        f"{percent(closed['estimate'])} "
        f"(95 % interval {percent(closed['low'])} to {percent(closed['high'])})."
    )


def break_even_sentence(summary: dict[str, Any]) -> str:
    """When training the policy has paid for itself, in words."""
    runs = summary["training_runs"]
    paid = [(arm, summary["break_even"][arm]) for arm in ("default", "best static")]
    found = [
        f"{needed:,.0f} runs that stop where the final loss of the {arm} is reached"
        if needed is not None
        else f"no number of runs against the {arm}, whose final loss the median run never reaches"
        for arm, needed in paid
    ]
    return f"Training it took {runs:,} runs. They are paid for by {', or by '.join(found)}."


def evaluation_report(summary: dict[str, Any]) -> list[Table | str]:
    """All that `metactl evaluate` prints, in order."""
    n_tasks = summary["n_tasks"]
    parts: list[Table | str] = [
        paired_table(summary, f"{n_tasks} held-out tasks, nats per token"),
        gap_sentence(summary),
    ]
    if "break_even" in summary:
        parts.append(break_even_sentence(summary))
    if summary["by_epochs"]:
        parts.append(epochs_table(summary))
    if "begun_at_best_static" in summary:
        title = "The same, begun at the best static setting of training tasks"
        parts.append(paired_table(summary["begun_at_best_static"], title))
    if "disturbed" in summary:
        parts.append(disturbed_table(summary["disturbed"], "The same, something befalling each"))
    return parts


@contextlib.contextmanager
def panels(path: Path, title: str, rows: int, columns: int, **layout: Any) -> Iterator[Any]:
    """Axes `[rows, columns]` to draw on, then written as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, squeeze=False, **layout)
    yield axes
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def wide(values: Sequence[float] | FloatArray) -> bool:
    """Whether values are drawn on a logarithmic axis: all above 0, and far apart."""
    return min(values) > 0 and max(values) / min(values) > 20


def draw_compared(path: Path, results: Mapping[str, Sequence[PlayedRun]], title: str) -> None:
    """Draws a policy beside the default and the best static setting; see `draw_runs`."""
    draw_runs(path, {name: results[name] for name in ("default", "best static", "policy")}, title)


def draw_runs(
    path: Path, arms: Mapping[str, Sequence[PlayedRun]], title: str, n_tasks: int = 3
) -> None:
    """Draws probe losses and knob trajectories of a few tasks, one column each.

    Args:
        path: PNG to write.
        arms: Results by arm, paired by task; the last arm's knobs are drawn boldest.
        title: Above the figure.
        n_tasks: Columns; tasks are spread over the order of the policy's gain.
    """
    names = list(arms)
    chosen = _spread_by_gain(arms[names[0]], arms[names[-1]], n_tasks)
    knobs = list(arms[names[-1]][0].values)
    with panels(
        path,
        title,
        1 + len(knobs),
        len(chosen),
        figsize=(4.2 * len(chosen), 2.6 + 1.35 * len(knobs)),
        sharex=True,
        height_ratios=[2.2] + [1.0] * len(knobs),
    ) as axes:
        _draw_tasks(axes, arms, chosen, knobs)


def _draw_tasks(
    axes: Any, arms: Mapping[str, Sequence[PlayedRun]], chosen: list[int], knobs: list[str]
) -> None:
    names = list(arms)
    for column, task in enumerate(chosen):
        for i, name in enumerate(names):
            result = arms[name][task]
            style = {"color": f"C{i}", "lw": 2.2 if i == len(names) - 1 else 1.2}
            share = np.linspace(0, 1, len(result.probe_loss))
            label = f"{name}: test {result.final_test:.3f}"
            axes[0, column].plot(share, result.probe_loss, label=label, **style)
            for row, knob in enumerate(knobs, start=1):
                values = np.asarray(result.values[knob])
                axes[row, column].step(share[1:], values, where="pre", **style)
        losses = np.concatenate([arms[name][task].probe_loss[5:] for name in names])
        losses = losses[np.isfinite(losses)]  # a run that diverged has others
        if losses.size:
            axes[0, column].set_ylim(losses.min() - 0.05, np.quantile(losses, 0.97) + 0.1)
        axes[0, column].set_title(f"task {task}", fontsize=10)
        axes[0, column].legend(fontsize=7, frameon=False)
        axes[-1, column].set_xlabel("share of the run")
    axes[0, 0].set_ylabel("probe loss (nats)")
    for row, knob in enumerate(knobs, start=1):
        axes[row, 0].set_ylabel(knob.replace("_", "\n"), fontsize=9)
        if wide(np.concatenate([r.values[knob] for name in names for r in arms[name]])):
            for axis in axes[row]:
                axis.set_yscale("log")


def _spread_by_gain(
    baseline: Sequence[PlayedRun], policy: Sequence[PlayedRun], n_tasks: int
) -> list[int]:
    """Tasks from the least to the greatest gain, so that the picture does not flatter."""
    pairs = zip(baseline, policy, strict=True)
    gains = np.array([before.final_test - after.final_test for before, after in pairs])
    order = gains.argsort()
    picks = np.linspace(0, len(order) - 1, min(n_tasks, len(order))).round().astype(int)
    return [int(order[i]) for i in picks]
