"""One big run: our transformer and optimizer beside ordinary torch modules and fused AdamW.

    python -m benchmarks.single --json FILE [--device cuda]

A whole training step (forward, backward, clipping, AdamW) of the same mathematics, eager and by
`torch.compile`, in turn; medians, and ratios within each round. Then the knobs move under
`torch.compile`, and its recompilations are counted.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.plain import VOCABULARY, Transformer
from benchmarks.provenance import write
from benchmarks.timing import in_turn, medians, ratio
from envs.adamw import ReplicatedAdamW
from models import AdaptiveTransformer, Noise, TransformerConfig, cross_entropy

MOVES = {
    "rope_base": (500.0, 3_000.0, 20_000.0, 100_000.0),
    "dropout": (0.05, 0.2, 0.3, 0.4),
    "attention_span": (0.1, 0.2, 0.4, 0.6),  # of the context
    "embedding_width": (0.25, 0.5, 0.75, 1.0),
}

_WARM_UP = 2  # steps; the first compiles


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    json: Path
    """Where the figures go."""
    rounds: int = 5
    """How often all sides are measured, in turn."""
    steps: int = 1
    """Optimizer steps of a side in each round."""
    d_model: int = 512
    n_heads: int = 8
    n_layers: int = 8
    context: int = 512
    batch_size: int = 2
    compiled: bool = True
    """Also by torch.compile."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the runs train."""


def plain(options: Options, tokens: Tensor, *, compiled: bool) -> Callable[[], None]:
    shape = (options.d_model, options.n_heads, options.n_layers, options.context)
    model = Transformer(*shape).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step() -> None:
        loss_of(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def adaptive(options: Options, *, capturable: bool = False) -> AdaptiveTransformer:
    """Ours with the default knobs; capturable: the same program whatever the knobs are."""
    config = TransformerConfig(
        d_model=options.d_model,
        n_heads=options.n_heads,
        n_layers=options.n_layers,
        context=options.context,
    )
    model = AdaptiveTransformer(config, device=options.device, capturable=capturable)
    model.initialise([0], [0])
    model.set_knobs({"dropout": 0.1})
    model.reserve_noise(options.batch_size * options.context)  # before it is compiled, so as whole
    return model


def ours(
    options: Options, model: AdaptiveTransformer, tokens: Tensor, *, compiled: bool
) -> Callable[[], None]:
    optimizer = ReplicatedAdamW(model, fuse=compiled)
    steps = torch.zeros(1, dtype=torch.long, device=options.device)
    rate = torch.full((1,), 1e-4, device=options.device)

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(tokens[None, :, :-1], Noise(steps, steps))
        return cross_entropy(logits, tokens[None, :, 1:])

    compute = torch.compile(loss_of) if compiled else loss_of

    def step() -> None:
        compute(tokens).sum().backward()
        optimizer.step(rate, rate, model.knobs.gates > 0)

    return step


def recompilations(
    options: Options, tokens: Tensor, *, capturable: bool
) -> dict[str, dict[str, int]]:
    """How often torch.compile starts anew, and the number of moves, for each knob."""
    torch._dynamo.reset()
    model = adaptive(options, capturable=capturable)
    step = ours(options, model, tokens, compiled=True)
    for _ in range(_WARM_UP):
        step()
    counted = {}
    for name, values in MOVES.items():
        before = counters["stats"]["unique_graphs"]
        for value in values:
            scale = options.context if name == "attention_span" else 1.0
            model.set_knobs({name: value * scale})
            model.knobs.settle_gates([0])
            step()
        counted[name] = {
            "moves": len(values),
            "graphs": counters["stats"]["unique_graphs"] - before,
        }
    return counted


def main() -> None:
    options = tyro.cli(Options)
    tokens = torch.randint(VOCABULARY, (options.batch_size, options.context + 1))
    tokens = tokens.to(options.device)
    sides = {"plain": plain(options, tokens, compiled=False)}
    sides["ours"] = ours(options, adaptive(options), tokens, compiled=False)
    if options.compiled:
        sides["plain compiled"] = plain(options, tokens, compiled=True)
        sides["ours compiled"] = ours(options, adaptive(options), tokens, compiled=True)
    times = in_turn(
        sides, options.rounds, repeats=options.steps, warm_up=_WARM_UP, device=options.device
    )
    report: dict[str, Any] = {
        "shape": {
            name: getattr(options, name)
            for name in ("d_model", "n_heads", "n_layers", "context", "batch_size")
        },
        "seconds_per_step": medians(times),
        "ours / plain": ratio(times, "ours", "plain"),
    }
    if options.compiled:
        report["ours compiled / plain compiled"] = ratio(times, "ours compiled", "plain compiled")
        report["recompilations"] = {
            "sliced": recompilations(options, tokens, capturable=False),
            "capturable": recompilations(options, tokens, capturable=True),
        }
    print(json.dumps(report, indent=2))
    write(options.json, report, options.device)


if __name__ == "__main__":
    main()
