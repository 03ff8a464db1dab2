"""Applying a policy to new training runs, with paired twins to compare with."""

import json
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from metactl.board import Board
from metactl.env import Step
from metactl.evaluation import planned_runs, policy_arm, static_arm, summarise
from metactl.files import write_atomically
from metactl.homeostasis import Balance
from metactl.log import TAGS
from metactl.policy import Policy
from metactl.progress import Progress
from metactl.rollout import PlayedRun, play
from metactl.run import TrainingRun
from metactl.shards import make_population


@dataclass(frozen=True, kw_only=True)
class Application:
    """What applying a policy gave.

    Args:
        results: By arm (`"policy"`, and `"default"` with twins): one result per run.
        summary: Means and, with twins, paired differences.
        unsaved: In words, why there are no models; empty where they were saved.
        sample: Text that the first trained model wrote, if asked for.
    """

    results: dict[str, list[PlayedRun]]
    summary: dict[str, Any]
    unsaved: str = ""
    sample: str = ""


def apply_policy(
    policy: Policy,
    env_id: str,
    options: dict[str, Any],
    run_dir: Path,
    *,
    n_runs: int,
    seed: int,
    compare: bool,
    sample_bytes: int = 0,
    progress: Progress | None = None,
) -> Application:
    """Trains new models under a policy and saves them as `run_dir/model-I`.

    Args:
        policy: Who moves the knobs, guarded.
        env_id: The environment.
        options: Its keyword arguments.
        run_dir: Holds `tb/` (and in it `default/`, the twins), the models and their losses.
        n_runs: New training runs.
        seed: Determines data, weights, batches and noise.
        compare: Also train paired twins at default knobs.
        sample_bytes: How much the first trained model shall write.
        progress: Told about every control step.
    """
    env = make_population(env_id, n_runs * (2 if compare else 1), options)
    loop = env.loop
    default = loop.knobs.default_positions(1)[0]
    twins_too = [static_arm("default", default)] if compare else []
    planned = planned_runs([policy_arm(policy, default), *twins_too], n_runs, seed)
    total = loop.config.n_control_steps
    begin = np.repeat(default[None], n_runs, axis=0)
    balance = Balance(policy.card.set_points, loop.codec, begin)
    ours, twins = slice(n_runs), slice(n_runs, None)
    with ExitStack() as stack:
        stack.enter_context(closing(env))
        board = stack.enter_context(Board(run_dir / "tb"))
        other = stack.enter_context(Board(run_dir / "tb" / "default")) if compare else None

        def on_step(index: int, step: Step) -> None:
            n_steps = (index + 1) * loop.optimizer_steps
            board.scalars(_scalars(step, ours) | balance.read(step.observation[ours]), n_steps)
            if other is not None:
                other.scalars(_scalars(step, twins), n_steps)
            if progress is not None:
                progress(index + 1, total, _status(step, n_runs))

        results = play(loop, planned, on_step)
        unsaved = _save_models(loop.run, run_dir, n_runs)
        sample = _written(loop.run, results[0], sample_bytes) if sample_bytes else ""
    by_arm: dict[str, list[PlayedRun]] = {}
    for result in results:
        by_arm.setdefault(result.arm, []).append(result)
    return Application(results=by_arm, summary=summarise(by_arm), unsaved=unsaved, sample=sample)


def _scalars(step: Step, rows: slice) -> dict[str, float]:
    """Means over some of the runs."""
    arrays = step.measurement.arrays()
    measured = {tag: arrays[field] for field, tag in TAGS.items()}
    inside = {f"internal/{name}": value for name, value in step.measurement.internal.items()}
    knobs = {f"knob/{name}": value for name, value in step.values.items()}
    return {
        name: float(value[rows].mean())
        for name, value in {**measured, **inside, **knobs}.items()
        if value is not None
    }


def _status(step: Step, n_runs: int) -> str:
    knobs = " ".join(f"{name} {v[:n_runs].mean():.3g}" for name, v in step.values.items())
    return f"loss {step.measurement.train_loss[:n_runs].mean():.3f} {knobs}"


def _written(run: TrainingRun, result: PlayedRun, n_bytes: int) -> str:
    """What the first model writes, or in words why it does not; nothing a terminal obeys."""
    if result.diverged:
        return "(nothing: its run diverged)"
    try:
        text = run.sample(0, n_bytes)
    except TypeError as error:
        return f"(nothing: {error})"
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _save_models(run: TrainingRun, run_dir: Path, n_runs: int) -> str:
    """Saves what the runs trained; in words, why not, where they have no models to give."""
    for row in range(n_runs):
        try:
            model = run.export(row)
        except TypeError as error:
            return str(error)
        if not isinstance(model, torch.nn.Module):
            return f"{type(run).__name__}.export gives no torch module, but {type(model).__name__}"
        _save_model(model, run_dir / f"model-{row}")
    return ""


def _save_model(model: torch.nn.Module, folder: Path) -> None:
    """Weights as safetensors, the shape as JSON where the model knows it."""
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: what is tied in the model shares its memory, which the format does not know.
    state = model.state_dict().items()
    tensors = {name: t.detach().clone() for name, t in state if isinstance(t, torch.Tensor)}
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    write_atomically(folder / "model.safetensors", save(tensors))
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        text = json.dumps(config.to_dict(), indent=2) + "\n"  # type: ignore[union-attr]
        write_atomically(folder / "config.json", text.encode())
