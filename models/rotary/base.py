"""The interface that every rotation variant fulfils, and the table of their names."""

import abc
import difflib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Rotation(nn.Module, abc.ABC):
    """Turns queries and keys so that their product carries relative position.

    A variant owns whatever tables it derives from the base; they are rebuilt by `refresh`, which
    the model calls when a base moved and never otherwise. Sign convention, here and everywhere:
    position m turns the pair (x0, x1) counter-clockwise by `m * inv_freq`.
    """

    @abc.abstractmethod
    def refresh(self, log_base: Float[Tensor, " replica"]) -> None:
        """Rebuilds the tables that depend on the base, in float32 or better."""

    @abc.abstractmethod
    def forward(
        self, queries_keys: Float[Tensor, "replica batch seq heads head_dim"]
    ) -> Float[Tensor, "replica batch seq heads head_dim"]:
        """Rotates queries and keys, stacked along the heads, at positions 0 .. seq - 1."""


RotationFactory = Callable[..., Rotation]
_VARIANTS: dict[str, RotationFactory] = {}


def register_rotation(name: str) -> Callable[[RotationFactory], RotationFactory]:
    """Class decorator: makes a variant known under `name`."""

    def register(factory: RotationFactory) -> RotationFactory:
        _VARIANTS[name] = factory
        return factory

    return register


def rotation_names() -> list[str]:
    return sorted(_VARIANTS)


def build_rotation(name: str, *, n_replicas: int, head_dim: int, context: int) -> Rotation:
    """Builds a variant by name.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if name not in _VARIANTS:
        close = difflib.get_close_matches(name, rotation_names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown rotation {name!r}. Known: {', '.join(rotation_names())}.{hint}")
    return _VARIANTS[name](n_replicas=n_replicas, head_dim=head_dim, context=context)


def rotate_pairs(
    x: Float[Tensor, "*batch head_dim"], rotation: Tensor
) -> Float[Tensor, "*batch head_dim"]:
    """Rotates neighbouring channels (0, 1), (2, 3), ... by unit complex numbers.

    One complex product is a single pass forward and a single pass backward, several times
    faster on a CPU than the usual products of halves with cosines and sines.

    Args:
        x: Real channels; computed in float32 at least, returned in their own dtype.
        rotation: Complex `exp(i * angle)`, broadcastable to `x.shape[:-1] + (head_dim / 2,)`.
    """
    real = x if x.dtype in (torch.float32, torch.float64) else x.float()
    pairs = torch.view_as_complex(real.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
