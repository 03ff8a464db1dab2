"""Plain rotary position embedding with a base per replica (RoFormer, arXiv 2104.09864)."""

import torch
from jaxtyping import Float
from torch import Tensor

from models.rotary.base import Rotation, register_rotation, rotate_pairs


def inverse_frequencies(
    log_base: Float[Tensor, " replica"], head_dim: int
) -> Float[Tensor, "replica pair"]:
    """inv_freq_i = base^(-2i / head_dim), radians per token."""
    exponents = torch.arange(0, head_dim, 2, device=log_base.device, dtype=log_base.dtype)
    return torch.exp(-log_base[:, None] * exponents / head_dim)


@register_rotation("rope")
class Rope(Rotation):
    """Rotates by `position * base^(-2i / head_dim)`; the base may differ in every replica."""

    rotation: Tensor

    def __init__(self, *, n_replicas: int, head_dim: int, context: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        table = torch.zeros(n_replicas, 1, context, 1, head_dim // 2, 2)
        self.register_buffer("rotation", table, persistent=False)

    def refresh(self, log_base: Float[Tensor, " replica"]) -> None:
        precise = log_base if log_base.dtype == torch.float64 else log_base.float()
        positions = torch.arange(self.rotation.shape[2], device=precise.device, dtype=precise.dtype)
        angles = positions[:, None] * inverse_frequencies(precise, self.head_dim)[:, None, :]
        table = torch.stack((angles.cos(), angles.sin()), dim=-1)[:, None, :, None]
        if self.rotation.dtype != precise.dtype:  # e.g. after model.to(bfloat16)
            self.rotation = table
        else:
            self.rotation.copy_(table)

    def forward(
        self, queries_keys: Float[Tensor, "replica batch seq heads head_dim"]
    ) -> Float[Tensor, "replica batch seq heads head_dim"]:
        seq = queries_keys.shape[2]
        return rotate_pairs(queries_keys, torch.view_as_complex(self.rotation[:, :, :seq]))
