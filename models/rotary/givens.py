"""Orthogonal matrices as products of Givens rotations in fixed, disjoint pairs of dimensions."""

import functools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.gradient import first_derivative_only
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
    return multiplied(at_least_float32(angles), partner, *pairs_of(partner))


def multiplied(
    angles: Float[Tensor, "*batch round pair"],
    partner: Int[Tensor, "round dim"],
    pair: Int[Tensor, "round dim"],
    sign: Int[Tensor, "round dim"],
) -> Float[Tensor, "*batch dim dim"]:
    """`givens_product`, given what `pairs_of` says."""
    sign = sign.to(angles)
    if angles.is_cuda:
        return product_by_pairs(*_of_rows(angles, pair, sign), partner)
    product: Tensor = _Reversible.apply(angles, partner, pair, sign)
    return product


def pairs_of(
    partner: Int[Tensor, "round dim"],
) -> tuple[Int[Tensor, "round dim"], Int[Tensor, "round dim"]]:
    """The pair that each dimension is in, and 1 for its first dimension, -1 for its second."""
    first = torch.arange(partner.shape[1], device=partner.device) < partner
    pair = torch.cumsum(first, dim=1) - 1
    return torch.where(first, pair, pair.gather(1, partner)), 2 * first.long() - 1


def _of_rows(angles: Tensor, pair: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every dimension's turn, `[*batch, round, dim]`."""
    angle = angles.gather(-1, pair.expand(*angles.shape[:-2], *pair.shape))
    return angle.cos(), angle.sin().mul(sign)


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

    Nothing is stored between rounds. Going back, each round is undone by its transpose, for the
    product and its gradient in one; an angle's gradient is that of a quarter turn of its pair.
    """

    @staticmethod
    def forward(ctx: Any, angles: Tensor, partner: Tensor, pair: Tensor, sign: Tensor) -> Tensor:
        cosine, sine = (x[..., None] for x in _of_rows(angles, pair, sign))
        product = torch.eye(partner.shape[1], dtype=angles.dtype, device=angles.device)
        product = product.expand(*angles.shape[:-2], *product.shape)
        for r in reversed(range(len(partner))):
            swapped = product.index_select(-2, partner[r])
            product = (product * cosine.select(-3, r)).addcmul_(swapped, sine.select(-3, r))
        ctx.save_for_backward(cosine, sine, partner, pair, sign, product)
        return product

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cosine, sine, partner, pair, sign, product = ctx.saved_tensors
        both = torch.stack((product, grads[0]))
        of_rows = torch.empty_like(cosine[..., 0])
        for r in range(len(partner)):
            swapped = both.index_select(-2, partner[r])
            torch.sum(both[1] * swapped[0], -1, out=of_rows.select(-2, r))
            both.mul_(cosine.select(-3, r)).addcmul_(swapped, sine.select(-3, r), value=-1)
        of_rows.mul_(sign)
        of_pairs = of_rows.new_zeros(*of_rows.shape[:-1], pair.shape[1] // 2)
        of_pairs.scatter_add_(-1, pair.expand_as(of_rows), of_rows)
        return of_pairs, None, None, None


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
    pair: Tensor
    sign: Tensor

    def __init__(self, shape: Shape, schedule: str, n_rotations: int, n_layers: int) -> None:
        super().__init__()
        table = partners(schedule, shape.head_dim)
        tables = (table, *pairs_of(table))
        for name, values in zip(("partner", "pair", "sign"), tables, strict=True):
            self.register_buffer(name, values.to(shape.device), persistent=False)
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
        products = multiplied(angles, self.partner, self.pair, self.sign).unbind(3)
        return functools.reduce(torch.matmul, products)
