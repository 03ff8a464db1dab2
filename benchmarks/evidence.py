"""Writes the tables of the documents from what evaluations measured, so that no figure is copied.

    metactl evaluate ... --json docs/evaluation_NAME.json
    python -m benchmarks.evidence            # writes the tables
    python -m benchmarks.evidence --check    # says which are not what the files say

A table stands between `<!-- NAME KIND -->` and `<!-- end -->`; KIND is `paired` (all arms),
`paired: ARM; ARM` (some), `differences: ARM; ARM` (two columns), `costs: ARM; ARM`, `epochs` or
`disturbed`; or, of several evaluations, a row each (and `all` for NAME), `overview: NAME; NAME` or
`beside: NAME; NAME` (a policy and the one called `default`); or, with `headroom` for NAME,
`families` or `knobs` (from docs/headroom.json), and with `rival` or `long`, `places: RIVAL` (from
docs/rival.json and docs/long.json; RIVAL is what the other policy is called there), and with
`disturbed`, `kinds` (from docs/disturbed.json), and with `confirm`, `again: final_test`,
`again: best_test` or `rates` (from docs/confirm.json).
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from metactl.report import epochs_range, interval_text

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    *("README.md", "docs/evidence.md"),
    *(f"metactl/policies/{name}/README.md" for name in ("default", "families")),
)
_TABLE = re.compile(
    r"<!-- (?P<name>\w+) (?P<kind>\w+)(?:: (?P<arms>[^>]*))? -->\n.*?<!-- end -->", re.S
)
_LABELS = {
    "default": "default (dropout 0.1, base 10 000)",
    "plateau and gap rules": "plateau and gap rules together",
    "replay": "replay of the policy's mean trajectory",
    "yoked": "yoked: its moves in another run of the task",
    "linear policy": "best linear policy (CMA-ES, on training tasks)",
    "best schedule": "best schedule (CMA-ES, on training tasks)",
    "schedule told the data size": "best schedule that is told the data size",
    "schedule told the task": "best schedule that is told the data size and the peak rate",
    "PBT, best of 8": "PBT, best of 8 (at 8 times the compute)",
    "PB2, best of 8": "PB2, best of 8 (at 8 times the compute)",
    "rival runs/progress/policy": "a policy of the same recipe that sees progress alone",
    "rival default": "the policy `default`",
    "rival runs/grid/linear": "linear policy (CMA-ES, on training tasks)",
    "best static of training tasks": "best static setting of training tasks",
    "the same by size of the data": "best static setting of training tasks, by size of the data",
    "the same, told the task": "best static setting of training tasks that are most alike",
    "best static by epochs": "best static setting by epochs of the data, chosen on these tasks",
    "policy from there": "the policy, begun at the best static of training tasks",
    "policy from the worst static": "the policy, begun at the worst static setting",
    "policy without its guard": "the policy without its guard",
    "another run's all signals": "the policy, fed another run's signals",
}
_DISTURBED = {
    "best static": "best static of the undisturbed tasks",
    "rival runs/progress/policy": "progress alone",
}
_UNSHOWN = "best static of the grid"  # the same as the best static, or above it
_SETTINGS = ("default", "best static", "per-task best static")
_PLACES = {
    "default": "Python, as in training",
    "first": "Python, as in training",
    "english": "English prose",
    "cpp": "C++",
    "480": "twice as long (480 steps)",
    "960": "four times as long (960 steps)",
    "d64": "131 thousand parameters",
    "d128": "656 thousand parameters",
    "d64_480": "131 thousand parameters, twice as long",
    "recall": "`recall`",
    "waves": "`waves`",
    "digits": "`digits`",
    "families_text": "Python, as in training",
    "families_recall": "`recall`",
    "families_waves": "`waves`",
    "families_digits": "`digits`",
}
_OWN_FILES = ("headroom", "rival", "long", "disturbed", "confirm")
_AGAIN = {  # arms of docs/confirm.json
    "default": "minus default",
    "static dropout=0, rope_base=8": "minus dropout 0, base 8",
    "rival runs/progress/policy": "minus progress alone",
    "replay": "minus replay",
    "yoked": "minus yoked, at the same peak rate",
}
_ROOM = (
    "best static minus default",
    "per-task best minus best static",
    "best schedule minus best static",
)


def main(*, check: bool = False) -> int:
    """Writes every table of the documents.

    Args:
        check: Write nothing; exit with 1 if a table is not what its file says.
    """
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        fresh = written(text)
        if fresh == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(fresh, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'not what the files say' if check else 'written'}")
    return int(check and bool(stale))


def written(text: str) -> str:
    """A document with its tables as the files say."""
    return _TABLE.sub(_table, text)


def _table(match: re.Match[str]) -> str:
    begin = match[0].partition("\n")[0]
    if match["kind"] not in (*_OF_SEVERAL, *_KINDS):
        known = ", ".join((*_OF_SEVERAL, *_KINDS))
        sys.exit(f"{begin}: the kind of a table is one of {known}")
    chosen = [name.strip() for name in match["arms"].split(";")] if match["arms"] else []
    if match["kind"] in _OF_SEVERAL:
        rows = _OF_SEVERAL[match["kind"]](chosen)
    else:
        rows = _KINDS[match["kind"]](_read(match["name"]), chosen)
    return "\n".join([begin, *("| " + " | ".join(row) + " |" for row in rows), "<!-- end -->"])


def _read(name: str) -> dict[str, Any]:
    path = ROOT / "docs" / (f"{name}.json" if name in _OWN_FILES else f"evaluation_{name}.json")
    if not path.is_file():
        sys.exit(f"<!-- {name} ... -->: there is no {path}")
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def _overview(names: Sequence[str]) -> list[list[str]]:
    header = ["", "tasks", "minus default", "minus best static", "minus replay"]
    header += ["minus yoked", "gap closed", "worst tenth", "below one epoch"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name in names:
        summary = _read(name)
        minus, closed = summary["policy_minus"], summary["gap_closed"]
        share, low, high = (_percent(closed[end]) for end in ("estimate", "low", "high"))
        row = [_PLACES[name], str(summary["n_tasks"])]
        row += [
            interval_text(minus[arm]["final_test"])
            for arm in ("default", "best static", "replay", "yoked")
        ]
        row.append(f"{share} % [{low}, {high}]")
        row.append(f"{100 * minus['best static']['worst_decile_regret']:+.1f} %")
        first = [group for group in summary["by_epochs"] if group["from"] == 0]
        row += [interval_text(_nearest(each["policy_minus"])) for each in first] or ["none"]
        rows.append(row)
    return rows


def _nearest(minus: dict[str, Any]) -> dict[str, Any]:
    """The difference to whichever setting ends lowest in a group of tasks, among the arms."""
    settings = [a for a in minus if a == "default" or a.startswith(("best static", "static "))]
    nearest: dict[str, Any] = max((minus[arm] for arm in settings), key=lambda x: x["estimate"])
    return nearest


def _paired(summary: dict[str, Any], arms: Sequence[str]) -> list[list[str]]:
    """All arms, or some, the worst first."""
    shown = [arm for arm in arms or summary["arms"] if arm != _UNSHOWN]
    header = ["arm", "test loss", "best ckpt", "policy minus arm (95 %)", "its middle half"]
    rows = [[*header, "the same at best ckpt", "wins"], ["---", *["---:"] * 6]]
    for arm in sorted(shown, key=lambda arm: -summary["arms"][arm]["final_test"]):
        figures = summary["arms"][arm]
        losses = [f"{figures[name]:.3f}" for name in ("final_test", "best_checkpoint_test")]
        if arm == "policy":
            rows.append([f"**{cell}**" for cell in (arm, *losses)] + [""] * 4)
            continue
        minus = summary["policy_minus"][arm]
        final, best = (
            interval_text(minus[name]) for name in ("final_test", "best_checkpoint_test")
        )
        wins = f"{100 * minus['probability_of_improvement']:.0f} %"
        rows.append([_label(arm, summary), *losses, final, f"{minus['iqm']:+.3f}", best, wins])
    return rows


def _differences(summary: dict[str, Any], arms: Sequence[str]) -> list[list[str]]:
    rows = [["the policy minus", "final", "at the best checkpoint"], ["---", "---:", "---:"]]
    for arm in arms:
        minus = summary["policy_minus"][arm]
        columns = [interval_text(minus[name]) for name in ("final_test", "best_checkpoint_test")]
        rows.append([_label(arm, summary), *columns])
    return rows


def _epochs(summary: dict[str, Any], arms: Sequence[str]) -> list[list[str]]:
    shown = [*_SETTINGS, *arms]
    header = ["epochs of the data", "tasks", *(f"minus {_short(arm)}" for arm in shown)]
    rows = [header, ["---", *["---:"] * (len(shown) + 1)]]
    for group in summary["by_epochs"][::-1]:
        differences = [interval_text(group["policy_minus"][arm]) for arm in shown]
        rows.append([epochs_range(group), str(group["n_tasks"]), *differences])
    return rows


def _disturbed(summary: dict[str, Any], arms: Sequence[str]) -> list[list[str]]:
    found = summary["disturbed"]
    header = ["arm", "test loss", "policy minus arm (95 %)", "excess area", "settling"]
    rows = [[*header, "in balance"], ["---", *["---:"] * 5]]
    for arm in sorted(arms or found["arms"], key=lambda arm: -found["arms"][arm]["final_test"]):
        figures = found["arms"][arm]
        shares = [f"{100 * figures[name]:.0f} %" for name in ("settling_time", "homeostasis_index")]
        loss, area = f"{figures['final_test']:.3f}", f"{figures['excess_loss_area']:.3f}"
        minus = found["policy_minus"].get(arm)
        if minus is None:
            rows.append([f"**{arm}**", f"**{loss}**", "", area, *shares])
        else:
            label = _DISTURBED.get(arm, _short(arm))
            rows.append([label, loss, interval_text(minus["final_test"]), area, *shares])
    return rows


def _costs(summary: dict[str, Any], arms: Sequence[str]) -> list[list[str]]:
    header = ["to reach the final loss of", "share of the run", "share of its FLOPs"]
    rows = [[*header, "runs that pay for one training"], ["---", *["---:"] * 3]]
    for arm in arms:
        minus, runs = summary["policy_minus"][arm], summary["break_even"][arm]
        steps, flops = (
            _reached(minus[f"share_of_{what}_to_its_final_loss"]) for what in ("run", "flops")
        )
        rows.append(
            [_label(arm, summary), steps, flops, "never" if runs is None else f"{runs:,.0f}"]
        )
    return rows


def _families(found: dict[str, Any], _arms: Sequence[str]) -> list[list[str]]:
    """How far settings are apart, by family of tasks."""
    shown = [key for key in _ROOM if any(key in room for room in found["families"].values())]
    header = ["family", "default", *shown, "two runs apart"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for family, room in found["families"].items():
        differences = [interval_text(room[key]) if key in room else "" for key in shown]
        apart = f"{room['run_to_run']:.3f}"
        rows.append([f"`{family}`", f"{room['default']:.3f}", *differences, apart])
    return rows


def _knobs(found: dict[str, Any], _arms: Sequence[str]) -> list[list[str]]:
    """What one knob alone gains, by family of tasks."""
    columns = ["best value minus default", "per-task best minus best value"]
    rows = [["family", "knob", "best value", *columns], ["---", "---", *["---:"] * 3]]
    for family, room in found["families"].items():
        for knob, alone in room["knobs"].items():
            differences = [interval_text(alone[column]) for column in columns]
            label = knob.replace("_", " ")
            rows.append([f"`{family}`", label, f"{alone['best_value']:.3g}", *differences])
    return rows


def _places(found: dict[str, Any], rival: Sequence[str]) -> list[list[str]]:
    """The policy beside another and the mean of both, by place."""
    name = rival[0] if rival else "rival"
    pairs = {"policy - rival": f"policy minus {name}", "mean - policy": "mean minus policy"}
    pairs |= {"mean - rival": f"mean minus {name}"}
    rows = [["", "tasks", *pairs.values(), "mean minus policy at best ckpt"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for place, played in found["places"].items():
        differences = [interval_text(played["final_test_minus"][pair]) for pair in pairs]
        differences.append(interval_text(played["best_test_minus"]["mean - policy"]))
        rows.append([_PLACES[place], str(played["n_tasks"]), *differences])
    return rows


def _beside(names: Sequence[str]) -> list[list[str]]:
    """A policy of several families beside the default setting and `default`, by place."""
    header = ["", "tasks", "minus default setting", "at best ckpt"]
    rows = [[*header, "minus the policy `default`", "at best ckpt"], ["---", *["---:"] * 5]]
    for name in names:
        summary = _read(name)
        differences = [
            interval_text(summary["policy_minus"][arm][end])
            for arm in ("default", "rival default")
            for end in ("final_test", "best_checkpoint_test")
        ]
        rows.append([_PLACES[name], str(summary["n_tasks"]), *differences])
    return rows


def _kinds(found: dict[str, Any], _arms: Sequence[str]) -> list[list[str]]:
    """What each kind of disturbance costs: excess area by arm."""
    arms = list(next(iter(found["kinds"].values())))
    rows = [["excess area", *arms], ["---", *["---:"] * len(arms)]]
    for kind, figures in found["kinds"].items():
        areas = [f"{figures[a]['excess_loss_area']:.3f}" if a in figures else "" for a in arms]
        rows.append([kind.replace("_", " "), *areas])
    return rows


def _again(found: dict[str, Any], which: Sequence[str]) -> list[list[str]]:
    """The policy beside other arms, by place, on tasks of another seed."""
    rows = [["", "tasks", *_AGAIN.values()], ["---", *["---:"] * (1 + len(_AGAIN))]]
    for name, place in found["places"].items():
        minus = place[f"{which[0]}_minus"]
        cells = [interval_text(minus[f"policy - {arm}"]) for arm in _AGAIN]
        rows.append([_PLACES[name], str(place["n_tasks"]), *cells])
    return rows


def _rates(found: dict[str, Any], _arms: Sequence[str]) -> list[list[str]]:
    """The same of the first place, by the tasks' peak learning rates."""
    rows = [["peak learning rate", "tasks", *_AGAIN.values()]]
    rows.append(["---", *["---:"] * (1 + len(_AGAIN))])
    for third in found["places"]["default"]["by_peak_learning_rate"]:
        minus = third["final_test_minus"]
        cells = [interval_text(minus[f"policy - {arm}"]) for arm in _AGAIN]
        bounds = f"{third['from']:.4f} to {third['to']:.4f}"
        rows.append([bounds, str(third["n_tasks"]), *cells])
    return rows


