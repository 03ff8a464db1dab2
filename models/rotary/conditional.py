"""Angles that depend on the tokens in between: content-dependent relative position."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from models.rotary.component import Component, Shape, draw
from models.rotary.pairs import at_least_float32

_UNITS = 16
_OUTPUT_STD = 0.1


class ConditionalAngles(Component):
    """phi_m = sum of f(x_t) over 0 < t <= m, f a small network of the token's features.

    A query at m and a key at n then differ by the sum of f over n < t <= m: relative, causal,
    and one running sum along the sequence (with f constant it is plain RoPE).

    Args:
        shape: Sizes.
        n_pairs: Pairs of channels that are turned in each head.
        n_layers: Layers that have a network of their own; 1 shares it.
    """

    inward: Tensor
    outward: Tensor

    def __init__(self, shape: Shape, n_pairs: int, n_layers: int) -> None:
        super().__init__()
        self.add("inward", shape, layer=n_layers, channel=shape.d_model, unit=_UNITS)
        self.add("outward", shape, layer=n_layers, head=shape.n_heads, unit=_UNITS, pair=n_pairs)

    def initialise(self, row: int, generator: torch.Generator) -> None:
        inward, outward = self.inward[row], self.outward[row]
        inward.copy_(draw(inward.shape, generator) / math.sqrt(inward.shape[1]))
        outward.copy_(draw(outward.shape, generator) * (_OUTPUT_STD / math.sqrt(_UNITS)))

    def increments(
        self, x: Float[Tensor, "replica token d_model"], layer: int, n_heads: int
    ) -> Float[Tensor, "replica token head pair"]:
        """f(x_t) of every token, in radians, for the first `n_heads` heads."""
        layer = min(layer, self.inward.shape[1] - 1)
        units = torch.bmm(x, self.inward[:, layer, : x.shape[2]]).tanh()
        weight = self.outward[:, layer, :n_heads].transpose(1, 2).flatten(2)
        return torch.bmm(units, weight).unflatten(2, (n_heads, -1))


def accumulated(
    increments: Float[Tensor, "replica batch seq head pair"], before: Tensor | None = None
) -> Float[Tensor, "replica batch seq head pair"]:
    """Running sums along the sequence; position 0 has angle 0.

    Args:
        increments: Per token.
        before: The running sum at the token before these, if they continue a sequence.
    """
    steps = at_least_float32(increments)
    if before is None:
        steps = torch.cat((torch.zeros_like(steps[:, :, :1]), steps[:, :, 1:]), dim=2)
        return steps.cumsum(dim=2)
    return steps.cumsum(dim=2) + before[:, :, None]
