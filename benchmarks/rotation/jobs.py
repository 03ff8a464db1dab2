"""The measurements as independent jobs that worker processes can take."""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from benchmarks.rotation.data import chance, task_data
from benchmarks.rotation.depth import DEPTHS, ROTATIONS, gradient_ratios
from benchmarks.rotation.geometry import geometry
from benchmarks.rotation.recipes import LONGER_ARMS, RECIPES, SCALINGS, USUAL
from benchmarks.rotation.training import Trainer, build, evaluate, train
from metactl.worker import set_up_torch
from models import AdaptiveTransformer

_GEOMETRY_SEQUENCES = 48


@dataclass(frozen=True)
class Job:
    """One measurement; its name is its key in the report.

    Args:
        name: `task/arm` or `depth/rotation/layers`.
        seconds: What it takes, roughly.
    """

    name: str
    seconds: float


def all_jobs(tasks: list[str], variants: list[str], steps: int | None) -> list[Job]:
    """Trainings and depths; plain RoPE is there whatever the variants."""
    extra = [USUAL, *LONGER_ARMS]
    jobs = []
    for task in tasks:
        recipe = RECIPES[task]
        share = 1.0 if steps is None else steps / recipe.steps
        for arm in ["rope", *extra, *(name for name in variants if name != "rope")]:
            seconds = recipe.seconds * share * LONGER_ARMS.get(arm, 1.0)
            jobs.append(Job(f"{task}/{arm}", 2 + 1.2 * seconds))
    for n_layers in reversed(DEPTHS):
        jobs += [Job(f"depth/{rotation}/{n_layers}", n_layers) for rotation in ROTATIONS]
    return jobs


def prepare_worker() -> None:
    """For a process of its own, which its parent alone stops, or the parent's end."""
    set_up_torch()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_job(name: str, n_seeds: int, steps: int | None) -> dict[str, Any]:
    """The figures of a job."""
    first, rest = name.split("/", 1)
    if first == "depth":
        rotation, n_layers = rest.split("/")
        return gradient_ratios(rotation, int(n_layers), n_seeds, steps or 10**9)
    return train_arm(first, rest, n_seeds, steps)


def train_arm(task: str, arm: str, n_seeds: int, steps: int | None) -> dict[str, Any]:
    """Trains an arm beside plain RoPE and looks at what came out, per seed."""
    recipe = RECIPES[task]
    n_steps = max(1, round((steps or recipe.steps) * LONGER_ARMS.get(arm, 1.0)))
    data = task_data(task, recipe, n_seeds, n_steps)
    trainer = Trainer(recipe, arm, data, n_steps)
    times = train(trainer, Trainer(recipe, "rope", data, n_steps))
    model = trainer.model
    report: dict[str, Any] = {
        "steps": n_steps,
        "parameters": model.count_parameters(),
        **times.report(),
        "tests": evaluated(model, data.tests),
        "geometry": geometry(model, data.tests["test"][0][:, :_GEOMETRY_SEQUENCES, :-1]),
    }
    if arm == "rope":
        report["chance"] = chance(data, recipe.vocab_size)
        if recipe.longest > 1:
            report["scaled_at_test"] = {
                scaling: evaluated(_scaled(model, task, scaling), data.tests)
                for scaling in SCALINGS
            }
    return report


def evaluated(model: AdaptiveTransformer, tests: dict[str, Any]) -> dict[str, Any]:
    """Loss and accuracy per seed on every test set."""
    report = {}
    for name, test in tests.items():
        losses, accuracies = evaluate(model, test)
        report[name] = {"loss": losses, "accuracy": accuracies}
    return report


def _scaled(model: AdaptiveTransformer, task: str, scaling: str) -> AdaptiveTransformer:
    """The trained weights of plain RoPE under a scaling they were not trained with."""
    scaled = build(RECIPES[task], scaling, model.n_replicas)
    scaled.load_state_dict(model.state_dict())
    return scaled
