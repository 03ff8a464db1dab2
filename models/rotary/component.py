"""What the parts of a rotation share: replicated parameters that say along which axes they lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that a rotation is built for.

    Args:
        n_replicas: Transformers side by side.
        n_layers: Blocks of each.
        n_heads: Heads at full width.
        d_model: Channels at full width.
        head_dim: Channels of a head.
        context: Longest sequence, in tokens.
        dtype: Of the parameters.
        device: Where they live.
    """

    n_replicas: int
    n_layers: int
    n_heads: int
    d_model: int
    head_dim: int
    context: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None


class Component(nn.Module):
    """A module whose parameters all carry a leading replica dimension and named axes.

    The axes tell which elements belong to an inactive width level: `"head"` and `"channel"` are
    cut with the width, any other axis is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.axes: dict[str, tuple[str, ...]] = {}

    def add(self, name: str, shape: Shape, **axes: int) -> None:
        """Registers a parameter of zeros `[n_replicas, *axes]`."""
        zeros = torch.zeros(
            shape.n_replicas, *axes.values(), dtype=shape.dtype, device=shape.device
        )
        self.register_parameter(name, nn.Parameter(zeros))
        self.axes[name] = tuple(axes)

    def initialise(self, row: int, generator: torch.Generator) -> None:
        """Draws fresh values for one replica; zeros where a component says nothing else."""
        for parameter in self.parameters():
            parameter[row].zero_()

    def levels(self, head: Tensor, channel: Tensor) -> dict[str, Tensor]:
        """The width level of every element of every parameter, shaped like one replica's."""
        table = {"head": head, "channel": channel}
        levels = {}
        for name, axes in self.axes.items():
            size = getattr(self, name).shape[1:]
            level = torch.zeros(size, dtype=torch.long, device=head.device)
            for i, axis in enumerate(axes):
                if axis in table:
                    shape = [-1 if j == i else 1 for j in range(len(axes))]
                    level = torch.maximum(level, table[axis].view(shape).expand(size))
            levels[name] = level
        return levels


def draw(size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers in float64, the same for every dtype of the model."""
    return torch.randn(tuple(size), generator=generator, dtype=torch.float64)
