"""What a controller costs a training run: the same run alone, controlled, and with a probe.

    python -m benchmarks.overhead --json FILE

Three runs of one transformer from the same weights, under the policy that ships, take turns, one
control step each, in random order; medians over the rounds of two figures. `ratio`: the whole
run's time to that of the run alone, which says what a user sees, to within the machine's noise.
`share`: only optimizer step, hooks and controller are timed, and what they take more than the
optimizer step of the run alone, in units of its whole time; that leaves out the noise of the
model's own passes. Knobs move and TensorBoard is written to.
"""

import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

from benchmarks.plain import VOCABULARY, Transformer
from benchmarks.provenance import write
from metactl import Controller
from metactl.controllers import Learned
from metactl.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    json: Path
    """Where the figures go."""
    rounds: int = 15
    """Control steps of each run."""
    steps_per_decision: int = 10
    """Optimizer steps of a control step: 400 for a run of 40 decisions."""
    batch_size: int = 8
    d_model: int = 128
    n_layers: int = 4
    context: int = 128


def training_run(
    options: Options, policy: Policy, side: str, board: SummaryWriter
) -> Callable[[], float]:
    """A run that takes one optimizer step when called; seconds of the part that is controlled."""
    torch.manual_seed(0)
    model = Transformer(options.d_model, 4, options.n_layers, options.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    batches = torch.randint(VOCABULARY, (16, options.batch_size, options.context + 1))
    taken = 0

    def loss_on(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    controller = Controller(Learned(policy), n_control_steps=options.rounds + 2, strict=True)
    controller.attach(
        model,
        optimizer,
        total_steps=(options.rounds + 2) * options.steps_per_decision,
        probe=(lambda: loss_on(batches[-1])) if side == "probe" else None,
        mode="off" if side == "plain" else "act",
        knobs=["dropout", "learning_rate_multiplier", "weight_decay"],
        example=batches[0, :1, :-1],
        log=board,
    )

    def step() -> float:
        nonlocal taken
        optimizer.zero_grad()
        loss = loss_on(batches[taken % 15])
        loss.backward()
        begin = time.perf_counter()
        optimizer.step()
        controller.step(loss)
        taken += 1
        return time.perf_counter() - begin

    return step


def main(options: Options) -> None:
    sides, policy = ["plain", "control", "probe"], Policy.load("default")
    order = random.Random(0)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    controlled: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as boards:
        runs = {}
        for side in sides:
            board = boards.enter_context(SummaryWriter(f"{folder}/{side}"))
            runs[side] = training_run(options, policy, side, board)
        for round_index in range(options.rounds + 1):
            for side in order.sample(sides, len(sides)):
                begin = time.perf_counter()
                part = sum(runs[side]() for _ in range(options.steps_per_decision))
                if round_index:  # the first warms up
                    seconds[side].append(time.perf_counter() - begin)
                    controlled[side].append(part)
    ratios = {
        side: [a / b for a, b in zip(seconds[side], seconds["plain"], strict=True)]
        for side in sides[1:]
    }
    whole = statistics.median(seconds["plain"])
    shares = {
        side: [(a - b) / whole for a, b in zip(controlled[side], controlled["plain"], strict=True)]
        for side in sides[1:]
    }
    report = {
        "median_ratio": {side: statistics.median(ratio) for side, ratio in ratios.items()},
        "median_share": {side: statistics.median(share) for side, share in shares.items()},
        "shares": shares,
        "ratios": ratios,
        "seconds": seconds,
        "options": {**asdict(options), "json": str(options.json)},
        "threads": torch.get_num_threads(),
    }
    write(options.json, report)
    print(json.dumps({name: report[name] for name in ("median_ratio", "median_share")}))


if __name__ == "__main__":
    main(tyro.cli(Options))
