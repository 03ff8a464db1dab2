"""Relative biases, learned per head and added to the logits inside the softmax."""

import abc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from models.rotary.component import Component, Shape, draw
from models.rotary.pairs import at_least_float32

BIASES = ("t5", "alibi", "kerple", "fire")
_T5_BUCKETS, _T5_FARTHEST = 32, 128
_FIRE_UNITS = 32


class RelativeBias(Component, abc.ABC):
    """A learned function of the distance between query and key, per layer and head."""

    def forward(
        self, query: Float[Tensor, " query"], key: Float[Tensor, " key"]
    ) -> Float[Tensor, "replica layer head query key"]:
        """Biases of any queries and keys; what a future key gets is of no account.

        Args:
            query: Positions of the queries.
            key: Positions of the keys.
        """
        distance = (query[:, None] - key[None, :]).clamp(min=0)
        return self.at_distance(distance.flatten()).unflatten(-1, distance.shape)

    @abc.abstractmethod
    def at_distance(
        self, distance: Float[Tensor, " distance"]
    ) -> Float[Tensor, "replica layer head distance"]:
        """Biases by distance in tokens."""

    def by_distance_up_to(self, seq: int) -> bool:
        """Whether within `seq` tokens the bias depends on the distance alone."""
        return True


class T5Bias(RelativeBias):
    """One number per bucket of distances: exact to 16 tokens, logarithmic to 128 (T5,
    arXiv 1910.10683, unidirectional).
    """

    table: Tensor

    def __init__(self, shape: Shape, n_layers: int) -> None:
        super().__init__()
        self.add("table", shape, layer=n_layers, head=shape.n_heads, bucket=_T5_BUCKETS)

    def at_distance(
        self, distance: Float[Tensor, " distance"]
    ) -> Float[Tensor, "replica layer head distance"]:
        exact = _T5_BUCKETS // 2
        ratio = (distance.clamp(min=1) / exact).log() / math.log(_T5_FARTHEST / exact)
        far = (exact + (ratio * (_T5_BUCKETS - exact)).floor()).clamp(max=_T5_BUCKETS - 1)
        bucket = torch.where(distance < exact, distance, far).long()
        return at_least_float32(self.table)[..., bucket]


class AlibiBias(RelativeBias):
    """-slope * distance (ALiBi, arXiv 2108.12409) with learned slopes, geometric at the start."""

    log_slope: Tensor

    def __init__(self, shape: Shape, n_layers: int) -> None:
        super().__init__()
        self.add("log_slope", shape, layer=n_layers, head=shape.n_heads)

    def initialise(self, row: int, generator: torch.Generator) -> None:
        n_heads = self.log_slope.shape[2]
        head = torch.arange(1, n_heads + 1, dtype=torch.float64)
        self.log_slope[row].copy_((-8 * head / n_heads * math.log(2)).expand_as(self.log_slope[0]))

    def at_distance(
        self, distance: Float[Tensor, " distance"]
    ) -> Float[Tensor, "replica layer head distance"]:
        return -at_least_float32(self.log_slope).exp()[..., None] * distance


class KerpleBias(RelativeBias):
    """-r1 * log(1 + r2 * distance) with learned r1, r2 > 0 (KERPLE-log, arXiv 2205.09921)."""

    log_r1: Tensor
    log_r2: Tensor

    def __init__(self, shape: Shape, n_layers: int) -> None:
        super().__init__()
        for name in ("log_r1", "log_r2"):
            self.add(name, shape, layer=n_layers, head=shape.n_heads)

    def at_distance(
        self, distance: Float[Tensor, " distance"]
    ) -> Float[Tensor, "replica layer head distance"]:
        r1, r2 = (at_least_float32(p).exp()[..., None] for p in (self.log_r1, self.log_r2))
        return -r1 * torch.log1p(r2 * distance)


class FireBias(RelativeBias):
    """A small network of the progressive distance (FIRE, arXiv 2310.04418).

    f(log(1 + c d) / log(1 + c max(L, m))) for a query at m and a key d tokens back: distances
    are seen relative to the sequence once it is longer than L, the context trained on. The
    paper learns L as well; here it is given, so that up to L the bias is a function of the
    distance alone and costs next to nothing.
    """

    log_c: Tensor
    inward: Tensor
    shift: Tensor
    outward: Tensor

    def __init__(self, shape: Shape, n_layers: int, trained_context: int) -> None:
        super().__init__()
        self.trained_context = trained_context
        heads = {"layer": n_layers, "head": shape.n_heads}
        self.add("log_c", shape, layer=n_layers)
        self.add("inward", shape, layer=n_layers, unit=_FIRE_UNITS)
        self.add("shift", shape, layer=n_layers, unit=_FIRE_UNITS)
        self.add("outward", shape, **heads, unit=_FIRE_UNITS)

    def initialise(self, row: int, generator: torch.Generator) -> None:
        self.log_c[row].fill_(math.log(0.1))
        for name, std in (("inward", 1.0), ("shift", 1.0), ("outward", 0.1)):
            parameter = getattr(self, name)
            parameter[row].copy_(draw(parameter.shape[1:], generator) * std)

    def at_distance(
        self, distance: Float[Tensor, " distance"]
    ) -> Float[Tensor, "replica layer head distance"]:
        return self._network(distance, torch.full_like(distance, float(self.trained_context)))

    def forward(
        self, query: Float[Tensor, " query"], key: Float[Tensor, " key"]
    ) -> Float[Tensor, "replica layer head query key"]:
        distance = (query[:, None] - key[None, :]).clamp(min=0)
        longest = query.clamp(min=self.trained_context)[:, None].expand_as(distance)
        bias = self._network(distance.flatten(), longest.flatten())
        return bias.unflatten(-1, distance.shape)

    def _network(self, distance: Tensor, longest: Tensor) -> Tensor:
        c = at_least_float32(self.log_c).exp()[..., None]
        distance, longest = distance.to(c), longest.to(c)
        x = torch.log1p(c * distance) / torch.log1p(c * longest)
        inward, shift, outward = map(at_least_float32, (self.inward, self.shift, self.outward))
        units = torch.relu(inward[..., None] * x[:, :, None] + shift[..., None])
        return outward @ units

    def by_distance_up_to(self, seq: int) -> bool:
        return seq <= self.trained_context + 1


def build_bias(kind: str, shape: Shape, n_layers: int, trained_context: int) -> RelativeBias:
    if kind == "fire":
        return FireBias(shape, n_layers, trained_context)
    if kind == "t5":
        return T5Bias(shape, n_layers)
    return AlibiBias(shape, n_layers) if kind == "alibi" else KerpleBias(shape, n_layers)
