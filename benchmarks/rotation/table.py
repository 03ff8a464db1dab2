"""The report of `benchmarks.rotation_claims` as Markdown tables, for docs/rotations.md.

python -m benchmarks.rotation.table docs/rotation_claims.json
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

TASKS = ("text", "recall", "digits", "waves")
_LONGER = ("2x, longer gaps", "4x, longer gaps")


def interval(figures: dict[str, float], scale: float = 1.0, digits: int = 3) -> str:
    """Estimate and interval, bold where it excludes 0."""
    estimate, low, high = (scale * figures[name] for name in ("estimate", "low", "high"))
    text = f"{estimate:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def arms_of(comparison: dict[str, Any]) -> list[str]:
    return [arm for arm in comparison[TASKS[0]] if arm != "rope"]


def at_equal_steps(comparison: dict[str, Any]) -> list[str]:
    lines = [row("variant", *TASKS), row("---", *["---:"] * len(TASKS))]
    rope = [comparison[task]["rope"]["tests"]["test"]["loss"] for task in TASKS]
    lines.append(row("rope, test loss", *(f"{loss:.3f}" for loss in rope)))
    for arm in arms_of(comparison):
        tests = [comparison[task][arm]["tests"]["test"]["loss_minus_rope"] for task in TASKS]
        lines.append(row(f"`{arm}`", *(interval(each) for each in tests)))
    return lines


def at_equal_time(comparison: dict[str, Any]) -> list[str]:
    lines = [row("variant", "time of a step", *TASKS), row("---", *["---:"] * (len(TASKS) + 1))]
    for arm in arms_of(comparison):
        own = [comparison[task][arm] for task in TASKS]
        ratio = statistics.median(each["time_ratio"] for each in own)
        cells = [
            interval(each["loss_minus_rope_at_equal_time"])
            + (" (clipped)" if each["loss_minus_rope_at_equal_time"]["clipped"] else "")
            for each in own
        ]
        lines.append(row(f"`{arm}`", f"{ratio:.2f}", *cells))
    return lines


def on_longer_sequences(comparison: dict[str, Any]) -> list[str]:
    recall = comparison["recall"]
    lines = [row("variant", "1x", *_LONGER), row("---", "---:", *["---:"] * len(_LONGER))]
    rope = [recall["rope"]["tests"][test]["accuracy"] for test in ("test", *_LONGER)]
    lines.append(row("rope, accuracy in %", *(f"{100 * each:.0f}" for each in rope)))
    for arm in arms_of(comparison):
        tests = [recall[arm]["tests"][test]["accuracy_minus_rope"] for test in ("test", *_LONGER)]
        lines.append(row(f"`{arm}`", *(interval(each, 100, 0) for each in tests)))
    return lines


def with_depth(comparison: dict[str, Any]) -> list[str]:
    lines = [
        row("layers", "when", "rope", "block", "log ratio of the two"),
        row("---:", "---", "---:", "---:", "---:"),
    ]
    for depth, moments in comparison["depth"].items():
        for moment, each in moments.items():
            difference = interval(each["log_block_minus_log_rope"])
            when = moment.replace("_", " ")
            lines.append(
                row(depth, when, f"{each['rope']:.2f}", f"{each['block']:.2f}", difference)
            )
    return lines


def givens_cost(results: dict[str, Any]) -> list[str]:
    cost = results["cost"]
    lines = [row("head_dim", *cost), row("---:", *["---:"] * len(cost))]
    for dim in next(iter(cost.values())):
        lines.append(row(dim, *(f"{cost[schedule][dim]['ratio']:.1f}" for schedule in cost)))
    return lines


def correlations(results: dict[str, Any]) -> list[str]:
    """Mean absolute off-diagonal correlation of query and key features, trained."""
    parts = ("projection", "block", "random")
    lines = [
        row("variant", "task", "projected", "after the block", "after a random rotation"),
        row("---", "---", *["---:"] * 3),
    ]
    for arm in ("givens", "free", "exp", "block"):
        for task in TASKS:
            geometry = results.get(f"{task}/{arm}", {}).get("geometry")
            if geometry:
                means = [statistics.mean(geometry[f"correlation_{part}"]) for part in parts]
                lines.append(row(f"`{arm}`", task, *(f"{mean:.3f}" for mean in means)))
    return lines


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    comparison, results = report["comparison"], report["results"]
    for title, lines in {
        "At equal steps: test loss minus plain RoPE's, nats": at_equal_steps(comparison),
        "At equal time": at_equal_time(comparison),
        "Recall on longer sequences: accuracy minus plain RoPE's, %": on_longer_sequences(
            comparison
        ),
        "Gradient norm, first layer over last": with_depth(comparison),
        "Givens product over dense matrix, time": givens_cost(results),
        "Correlation of features": correlations(results),
    }.items():
        print(f"### {title}\n")
        print("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
