"""How one forward pass, and in it one layer, turns queries, keys and values."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.gradient import first_derivative_only
from models.rotary.pairs import as_channels, as_pairs, at_least_float32, rotate_pairs


@dataclass
class RotaryPass:
    """What one forward pass knows of the rotation; layers index it.

    Args:
        turn: Complex `exp(i * angle)`, `[replica, layer, seq, head, pair]`, or `None`.
        gain: Factors of queries and keys, `[replica, layer, seq, 2, head, pair]`, or `None`;
            dimensions of size 1 are shared.
        query_matrix: Applied to the queries' projection, `[replica, layer, head, dim, dim]`.
        key_matrix: Applied to the keys' projection.
        by_distance: Relative biases `[replica, layer, head, distance]`, or `None`.
        bias: Relative biases `[replica, layer, head, query, key]` where the distance alone does
            not tell them.
    """

    turn: Tensor | None
    gain: Tensor | None
    query_matrix: Tensor | None
    key_matrix: Tensor | None
    by_distance: Tensor | None
    bias: Tensor | None


def _layer(tensor: Tensor, layer: int) -> Tensor:
    """One layer of `[replica, layer or 1, ...]`."""
    return tensor[:, min(layer, tensor.shape[1] - 1)]


def layer_heads(tensor: Tensor | None, layer: int, n_heads: int) -> Tensor | None:
    """One layer's first heads of `[replica, layer or 1, head, ...]`, if there is anything."""
    return None if tensor is None else _layer(tensor, layer)[:, :n_heads]


def _heads(tensor: Tensor, n_heads: int, dim: int) -> Tensor:
    """The first heads of a tensor whose head dimension may be 1."""
    return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, 0, n_heads)


def fold(
    weight: Float[Tensor, "replica channel three_heads_dim"],
    rotary: RotaryPass,
    layer: int,
    n_heads: int,
) -> Float[Tensor, "replica channel three_heads_dim"]:
    """The joint projection of queries, keys and values with the static matrices multiplied in."""
    if rotary.query_matrix is rotary.key_matrix:
        places = [(rotary.query_matrix, slice(0, 2))]  # both in one product
    else:
        places = [(rotary.query_matrix, slice(0, 1)), (rotary.key_matrix, slice(1, 2))]
    for matrices, parts in places:
        matrix = layer_heads(matrices, layer, n_heads)
        if matrix is not None:
            weight = _Multiplied.apply(weight, matrix.to(weight.dtype), parts)
    return weight


class _Multiplied(torch.autograd.Function):
    """A joint projection, some of whose parts are multiplied by a matrix of each head.

    What autograd would make of it costs a small model more than the product itself.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, matrix: Tensor, parts: slice) -> Tensor:
        ctx.parts = parts
        heads = matrix.shape[1]
        rows = _rows_of_heads(weight, heads, parts)
        ctx.save_for_backward(rows, matrix)
        return _with_rows(weight, torch.bmm(rows, matrix.flatten(0, 1)), heads, parts)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, matrix = ctx.saved_tensors
        heads = matrix.shape[1]
        grad = _rows_of_heads(grads[0], heads, ctx.parts)
        for_matrix = torch.bmm(rows.transpose(1, 2), grad).view(matrix.shape)
        back = torch.bmm(grad, matrix.flatten(0, 1).transpose(1, 2))
        return _with_rows(grads[0], back, heads, ctx.parts), for_matrix, None


def _rows_of_heads(weight: Tensor, heads: int, parts: slice) -> Tensor:
    """Some of queries, keys and values: `[replica * head, channel * part, dim]`."""
    chosen = weight.unflatten(2, (3, heads, -1))[:, :, parts]
    return chosen.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)


def _with_rows(weight: Tensor, rows: Tensor, heads: int, parts: slice) -> Tensor:
    """A copy of the weight with such rows put in place."""
    copy = weight.clone(memory_format=torch.contiguous_format)
    target = copy.view(*weight.shape[:2], 3, heads, -1)[:, :, parts]
    n, channels, n_parts = target.shape[:3]
    target.copy_(rows.view(n, heads, channels, n_parts, -1).permute(0, 2, 3, 1, 4))
    return copy


class LayerTurn:
    """How one layer of one forward pass turns queries, keys and values.

    Args:
        rotary: The pass.
        layer: Which layer.
        n_heads: Active heads.
        angles: Conditional angles `[replica, batch, seq, head, pair]`, or `None`.
        polar: Whether magnitudes turn instead of pairs of channels.
    """

    def __init__(
        self,
        rotary: RotaryPass,
        layer: int,
        n_heads: int,
        angles: Tensor | None = None,
        polar: bool = False,
    ) -> None:
        self._polar = polar
        turn: Tensor | None = None
        if rotary.turn is not None:
            turn = _heads(_layer(rotary.turn, layer), n_heads, 2)[:, None]
        if angles is not None:
            own = torch.complex(angles.cos(), angles.sin())
            turn = own if turn is None else turn * own
        self.turn = turn  # [replica, batch or 1, seq, head, pair]
        self._gain: Tensor | None = None
        if rotary.gain is not None:
            self._gain = _heads(_layer(rotary.gain, layer), n_heads, 3)[:, None]

    def queries_keys(
        self, qk: Float[Tensor, "replica batch seq two head head_dim"]
    ) -> Float[Tensor, "replica batch seq two head turned_dim"]:
        """Turned queries and keys; with polar magnitudes twice as many channels."""
        if self.turn is None:
            return qk
        factor = self.turn[:, :, :, None]
        if self._gain is not None:
            factor = factor * self._gain
        if self._polar:
            return as_channels(F.softplus(at_least_float32(qk)) * factor).to(qk.dtype)
        return rotate_pairs(qk, factor)

    def values(
        self, v: Float[Tensor, "replica batch seq head head_dim"], *, back: bool = False
    ) -> Float[Tensor, "replica batch seq head head_dim"]:
        """Values turned by their position; with `back`, the output turned back by its own."""
        assert self.turn is not None  # a config with value rotation turns
        turn = self.turn.conj() if back else self.turn
        return as_channels(as_pairs(v) * turn).to(v.dtype)
