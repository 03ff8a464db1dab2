"""What rotations are worth: every variant beside plain RoPE, and the claims made for them.

    python -m benchmarks.rotation_claims --json FILE --figure PNG

Measured, not asserted: whether norms are kept, whether features get less correlated, how
gradients compare between the first and the last layer as depth grows, what Givens products cost
beside dense matrices, and what every variant reaches on four tasks at the same steps and at the
same time. Seeds are paired: the same data, and the same initial weights where there is a choice.

At equal time a variant is set against plain RoPE trained for as many more (or fewer) steps as
the variant's steps take longer, by the clock: every tenth step is timed beside one of RoPE's.
At these sizes a step is mostly overhead, so the ratios are those of small models on this machine.

What is finished is in FILE at once; started again, the same command goes on from there.
"""

import json
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.pool import in_processes
from benchmarks.rotation.compare import comparison
from benchmarks.rotation.cost import givens_cost
from benchmarks.rotation.jobs import Job, all_jobs, prepare_worker, run_job
from benchmarks.rotation.recipes import RECIPES
from envs.tasks import digit_sequences
from metactl.arrays import six_digits
from metactl.files import write_atomically
from metactl.progress import Progress, bar
from metactl.shards import default_workers
from metactl.worker import set_up_torch
from models.rotary import VARIANTS

_COST = "cost"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    json: Path
    """Where the figures go, as they come."""
    figure: Path
    """Where the picture goes."""
    seeds: int = 8
    """Paired trainings of each variant."""
    steps: int | None = None
    """Optimizer steps of every training; each task's own number without it."""
    variants: str = ",".join(VARIANTS)
    """Names, joined by commas; plain RoPE is always there."""
    tasks: str = ",".join(RECIPES)
    """Names, joined by commas."""
    workers: int = default_workers()
    """Processes, with one thread each."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        tasks = _known(options.tasks, list(RECIPES), "task")
        variants = _known(options.variants, list(VARIANTS), "variant")
        settings = {"seeds": options.seeds, "steps": options.steps}
        earlier = _earlier(options.json, settings)
        if "digits" in tasks:
            digit_sequences(0, 0)  # refuses now, not in a worker, what is not installed
    except (ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    results = earlier.get("results", {})
    report: dict[str, Any] = {"settings": settings, **_where(earlier), "results": results}
    jobs = [job for job in all_jobs(tasks, variants, options.steps) if job.name not in results]
    try:
        with bar("rotations") as progress:
            for name, result in _measured(jobs, options, progress):
                results[name] = result
                write_atomically(options.json, _text(report).encode())
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from what {options.json} holds", file=sys.stderr)
        raise SystemExit(130) from None
    if _COST not in results:
        set_up_torch()
        results[_COST] = givens_cost()
    chosen = [task for task in RECIPES if task in tasks]
    report = {**report, "comparison": comparison(results, chosen)}
    write_atomically(options.json, _text(report).encode())
    from benchmarks.rotation.figure import draw  # workers need no matplotlib

    draw(options.figure, json.loads(_text(report)), chosen)
    print(f"{options.json} and {options.figure} are written")


def _known(names: str, known: list[str], kind: str) -> list[str]:
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise ValueError(f"Unknown {kind} {name!r}. Known: {', '.join(known)}")
    return chosen


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of an earlier start with the same settings."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    if report["settings"] != settings:
        raise ValueError(
            f"{path} holds results of other settings ({report['settings']}, now {settings}): "
            f"name another file, or delete it"
        )
    return dict(report)


def _where(earlier: dict[str, Any]) -> dict[str, Any]:
    """Machine and commit; both commits where an earlier start had another."""
    from benchmarks.provenance import commit, machine  # loads much, and workers import this file

    before, now = earlier.get("commit", ""), commit()
    known = now if before in ("", now) else before if before.endswith(now) else f"{before}, {now}"
    return {"machine": {"platform": platform.platform(), **machine()}, "commit": known}


def _measured(
    jobs: list[Job], options: Options, progress: Progress
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and results of jobs, as they come."""
    if not jobs:
        return
    total, done = sum(job.seconds for job in jobs), 0.0
    arguments = {job: (job.name, options.seeds, options.steps) for job in jobs}
    progress(0, round(total), f"{len(jobs)} to do")
    finished = in_processes(run_job, arguments, options.workers, prepare_worker)
    for count, (job, result) in enumerate(finished, start=1):
        yield job.name, result
        done += job.seconds
        progress(round(done), round(total), f"{count} of {len(jobs)}, {job.name}")


def _text(report: dict[str, Any]) -> str:
    """JSON with one line for each list of numbers; what is not finite is null."""
    indented = json.dumps(six_digits(report), indent=1)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda each: " ".join(each[0].split()), indented) + "\n"


if __name__ == "__main__":
    main()
