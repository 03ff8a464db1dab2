"""Fresh weights: each replica's from its own seed, whatever the device and its neighbours."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from models.device import brought


def draw_weights(
    parameters: Mapping[str, nn.Parameter], n_layers: int, generators: Sequence[torch.Generator]
) -> dict[str, Tensor]:
    """Fresh values by name, `[n_drawn, ...]`, where the parameters live.

    Normal with deviation 1/sqrt(fan in), and as in GPT-2 smaller by 1/sqrt(2 n_layers) where a
    projection leads back into the residual stream; the embedding has a deviation of 1, norms are 1.

    Args:
        parameters: By name, `[replica, ...]`.
        n_layers: Blocks.
        generators: One for each replica that is drawn. On the CPU, so that a seed means the same
            weights on every device.
    """
    drawn = {name: p[0] for name, p in parameters.items() if not _is_norm(name)}
    stds = [_std(name, p.shape, n_layers) for name, p in drawn.items()]
    sizes = [p.numel() for p in drawn.values()]
    scale = torch.tensor(stds, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    like = next(iter(parameters.values()))
    flat = torch.empty(len(generators), len(scale), dtype=like.dtype)

    def draw(row: int) -> None:
        normal = torch.randn(len(scale), generator=generators[row], dtype=torch.float64)
        flat[row] = normal.mul_(scale)

    with ThreadPoolExecutor(None if like.is_cuda else torch.get_num_threads()) as pool:
        list(pool.map(draw, range(len(generators))))
    parts = iter(brought(flat, like.device).split(sizes, dim=1))
    return {
        name: torch.ones_like(p[: len(generators)])
        if _is_norm(name)
        else next(parts).unflatten(1, p.shape[1:])
        for name, p in parameters.items()
    }


def _is_norm(name: str) -> bool:
    return name.endswith("norm")


def _std(name: str, shape: torch.Size, n_layers: int) -> float:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "embedding":
        return 1.0
    residual = 1 / math.sqrt(2 * n_layers) if leaf in ("attention_out", "ffn_out") else 1.0
    return residual / math.sqrt(shape[0])
