"""Orthogonal matrices as products of Givens rotations in fixed, disjoint pairs of dimensions."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.rotary.component import Component, Shape, draw
from models.rotary.pairs import at_least_float32

SCHEDULES = ("round_robin", "butterfly")
_SEVERAL_STD = 0.1  # equal factors would get equal gradients and stay equal


def partners(schedule: str, dim: int) -> Int[Tensor, "round dim"]:
    """Which dimension each dimension is turned with, round by round.

    `round_robin` is complete: every pair of dimensions meets once in dim - 1 rounds (the circle
    method), dim (dim - 1) / 2 angles. `butterfly` pairs dimensions whose indices differ in one
    bit, dim / 2 * log2(dim) angles.

    Raises:
        ValueError: If the dimension does not suit the schedule.
    """
    if schedule == "round_robin":
        if dim % 2:
            raise ValueError(f"round_robin needs an even dimension, got {dim}")
        return torch.tensor([_circle(i, dim) for i in range(dim - 1)])
    if schedule == "butterfly":
        if dim & (dim - 1) or dim < 2:
            raise ValueError(f"butterfly needs a dimension that is a power of 2, got {dim}")
        bits = [1 << b for b in range(dim.bit_length() - 1)]
        return torch.tensor([[i ^ bit for i in range(dim)] for bit in bits])
    raise ValueError(f"givens must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def _circle(turn: int, dim: int) -> list[int]:
    """One round of a tournament: the last seat stays, the others move by one."""
    seats = [(turn + i) % (dim - 1) for i in range(dim - 1)] + [dim - 1]
    partner = [0] * dim
    pairs = [(seats[0], seats[-1])]
    pairs += [(seats[i], seats[dim - 1 - i]) for i in range(1, dim // 2)]
    for i, j in pairs:
        partner[i], partner[j] = j, i
    return partner


def givens_product(
    angles: Float[Tensor, "*batch round pair"], partner: Int[Tensor, "round dim"]
) -> Float[Tensor, "*batch dim dim"]:
    """The product over rounds, to be applied as x @ G to row vectors.

    In each round a pair (i < j) is turned counter-clockwise: x_i' = x_i cos - x_j sin,
    x_j' = x_i sin + x_j cos.
    """
    own = torch.arange(partner.shape[1], device=partner.device)
    first = own < partner
    pair = torch.cumsum(first, dim=1) - 1
    pair = torch.where(first, pair, pair.gather(1, partner))
    angle = at_least_float32(angles).gather(-1, pair.expand(*angles.shape[:-1], len(own)))
    sine = angle.sin() * torch.where(first, 1.0, -1.0).to(angle)
    multiply = product_by_pairs if angle.is_cuda else _Reversible.apply
    product: Tensor = multiply(angle.cos(), sine, partner)
    return product


def product_by_pairs(
    cosine: Float[Tensor, "*batch round dim"],
    sine: Float[Tensor, "*batch round dim"],
    partner: Int[Tensor, "round dim"],
) -> Float[Tensor, "*batch dim dim"]:
    """Multiplies the rounds' matrices two by two: log2(rounds) deep, for a GPU.

    Row i of a round's matrix has `cosine[i]` at i and `sine[i]` (with its sign) at the partner.
    """
    eye = torch.eye(partner.shape[1], dtype=cosine.dtype, device=cosine.device)
    factors = cosine[..., None] * eye + sine[..., None] * eye[partner]
    n = len(partner)
    while n > 1:
        even = n - n % 2
        paired = factors[..., 0:even:2, :, :] @ factors[..., 1:even:2, :, :]
        factors = paired if even == n else torch.cat((paired, factors[..., even:, :, :]), dim=-3)
        n = factors.shape[-3]
    return factors[..., 0, :, :]


class _Reversible(torch.autograd.Function):
    """The same round by round, a few passes over the matrix each, for a CPU.

    Nothing is stored between rounds: going back, each round is undone by its transpose.
    """

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, sine: Tensor, partner: Tensor) -> Tensor:
        dim = partner.shape[1]
        eye = torch.eye(dim, dtype=cosine.dtype, device=cosine.device)
        product = eye.expand(*cosine.shape[:-2], dim, dim)
        for r in reversed(range(len(partner))):
            product = _turned_rows(product, cosine[..., r, :], sine[..., r, :], partner[r])
        ctx.save_for_backward(cosine, sine, partner, product)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        cosine, sine, partner, product = ctx.saved_tensors
        grad = grads[0]
        for_cosine, for_sine = torch.empty_like(cosine), torch.empty_like(sine)
        for r, swap in enumerate(partner):
            c, s = cosine[..., r, :], sine[..., r, :]
            product = _turned_rows(product, c, -s, swap)
            for_cosine[..., r, :] = (grad * product).sum(-1)
            for_sine[..., r, :] = (grad * product.index_select(-2, swap)).sum(-1)
            grad = _turned_rows(grad, c, -s, swap)
        return for_cosine, for_sine, None


def _turned_rows(x: Tensor, cosine: Tensor, sine: Tensor, partner: Tensor) -> Tensor:
    """Rows of x turned with their partners: `cosine * x + sine * x[partner]`."""
    turned = x * cosine[..., None]
    return turned.addcmul_(x.index_select(-2, partner), sine[..., None])


class GivensRotations(Component):
    """Learned angles of one or several Givens products per head.

    Args:
        shape: Sizes.
        schedule: `"round_robin"` or `"butterfly"`.
        n_rotations: Products per head, multiplied in order.
        n_layers: Layers that have angles of their own; 1 shares them.
    """

    angles: Tensor
    partner: Tensor

    def __init__(self, shape: Shape, schedule: str, n_rotations: int, n_layers: int) -> None:
        super().__init__()
        table = partners(schedule, shape.head_dim).to(shape.device)
        self.register_buffer("partner", table, persistent=False)
        self.add(
            "angles",
            shape,
            layer=n_layers,
            head=shape.n_heads,
            rotation=n_rotations,
            round=len(table),
            pair=shape.head_dim // 2,
        )

    def initialise(self, row: int, generator: torch.Generator) -> None:
        """The identity; with several products per head, small random angles."""
        size = self.angles.shape[1:]
        std = _SEVERAL_STD if size[2] > 1 else 0.0
        self.angles[row].copy_(draw(size, generator) * std)

    def forward(
        self, strength: Float[Tensor, " replica"]
    ) -> Float[Tensor, "replica layer head dim dim"]:
        """Matrices to be applied as x @ G; `strength` multiplies every angle."""
        angles = at_least_float32(self.angles)
        angles = angles * strength.to(angles).view(-1, 1, 1, 1, 1, 1)
        n_rotations = angles.shape[3]
        return givens_product(angles.flatten(3, 4), self.partner.repeat(n_rotations, 1))
