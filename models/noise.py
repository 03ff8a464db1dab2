"""Dropout noise that depends on a replica's seed, step and layer only, and costs almost nothing.

All replicas read one constant pool of random bytes, each at an offset hashed from its own seed,
its own step and the place in the network. So a replica's noise does not depend on its neighbours,
two runs with the same seed share their noise (common random numbers), and drawing it is a copy.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

_POOL_SEED = 0x5EED
_MIN_POOL = 1 << 22
BYTE_VALUES = 256


def mix_bits(value: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """SplitMix64's finaliser: well spread 64-bit hashes (Steele et al. 2014, OOPSLA).

    Args:
        value: int64; sums and products wrap around.
    """
    value = value - 0x61C8864680B583EB  # adds 0x9E3779B97F4A7C15 modulo 2^64
    value = (value ^ _shift_right(value, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    value = (value ^ _shift_right(value, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def hashed_integers(bound: Int[Tensor, "..."] | int, *keys: Tensor) -> Int[Tensor, "..."]:
    """Reproducible whole numbers in [0, bound), one for each (broadcast) tuple of keys."""
    value = torch.zeros((), dtype=torch.int64, device=keys[0].device)
    for key in keys:
        value = mix_bits(value ^ key)
    return (value & 0x7FFFFFFFFFFFFFFF) % bound


@dataclass(frozen=True)
class Noise:
    """Where each replica's dropout noise comes from.

    Args:
        seeds: Noise seed of each replica.
        steps: Optimizer steps that each replica has taken.
    """

    seeds: Int[Tensor, " replica"]
    steps: Int[Tensor, " replica"]


class NoisePool:
    """A constant pool of random bytes and the windows that replicas read from it.

    Args:
        window: Bytes that one replica reads per place and optimizer step.
        device: Where the pool lives.
    """

    def __init__(self, window: int, device: torch.device | str | None = None) -> None:
        self.window = window
        size = max(_MIN_POOL, 1 << (2 * window - 1).bit_length())
        generator = torch.Generator().manual_seed(_POOL_SEED)
        pool = torch.randint(0, BYTE_VALUES, (size,), dtype=torch.uint8, generator=generator)
        self._windows = pool.to(device).as_strided((size - window, window), (1, 1))

    def read(self, noise: Noise, n_places: int) -> UInt8[Tensor, "replica place window"]:
        """The bytes of each replica at each of `n_places` dropout places of the network."""
        places = torch.arange(n_places, device=noise.seeds.device)
        starts = hashed_integers(
            self._windows.shape[0], noise.seeds[:, None], noise.steps[:, None], places
        )
        raw = self._windows.index_select(0, starts.flatten())
        return raw.view(len(noise.seeds), n_places, self.window)


def keep_mask(
    noise: UInt8[Tensor, "replica ..."], dropout: Float[Tensor, " replica"], dtype: torch.dtype
) -> Float[Tensor, "replica ..."]:
    """Inverted-dropout multipliers: 0 with probability p, else 1 / (1 - p).

    p is rounded to 1/256 (the noise is bytes), and the multiplier uses the rounded p, so the
    expectation stays exact. p = 0 gives exactly 1 everywhere.
    """
    shape = (-1,) + (1,) * (noise.dim() - 1)
    threshold = torch.round(dropout * BYTE_VALUES).clamp_(0, BYTE_VALUES - 1)
    scale = BYTE_VALUES / (BYTE_VALUES - threshold)
    kept = noise >= threshold.to(torch.uint8).view(shape)
    return kept.to(dtype).mul_(scale.to(dtype).view(shape))
