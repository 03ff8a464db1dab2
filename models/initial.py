"""Fresh weights: each replica's from its own seed, whatever the device and its neighbours."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


def draw_weights(
    parameters: Mapping[str, nn.Parameter], n_layers: int, generators: Sequence[torch.Generator]
) -> list[list[Tensor]]:
    """By replica, a value of every parameter, on the CPU.

    Normal with deviation 1/sqrt(fan in), and as in GPT-2 smaller by 1/sqrt(2 n_layers) where a
    projection leads back into the residual stream; the embedding has a deviation of 1, norms are 1.

    Args:
        parameters: By name, `[replica, ...]`.
        n_layers: Blocks.
        generators: One for each replica that is drawn.
    """
    residual = 1 / math.sqrt(2 * n_layers)

    def draw(generator: torch.Generator, name: str, parameter: Tensor) -> Tensor:
        leaf, shape = name.rsplit(".", 1)[-1], parameter.shape[1:]
        if leaf.endswith("norm"):
            return torch.ones(shape, dtype=parameter.dtype)
        std = 1.0 if leaf == "embedding" else 1 / math.sqrt(shape[0])
        std *= residual if leaf in ("attention_out", "ffn_out") else 1.0
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (normal * std).to(parameter.dtype)

    on_gpu = any(parameter.is_cuda for parameter in parameters.values())
    with ThreadPoolExecutor(None if on_gpu else torch.get_num_threads()) as pool:
        return list(pool.map(lambda g: [draw(g, *each) for each in parameters.items()], generators))
