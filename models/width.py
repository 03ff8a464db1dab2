"""Active width in discrete levels: which channels, heads and hidden units take part.

A level keeps a prefix of the residual stream, of the heads and of the hidden units. Each level's
block of channels has a *gate* in [0, 1] that scales whatever is written to it; gates move by a
little per optimizer step, so a block fades in and out, and a block whose gate is 0 is inactive:
nothing reads it, nothing writes it, it gets no gradient.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def level_of_channel(size: int, levels: tuple[float, ...]) -> Int[Tensor, " channel"]:
    """Index of the lowest level at which each of `size` channels is active."""
    bounds = torch.tensor([round(size * level) for level in levels])
    return torch.bucketize(torch.arange(size), bounds, right=True)


def nearest_level(width: Float[Tensor, " replica"], levels: tuple[float, ...]) -> Tensor:
    """Index of the level closest to each requested width."""
    table = torch.tensor(levels, device=width.device, dtype=width.dtype)
    return (width[:, None] - table).abs().argmin(dim=1)


def stepped_gates(
    gates: Float[Tensor, "replica level"], target: Int[Tensor, " replica"], rate: float
) -> Float[Tensor, "replica level"]:
    """Gates moved by at most `rate` towards 1 up to the target level and 0 above it."""
    index = torch.arange(gates.shape[1], device=gates.device)
    wanted = (index <= target[:, None]).to(gates.dtype)
    distance = wanted - gates
    rounding = torch.finfo(gates.dtype).eps / rate  # adds up over 1 / rate steps
    arrives = distance.abs() <= rate + rounding  # n steps of 1/n must end exactly
    return torch.where(arrives, wanted, gates + distance.clamp(-rate, rate))


def active_along(active: Tensor, axis: int) -> Bool[Tensor, " index"]:
    """Where along an axis there is something active; what is active is the product over axes."""
    others = [other for other in range(active.dim()) if other != axis]
    return active.any(dim=others) if others else active
