"""What a user would write instead: ordinary torch modules, one training run per process."""

import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metactl.worker import set_up_torch

VOCABULARY = 256
_WARM_UP = 20  # steps


class Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, d_model = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, seq, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)

        def rotate(u: Tensor) -> Tensor:
            a, b = u.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(batch, seq, d_model)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    def __init__(self, d_model: int, n_heads: int, n_layers: int, context: int) -> None:
        super().__init__()
        dropout = 0.1
        self.embedding = nn.Embedding(VOCABULARY, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.RMSNorm(d_model)
        self.unembedding = nn.Linear(d_model, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(dropout)
        head_dim = d_model // n_heads
        inv_freq = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(context)[:, None] * inv_freq
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.unembedding(self.norm(x))


def _work(shape: dict[str, int], batch_size: int, seconds: float, device: str, answer: Any) -> None:
    set_up_torch()
    model = Transformer(**shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    data, window = torch.randint(0, VOCABULARY, (100_000,)).to(device), shape["context"] + 1
    offsets = torch.arange(window, device=device)

    def step() -> None:
        starts = torch.randint(0, len(data) - window, (batch_size, 1), device=device)
        tokens = data[starts + offsets]
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    answer.send((rate_of(step, seconds, device), peak_memory(device)))


def rate_of(step: Callable[[], object], seconds: float, device: str) -> float:
    """How often per second a step is done, after some to warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(_WARM_UP):
        step()
    wait()
    start, n_steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        n_steps += 1
    wait()
    return n_steps / (time.perf_counter() - start)


def peak_memory(device: str) -> float:
    """MiB that this process had at its peak, on the device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def together(
    work: Callable[..., None], arguments: tuple[Any, ...], n_processes: int
) -> tuple[float, float]:
    """Sums over processes that work at once: of their rates, and of their peak memory in MiB.

    Args:
        work: Called in each of them with the arguments and a pipe, to which it sends the two.
        arguments: All but the pipe.
        n_processes: How many.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(n_processes)]
    processes = [context.Process(target=work, args=(*arguments, theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    answers = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    return sum(rate for rate, _ in answers), sum(memory for _, memory in answers)


def steps_per_second(
    shape: dict[str, int], batch_size: int, n_processes: int, seconds: float, device: str
) -> tuple[float, float]:
    """Optimizer steps per second of all processes together, and their peak memory in MiB."""
    return together(_work, (shape, batch_size, seconds, device), n_processes)
