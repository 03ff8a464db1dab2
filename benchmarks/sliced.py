"""What a smaller width and a shorter span save of a training step.

    python -m benchmarks.sliced --json FILE

- `width`: a step (forward, backward, clipping, AdamW) at each width, in steps at full width.
- `span`: attention alone, forward and backward, at a span of 256 in a context of 2048, beside
  causal fused attention over all of it and beside dense masked attention.
- `context`: time and memory of the banded attention as the context grows at a fixed span.
- `model`: time = a FLOPs + b bytes + a constant c, fitted to all steps but the one it predicts.

Sides take turns; medians, and ratios within each round.
"""

import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy.optimize import nnls
from torch import Tensor

from benchmarks.provenance import write
from benchmarks.timing import Run, in_turn, medians, ratio
from envs.adamw import ReplicatedAdamW
from models import AdaptiveTransformer, Noise, TransformerConfig, cross_entropy, training_flops
from models.attention import (
    SharedSpan,
    banded_attention,
    causal_distance,
    masked_attention,
    span_log_weight,
)

SHAPE = {"d_model": 256, "n_heads": 8, "n_layers": 4, "context": 256}
WIDTHS = (0.25, 0.5, 0.75, 1.0)
SPANS = (32, 64, 128, 256)
BATCH = 4
HEADS, HEAD_DIM, RAMP = 4, 32, 32.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    json: Path
    """Where the figures go."""
    rounds: int = 5
    """How often all sides are measured, in turn."""
    threads: int = 2
    """Threads of torch."""


def training_step(width: float, span: float) -> Run:
    """A whole training step of one model at a width and span."""
    model = AdaptiveTransformer(TransformerConfig(**SHAPE))  # type: ignore[arg-type]
    model.initialise([0], [0])
    model.set_knobs({"embedding_width": width, "attention_span": span, "dropout": 0.1})
    model.knobs.settle_gates([0])
    optimizer = ReplicatedAdamW(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (1, BATCH, SHAPE["context"] + 1), generator=generator)
    zero, rate = torch.zeros(1, dtype=torch.long), torch.full((1,), 1e-4)

    def step() -> None:
        loss = cross_entropy(model(tokens[..., :-1], Noise(zero, zero)), tokens[..., 1:])
        loss.sum().backward()
        optimizer.step(rate, rate, model.knobs.gates > 0)

    return step


def features(width: float, span: float) -> list[float]:
    """FLOPs of a step; bytes that its elementwise passes touch, about; 1."""
    config = TransformerConfig(**SHAPE)  # type: ignore[arg-type]
    seq, d = SHAPE["context"], SHAPE["d_model"] * width
    heads, layers = SHAPE["n_heads"] * width, SHAPE["n_layers"]
    reach = min(seq, 1.25 * (span + config.ramp))
    activations = BATCH * seq * (layers * (30 * d + 8 * 4 * d + 4 * heads * reach) + 8 * 256)
    all_of_them = 12 * layers * SHAPE["d_model"] ** 2  # their gradients are, and are collected
    active = 12 * layers * d**2  # the optimizer passes over these
    flops = float(training_flops(config, width=width, span=span, batch=BATCH, seq=seq))
    return [flops, 4.0 * (activations + 4 * all_of_them + 8 * active), 1.0]


