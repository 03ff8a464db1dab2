"""The task `waves`: what a noisy sum of slow and fast waves on a drifting level does next."""

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray as Array

from envs.tasks.splits import split_generator

LEVELS = 64
VOCABULARY = LEVELS
BANDS = ((4.0, 8.0), (8.0, 24.0), (24.0, 96.0))  # of periods in tokens, one wave from each
DRIFT = 1.0  # greatest change over a sequence; a wave's amplitude is 0.3 to 1
NOISE = 0.03
_UNCOUNTED = 8  # the first targets, where there is no past to go by
_WAVES = 0x3A7E


def wave_sequences(
    seed: int, n: int, seq: int, *, noise: float = NOISE, split: str = "train"
) -> tuple[Int64[Array, "{n} {seq}+1"], Bool[Array, "{n} {seq}"]]:
    """Sums of one wave per band with a linear drift and white noise, in 64 levels.

    Amplitudes, periods (log-uniform), phases and drift are each sequence's own, so the next
    value has to be told from the past at several time scales at once.

    Args:
        seed: The same seed gives the same tokens.
        n: Sequences.
        seq: Tokens that are read; one more is returned.
        noise: Deviation of the noise; a wave's amplitude is 0.3 to 1.
        split: `"train"` or `"test"`.

    Returns:
        Tokens, and whether the token after each position counts (all but the first few).

    Raises:
        ValueError: For a sequence too short to count anything, or negative noise.
    """
    if seq <= _UNCOUNTED:
        raise ValueError(f"task 'waves' needs a context above {_UNCOUNTED} tokens, got {seq}")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    rng = split_generator(seed, split, _WAVES)
    signal = _signal(rng, n, seq + 1) + noise * rng.standard_normal((n, seq + 1))
    largest = len(BANDS) + DRIFT / 2
    level = np.floor((signal / largest + 1) / 2 * LEVELS).astype(np.int64)
    counted = np.broadcast_to(np.arange(seq) >= _UNCOUNTED, (n, seq)).copy()
    return level.clip(0, LEVELS - 1), counted


def _signal(rng: np.random.Generator, n: int, length: int) -> Float64[Array, "n time"]:
    time = np.arange(length)
    signal = rng.uniform(-DRIFT, DRIFT, (n, 1)) * (time / length - 0.5)
    for shortest, longest in BANDS:
        period = np.exp(rng.uniform(np.log(shortest), np.log(longest), (n, 1)))
        phase, amplitude = rng.uniform(0, 1, (n, 1)), rng.uniform(0.3, 1, (n, 1))
        signal += amplitude * np.sin(2 * np.pi * (time / period + phase))
    return signal
