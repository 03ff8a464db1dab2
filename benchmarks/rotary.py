"""What rotations cost, beside the libraries and beside plain RoPE.

    python -m benchmarks.rotary --json FILE [--device cpu|cuda]

Three comparisons, both sides in one run and in turn, medians of the pairs' ratios:

- `libraries`: plain RoPE, forward and backward, against rotary-embedding-torch, x-transformers
  and transformers, on the same queries and keys (each in the layout that it expects).
- `training_step`: a whole training step with each variant against the same with plain RoPE.
- `building`: making all rotations of a model of 12 layers and 12 heads of 64, forward and backward,
  against a training step of that model on 8192 tokens.
"""

import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.provenance import write
from benchmarks.timing import Run, in_turn, medians, ratio
from envs.adamw import ReplicatedAdamW
from models import AdaptiveTransformer, Noise, TransformerConfig, cross_entropy
from models.rotary import LayerTurn, Rotary, RotationConfig, Shape, rotation_names

SHAPES = {
    "population": {"n": 16, "batch": 8, "d_model": 32, "n_heads": 4, "n_layers": 2, "context": 32},
    "model": {"n": 1, "batch": 8, "d_model": 256, "n_heads": 4, "n_layers": 4, "context": 256},
}
SHORT_STEPS = 6  # times as many pairs, where a step takes 50 ms
LARGE = {"d_model": 768, "n_heads": 12, "n_layers": 12, "context": 1024}
LARGE_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    json: Path
    """Where the figures go."""
    device: str = "cpu"
    """Torch device."""
    pairs: int = 9
    """How often both sides of a comparison are measured, in turn; short steps more often."""
    threads: int = 2
    """Threads of torch."""
    large_batch: int = 2
    """Sequences of 1024 tokens in the large step that is timed; scaled to 8192 tokens."""
    variants: tuple[str, ...] = ()
    """Variants to time in a training step; all by default."""


def seconds(run: Run, device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compared(side: Run, other: Run, pairs: int, device: str) -> dict[str, float]:
    """How many times longer `side` takes than `other`, and how long it takes."""
    times = in_turn({"side": side, "other": other}, pairs, device=device)
    each = medians(times)
    return {
        "milliseconds": 1e3 * each["side"],
        "other_milliseconds": 1e3 * each["other"],
        "ratio": ratio(times, "side", "other"),
    }


def backward_of(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], weight: Tensor) -> None:
    torch.autograd.grad(outputs, inputs, [weight.view(out.shape) for out in outputs])


# Against the libraries ---------------------------------------------------------------------------


