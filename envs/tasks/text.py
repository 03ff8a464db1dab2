"""The task family `text`: byte-level language modelling with little or much unique data."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.tasks.corpus import Corpus

PROBE_SEQUENCES = 16
TEST_SEQUENCES = 48
_GOLDEN = (5**0.5 - 1) / 2
_HELD_OUT_SHARE = 0.3  # of a corpus too short for the full held-out stretch


@dataclass(frozen=True)
class TextTask:
    """Data of one training run, as places in a corpus.

    Args:
        train_start: First training byte.
        train_bytes: Unique training bytes.
        probe: Starts of the `PROBE_SEQUENCES` probe sequences.
        test: Starts of the `TEST_SEQUENCES` test sequences. Training data, probe and test share
            no byte.
    """

    train_start: int
    train_bytes: int
    probe: NDArray[np.int64]
    test: NDArray[np.int64]


class TextFamily:
    """Draws text tasks: a stretch of the corpus to train on, the next one to be judged by.

    Windows of the held-out stretch go to probe and test in turn, so both see the same kind of
    text and never the same byte.

    Args:
        corpus: Where the text comes from.
        context: Tokens per sequence.
        unique_bytes: Range of the training data's size, drawn log-uniformly and cut to what
            the corpus has.
    """

    def __init__(self, corpus: Corpus, context: int, unique_bytes: tuple[int, int]) -> None:
        low, high = unique_bytes
        if not 0 < low <= high:
            raise ValueError(f"unique_bytes must be 0 < low <= high, got {low}, {high}")
        self.corpus, self.context = corpus, context
        self.unique_bytes = (max(low, context + 2), max(high, context + 2))

    def sample(self, seed: int, split: str) -> TextTask:
        """The task of a seed, from one part of the corpus.

        Raises:
            ValueError: If that part is too short; the message says what is needed.
        """
        rng = np.random.default_rng([seed, 0x7E57])
        first, end = self.corpus.bounds(split)
        window = self.context + 1
        held_out = min(
            2 * max(PROBE_SEQUENCES, TEST_SEQUENCES) * window,
            int(_HELD_OUT_SHARE * (end - first)),
        )
        longest = end - first - held_out
        if held_out < 2 * window or longest < window + 1:
            raise ValueError(
                f"Data {self.corpus.name!r} is too short: {end - first} bytes for {split}, and a "
                f"context of {self.context} needs {math.ceil(2 * window / _HELD_OUT_SHARE)}"
            )
        low, high = np.log(self.unique_bytes)
        share = seed * _GOLDEN % 1.0  # consecutive seeds: evenly spread sizes
        train_bytes = min(int(np.exp(low + share * (high - low)) + 1e-6), longest)
        start = first + int(rng.integers(0, longest - train_bytes + 1))
        windows = start + train_bytes + window * np.arange(held_out // window)
        return TextTask(
            start,
            train_bytes,
            probe=_spread(windows[0::2], PROBE_SEQUENCES),
            test=_spread(windows[1::2], TEST_SEQUENCES),
        )


def _spread(windows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """`n` evenly spaced windows (repeated where there are fewer)."""
    return windows[np.linspace(0, len(windows) - 1, n).round().astype(int)]