_OF_SEVERAL = {"overview": _overview, "beside": _beside}
_KINDS = {
    "again": _again,
    "rates": _rates,
    "kinds": _kinds,
    "places": _places,
    "families": _families,
    "knobs": _knobs,
    "paired": _paired,
    "costs": _costs,
    "differences": _differences,
    "epochs": _epochs,
    "disturbed": _disturbed,
}


def _reached(share: float) -> str:
    """A median over tasks, where runs that never get there count as 2."""
    return "not reached by most" if share >= 2 else f"{100 * share:.0f} %"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def _label(arm: str, summary: dict[str, Any]) -> str:
    if arm == "best static":
        return f"best of {summary['grid_points']} static settings, chosen on these tasks"
    if arm == "per-task best static":
        return f"per-task best of the {summary['grid_points']} (an oracle)"
    if arm == "yoked" and "gap" not in summary:  # a file of code before 9df30f4
        return f"{_LABELS[arm]}, at another peak rate"
    if arm not in _LABELS and arm.startswith("another run's "):
        return f"fed {arm}"
    return _LABELS.get(arm, _short(arm))


def _short(arm: str) -> str:
    arm = arm.replace("policy, ", "the policy, ").replace("per-task best static", "per-task best")
    return arm if "=" in arm else arm.replace("_", " ")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
