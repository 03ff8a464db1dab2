"""Turning pairs of channels, the one sign convention of the project.

Position m turns the pair (x0, x1) counter-clockwise by its angle: (x0 + i x1) * exp(i * angle).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where products of matrices keep the type of their factors, whatever is around."""
    available = torch.amp.is_autocast_available(device.type)
    if available and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def as_pairs(x: Float[Tensor, "*batch channel"]) -> Complex[Tensor, "*batch pair"]:
    """Neighbouring channels (0, 1), (2, 3), ... as complex numbers, in float32 at least."""
    return torch.view_as_complex(at_least_float32(x).unflatten(-1, (-1, 2)))


def as_channels(pairs: Complex[Tensor, "*batch pair"]) -> Float[Tensor, "*batch channel"]:
    return torch.view_as_real(pairs).flatten(-2)


def rotate_pairs(
    x: Float[Tensor, "*batch head_dim"], rotation: Tensor
) -> Float[Tensor, "*batch head_dim"]:
    """Rotates neighbouring channels by complex numbers.

    One complex product is a single pass forward and a single pass backward, several times
    faster on a CPU than the usual products of halves with cosines and sines.

    Args:
        x: Real channels; computed in float32 at least, returned in their own dtype.
        rotation: Complex `exp(i * angle)`, broadcastable to `x.shape[:-1] + (head_dim / 2,)`.
    """
    if torch.compiler.is_compiling():  # which fuses real products, but no complex ones
        a, b = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = torch.view_as_real(rotation).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    return as_channels(as_pairs(x) * rotation).to(x.dtype)
