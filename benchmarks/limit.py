"""The limit of a shape: the batched matrix products of one optimizer step, and nothing else."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import peak_memory, rate_of, together
from envs.graph import Graph

Product = tuple[int, int, int, int]  # batch, rows, inner, columns


def products(
    n: int, batch_size: int, d_model: int, n_heads: int, n_layers: int, context: int
) -> list[Product]:
    """Forward products of a step of `n` replicas; backward does each twice, transposed."""
    tokens, hidden, vocabulary = batch_size * context, 4 * d_model, 256
    head_dim = d_model // n_heads
    pairs = n * batch_size * n_heads
    layer = [
        (n, tokens, d_model, 3 * d_model),
        (pairs, context, head_dim, context),
        (pairs, context, context, head_dim),
        (n, tokens, d_model, d_model),
        (n, tokens, d_model, hidden),
        (n, tokens, hidden, d_model),
    ]
    return [*layer * n_layers, (n, tokens, d_model, vocabulary)]


def _work(shapes: list[Product], seconds: float, device: str, answer: Any) -> None:
    torch.set_num_threads(1)
    operands = []
    for batch, rows, inner, columns in shapes:
        x = torch.randn(batch, rows, inner, device=device)
        w = torch.randn(batch, inner, columns, device=device)
        operands.append((x, w, torch.randn(batch, rows, columns, device=device)))

    def step() -> tuple[Tensor, ...]:
        for x, w, grad in operands:
            torch.bmm(x, w)
            torch.bmm(grad, w.transpose(1, 2))
            torch.bmm(x.transpose(1, 2), grad)
        return ()

    replay = Graph(step, [operands[0][0]]) if device == "cuda" else step
    answer.send((rate_of(replay, seconds, device), peak_memory(device)))


def steps_per_second(
    shape: dict[str, int],
    batch_size: int,
    n_envs: int,
    n_processes: int,
    seconds: float,
    device: str,
) -> tuple[float, float]:
    """Replica steps per second of all processes together, and their peak memory in MiB."""
    shapes = products(n_envs, batch_size, **shape)
    rate, memory = together(_work, (shapes, seconds, device), n_processes)
    return n_envs * rate, memory