def library_runs(batch: int, heads: int, seq: int, dim: int, device: str) -> dict[str, Run]:
    """Plain RoPE on queries and keys, forward and backward; tables are built beforehand."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    weight = torch.randn(batch * heads * seq * dim, generator=generator).to(device)
    q, k = leaf(batch, heads, seq, dim), leaf(batch, heads, seq, dim)
    qk = leaf(1, batch, seq, 2, heads, dim)
    shape = Shape(
        n_replicas=1,
        n_layers=1,
        n_heads=heads,
        d_model=heads * dim,
        head_dim=dim,
        context=seq,
        device=device,
    )
    rotary = Rotary(RotationConfig(), shape)
    ones = torch.ones(1, device=device)
    rotary.refresh((10_000.0 * ones).log(), ones)
    both = torch.cat((weight, weight))

    def ours() -> None:
        turn = LayerTurn(rotary.prepare(seq, ones), 0, heads)
        backward_of((turn.queries_keys(qk),), (qk,), both)

    runs: dict[str, Run] = {"ours": ours}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries warn of at import is theirs
        from rotary_embedding_torch import RotaryEmbedding
        from transformers.models.llama import LlamaConfig, modeling_llama
        from x_transformers import x_transformers

    theirs = RotaryEmbedding(dim, cache_max_seq_len=seq).to(device)

    def rotary_embedding_torch() -> None:
        outputs = (theirs.rotate_queries_or_keys(q), theirs.rotate_queries_or_keys(k))
        backward_of(outputs, (q, k), weight)

    x_rotary = x_transformers.RotaryEmbedding(dim).to(device)
    freqs, scale = x_rotary.forward_from_seq_len(seq)
    apply = x_transformers.apply_rotary_pos_emb

    def x_transformers_run() -> None:
        backward_of((apply(q, freqs, scale), apply(k, freqs, scale)), (q, k), weight)

    config = LlamaConfig(hidden_size=heads * dim, num_attention_heads=heads, head_dim=dim)
    llama = modeling_llama.LlamaRotaryEmbedding(config).to(device)
    cos, sin = llama(q, torch.arange(seq, device=device)[None])

    def transformers_run() -> None:
        outputs = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        backward_of(outputs, (q, k), weight)

    return {
        **runs,
        "rotary-embedding-torch": rotary_embedding_torch,
        "x-transformers": x_transformers_run,
        "transformers": transformers_run,
    }


def against_libraries(options: Options) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, size in {"short": (128, 4, 32, 8), "long": (8, 8, 1024, 64)}.items():
        runs = library_runs(*size, options.device)
        ours = runs.pop("ours")
        rows = {
            library: compared(ours, run, options.pairs, options.device)
            for library, run in runs.items()
        }
        sides = dict(zip(("batch", "heads", "seq", "head_dim"), size, strict=True))
        report[name] = {"shape": sides, "ours_to": rows}
    return report


# In a training step ------------------------------------------------------------------------------


def training_step(rotation: str, device: str, n: int, batch: int, **shape: int) -> Run:
    """Forward, backward, clipping and AdamW, with dropout; sliced where there is one replica."""
    config = TransformerConfig(rotation=rotation, **shape)  # type: ignore[arg-type]
    model = AdaptiveTransformer(config, n, device=device)
    model.initialise(list(range(n)), list(range(n)))
    model.set_knobs({"dropout": 0.1})
    optimizer = ReplicatedAdamW(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (n, batch, config.context + 1), generator=generator).to(device)
    zeros = torch.zeros(n, dtype=torch.long, device=device)
    rate = torch.full((n,), 1e-4, device=device)

    def step() -> None:
        loss = cross_entropy(model(tokens[..., :-1], Noise(zeros, zeros)), tokens[..., 1:])
        (loss.sum() + model.penalty().sum()).backward()
        optimizer.step(rate, rate, model.knobs.gates > 0)

    return step


def against_plain_rope(options: Options) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        rows = {}
        plain = training_step("rope", options.device, **shape)
        repeats = SHORT_STEPS if name == "population" else 1
        for variant in options.variants or rotation_names():
            step = training_step(variant, options.device, **shape)
            rows[variant] = compared(step, plain, options.pairs * repeats, options.device)
            print(f"{name:10s} {variant:16s} {rows[variant]['ratio']:.3f} of plain RoPE's step")
        report[name] = {"shape": shape, "variant_to_rope": rows}
    return report


# Building the matrices ---------------------------------------------------------------------------


def large_step(device: str, batch: int) -> Run:
    """A training step of the large model with torch's fused AdamW."""
    model = AdaptiveTransformer(TransformerConfig(**LARGE), device=device)  # type: ignore[arg-type]
    model.initialise([0], [0])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, 256, (1, batch, LARGE["context"] + 1)).to(device)

    def step() -> None:
        cross_entropy(model(tokens[..., :-1]), tokens[..., 1:]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def building(options: Options) -> dict[str, Any]:
    step = large_step(options.device, options.large_batch)
    step()
    timed = statistics.median(seconds(step, options.device) for _ in range(2))
    tokens = options.large_batch * LARGE["context"]
    whole = timed * LARGE_TOKENS / tokens
    report: dict[str, Any] = {
        "shape": LARGE,
        "step_seconds": whole,
        "timed_tokens": tokens,
        "step_tokens": LARGE_TOKENS,
    }
    for rotation in ("givens", "butterfly", "free", "cayley", "exp", "householder", "block"):
        config = TransformerConfig(rotation=rotation, **LARGE)  # type: ignore[arg-type]
        rotary = Rotary(config.rotary, config.rotation_shape(device=options.device))
        rotary.initialise(0, torch.Generator().manual_seed(0))
        ones = torch.ones(1, device=options.device)
        rotary.refresh((10_000.0 * ones).log(), ones)

        def build(rotary: Rotary = rotary, ones: Tensor = ones) -> None:
            matrix = rotary.prepare(1, ones).query_matrix
            assert matrix is not None
            torch.autograd.grad(matrix.square().sum(), list(rotary.parameters()))

        build()
        taken = statistics.median(seconds(build, options.device) for _ in range(3))
        report[rotation] = {"seconds": taken, "share_of_step": taken / whole}
        print(f"building   {rotation:16s} {100 * taken / whole:.2f} % of a step on 8192 tokens")
    return report


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    report: dict[str, Any] = {
        "libraries": against_libraries(options),
        "training_step": against_plain_rope(options),
        "building": building(options),
        "device": options.device,
        "threads": options.threads,
    }
    write(options.json, report, options.device)
    for name, row in report["libraries"].items():
        for library, figures in row["ours_to"].items():
            print(f"{name:6s} ours takes {figures['ratio']:.2f} of the time of {library}")


if __name__ == "__main__":
    main()
