"""The task family `text`: byte-level language modelling with little or much unique data."""

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from envs.tasks.corpus import PARTS, Corpus
from envs.tasks.family import (
    PROBE_SEQUENCES,
    TEST_SEQUENCES,
    Task,
    TaskFamily,
    another_seed,
    check_unique_bytes,
    evenly,
)

_TRIES = 16  # for a task elsewhere
_HELD_OUT_SHARE = 0.3  # of a corpus too short for the full held-out stretch


class TextFamily(TaskFamily):
    """Draws text tasks: a stretch of the corpus to train on, the next one to be judged by.

    Windows of the held-out stretch go to probe and test in turn, so both see the same kind of
    text and never the same byte.

    Args:
        corpus: Where the text comes from.
        context: Tokens per sequence.
        unique_bytes: Range of the training data's size, drawn log-uniformly and cut to what
            the corpus has.
        other: Where unlike tasks come from, if not from the same corpus.
    """

    vocabulary: ClassVar[int] = 256

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        unique_bytes: tuple[int, int],
        other: Corpus | None = None,
    ) -> None:
        check_unique_bytes(unique_bytes)
        low, high = unique_bytes
        self.corpus, self.context, self.other = corpus, context, other
        all_of_it = corpus.data if other is None else np.concatenate((corpus.data, other.data))
        self.data, self.counted, self.stride = all_of_it, None, 1
        self.unique_bytes = (max(low, context + 2), max(high, context + 2))
        if other is not None:
            for part in PARTS:  # refuses one that is too short
                self._sample(other, len(corpus.data), 0, part)

    def sample(self, seed: int, split: str) -> Task:
        """The task of a seed, from one part of the corpus.

        Raises:
            ValueError: If that part is too short; the message says what is needed.
        """
        return self._sample(self.corpus, 0, seed, split)

    def unlike(self, task: Task, seed: int) -> Task:
        """A task of the same part of the other corpus or, without one, of another stretch of it."""
        if self.other is None:
            return self._elsewhere(task, seed)
        return self._sample(self.other, len(self.corpus.data), another_seed(seed), task.part)

    def _elsewhere(self, task: Task, seed: int) -> Task:
        """A task whose probe and test are no text of the other's training, if that can be."""
        end = task.train_start + task.train_tokens
        for _ in range(_TRIES):
            later = super().unlike(task, seed)
            windows = np.concatenate((later.probe, later.test))
            if not ((windows + self.context >= task.train_start) & (windows < end)).any():
                break
            seed = another_seed(seed)
        return later

    def _sample(self, corpus: Corpus, place: int, seed: int, split: str) -> Task:
        """A task of a corpus that lies at some place in the data."""
        rng = np.random.default_rng([seed, 0x7E57])
        first, end = (place + bound for bound in corpus.bounds(split))
        window = self.context + 1
        held_out = min(
            2 * max(PROBE_SEQUENCES, TEST_SEQUENCES) * window,
            int(_HELD_OUT_SHARE * (end - first)),
        )
        longest = end - first - held_out
        if held_out < 2 * window or longest < window + 1:
            raise ValueError(
                f"Data {corpus.name!r} is too short: {end - first} bytes for {split}, and a "
                f"context of {self.context} needs {math.ceil(2 * window / _HELD_OUT_SHARE)}"
            )
        train_tokens = min(int(evenly(seed, self.unique_bytes) + 1e-6), longest)
        start = first + int(rng.integers(0, longest - train_tokens + 1))
        windows = start + train_tokens + window * np.arange(held_out // window)
        return Task(
            split,
            start,
            train_tokens,
            probe=_spread(windows[0::2], PROBE_SEQUENCES),
            test=_spread(windows[1::2], TEST_SEQUENCES),
            seed=seed,
        )


def _spread(windows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """`n` evenly spaced windows (repeated where there are fewer)."""
    return windows[np.linspace(0, len(windows) - 1, n).round().astype(int)]