def fitted(seconds: dict[tuple[float, float], float]) -> dict[str, Any]:
    """A fit to all steps; and each left out in turn, and predicted from a fit to the others."""
    keys = list(seconds)
    x, y = np.array([features(*key) for key in keys]), np.array([seconds[key] for key in keys])
    scale = x.max(axis=0)
    errors: dict[str, float] = {}
    ratio_errors: dict[str, float] = {}
    full = keys.index((1.0, float(SHAPE["context"])))
    for i, (width, span) in enumerate(keys):
        rest = np.arange(len(keys)) != i
        relative = (x[rest] / scale) / y[rest, None]  # all steps weigh alike
        coefficients, _ = nnls(relative, np.ones(rest.sum()))
        predicted = x / scale @ coefficients
        name = f"width {width:g}, span {span:g}"
        errors[name] = float(predicted[i] / y[i] - 1)
        ratio_errors[name] = float(predicted[i] / predicted[full] / (y[i] / y[full]) - 1)
    coefficients, _ = nnls((x / scale) / y[:, None], np.ones(len(y)))
    residuals = x / scale @ coefficients / y - 1
    names = ("seconds_per_flop", "seconds_per_byte", "seconds_per_step")
    return {
        **dict(zip(names, (coefficients / scale).tolist(), strict=True)),
        "relative_error": dict(zip(errors, residuals.tolist(), strict=True)),
        "relative_error_left_out": errors,
        "ratio_error_left_out": ratio_errors,  # of a step to that at full width and span
        "largest_relative_error": max(abs(error) for error in errors.values()),
    }


def steps(rounds: int) -> dict[str, Any]:
    full = float(SHAPE["context"])
    sides = {(width, full): training_step(width, full) for width in WIDTHS}
    sides |= {(width, float(s)): training_step(width, s) for width in (0.5, 1.0) for s in SPANS[:2]}
    times = in_turn(sides, rounds)
    seconds = medians(times)
    return {
        "shape": {**SHAPE, "batch": BATCH},
        "seconds": {f"width {w:g}, span {s:g}": t for (w, s), t in seconds.items()},
        "width_to_full": {f"{w:g}": ratio(times, (w, full), (1.0, full)) for w in WIDTHS},
        "flops_to_full": {f"{w:g}": features(w, full)[0] / features(1.0, full)[0] for w in WIDTHS},
        "model": fitted(seconds),
    }


def attention_run(kind: str, seq: int, span: int) -> Run:
    """Attention forward and backward, of one kind."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, HEADS, seq, HEAD_DIM, generator=generator).requires_grad_()
        for _ in range(3)
    )
    distance = causal_distance(seq, device=q.device, dtype=torch.float32)

    def out() -> Tensor:
        if kind == "dense masked":
            bias = span_log_weight(distance, torch.tensor([float(span)]), RAMP)
            return masked_attention(q, k, v, bias[:, None])
        shared = SharedSpan.of(float(seq if kind == "causal fused" else span), RAMP)
        return banded_attention(q, k, v, shared, RAMP)

    def run() -> None:
        torch.autograd.grad(out().sum(), (q, k, v))

    return run


def spans(rounds: int) -> dict[str, Any]:
    kinds = ("banded", "causal fused", "dense masked")
    times = in_turn({kind: attention_run(kind, 2048, 256) for kind in kinds}, rounds)
    return {
        "context": 2048,
        "span": 256,
        "seconds": medians(times),
        "banded_to_causal_fused": ratio(times, "banded", "causal fused"),
        "banded_to_dense_masked": ratio(times, "banded", "dense masked"),
    }


def contexts(rounds: int) -> dict[str, Any]:
    lengths = (1024, 2048, 4096, 8192)
    times = in_turn({seq: attention_run("banded", seq, 256) for seq in lengths}, rounds)
    seconds = medians(times)
    return {
        "span": 256,
        "seconds": {str(seq): value for seq, value in seconds.items()},
        "seconds_per_1024_tokens": {str(seq): value * 1024 / seq for seq, value in seconds.items()},
        "peak_bytes": {str(seq): _peak_bytes(seq) for seq in lengths},
    }


def _peak_bytes(seq: int) -> int:
    """Largest sum of tensors alive at once, by torch's own count of its allocations."""
    run = attention_run("banded", seq, 256)
    run()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    report = {
        "steps": steps(options.rounds),
        "attention": spans(options.rounds),
        "contexts": contexts(options.rounds),
        "threads": options.threads,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    write(options.json, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
