"""The task families whose data are separate sequences: `recall`, `digits`, `waves`.

Each draws its tasks from a pool of sequences that is made once: by meta-split, by class of task
(how long the gaps are, how much noise there is), and there a part to train on and a part to be
judged by.
"""

import abc
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from envs.tasks import digits, recall, waves
from envs.tasks.corpus import PARTS
from envs.tasks.family import (
    PROBE_SEQUENCES,
    TEST_SEQUENCES,
    Task,
    TaskFamily,
    another_seed,
    check_unique_bytes,
    evenly,
)
from envs.tasks.splits import SPLITS
from metactl.errors import unknown_name

_SIZES = {"train": 4096, "test": 512}  # sequences of a class; the latter for probe and test
_SPLIT_OF_PART = {"meta_train": "train", "meta_test": "test"}  # of the images
_STREAM = 0x5E9

Sequences = tuple[NDArray[np.int64], NDArray[np.bool_]]


class SequenceFamily(TaskFamily):
    """Draws tasks from a pool: a class, a stretch of its sequences, and what it is judged by.

    Args:
        context: Tokens that are read of a sequence; one more is its last target.
        unique_bytes: Range of the training data's size in tokens, drawn log-uniformly and cut to
            what the pool has.
    """

    def __init__(self, context: int, unique_bytes: tuple[int, int]) -> None:
        check_unique_bytes(unique_bytes)
        self.context, self.stride = context, context + 1
        self.unique_bytes = unique_bytes
        tokens, counted = [], []
        self._places: dict[tuple[str, int], tuple[int, int, int]] = {}
        first = 0
        for part in PARTS:
            for label in range(self.n_classes):
                pool, held_out = (self.make(part, label, split) for split in SPLITS)
                self._places[part, label] = (first, len(pool[0]), len(held_out[0]))
                first += len(pool[0]) + len(held_out[0])
                for sequences, counts in (pool, held_out):
                    never = np.zeros((len(counts), 1), dtype=bool)  # the first token is no target
                    tokens.append(sequences.astype(np.uint8).ravel())
                    counted.append(np.concatenate((never, counts), axis=1).ravel())
        self.data, self.counted = np.concatenate(tokens), np.concatenate(counted)

    @property
    @abc.abstractmethod
    def n_classes(self) -> int:
        """Unlike kinds of task in the family."""

    @abc.abstractmethod
    def make(self, part: str, label: int, split: str) -> Sequences:
        """Sequences to train on (`"train"`) or to be judged by (`"test"`), and what counts."""

    def sample(self, seed: int, split: str) -> Task:
        return self._of_class(seed % self.n_classes, seed, split)

    def unlike(self, task: Task, seed: int) -> Task:
        others = [label for label in range(self.n_classes) if label != task.label] or [task.label]
        other = another_seed(seed)
        return self._of_class(others[other % len(others)], other, task.part)

    def _of_class(self, label: int, seed: int, split: str) -> Task:
        if split not in PARTS:
            raise ValueError(unknown_name("split", split, tuple(PARTS)))
        rng = np.random.default_rng([seed, _STREAM])
        first, n_pool, n_held_out = self._places[split, label]
        size = round(evenly(seed // self.n_classes, self.unique_bytes) / self.stride)
        n = min(max(size, 1), n_pool)
        start = first + int(rng.integers(0, n_pool - n + 1))
        held_out = first + n_pool + rng.permutation(n_held_out)
        half = n_held_out * PROBE_SEQUENCES // (PROBE_SEQUENCES + TEST_SEQUENCES)
        return Task(
            split,
            start * self.stride,
            n * self.stride,
            probe=np.resize(held_out[:half], PROBE_SEQUENCES) * self.stride,
            test=np.resize(held_out[half:], TEST_SEQUENCES) * self.stride,
            seed=seed,
            label=label,
        )


class RecallFamily(SequenceFamily):
    """Associative recall and induction; a class is a range of gaps, from short to the context's."""

    vocabulary: ClassVar[int] = recall.VOCABULARY
    _shortest = 6  # shorter periods have so few sequences that splits would share them

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Least and greatest gap in tokens, by class: each begins where the one before ends."""
        longest = self.context // 2 * 2 - 2
        if longest < 2 * self._shortest:
            raise ValueError(
                f"task 'recall' needs a context of at least {2 * self._shortest + 2} tokens, "
                f"got {self.context}"
            )
        edges = [self._shortest]
        while edges[-1] * 2 < longest:
            edges.append(edges[-1] * 2)
        if len(edges) > 1 and longest < 1.25 * edges[-1]:  # too few gaps for a class of their own
            edges.pop()
        return list(pairwise([*edges, longest]))

    @property
    def n_classes(self) -> int:
        return len(self.gaps)

    def make(self, part: str, label: int, split: str) -> Sequences:
        pairs = max(1, min(4, self.context // 12))
        gaps = self.gaps[label]
        seed = _pool_seed(part, label)
        return recall.recall_sequences(
            seed, _SIZES[split], self.context, gaps, n_pairs=pairs, split=split
        )


class WavesFamily(SequenceFamily):
    """Noisy multi-scale signals; a class is a level of noise."""

    vocabulary: ClassVar[int] = waves.VOCABULARY
    noise = (0.01, 0.03, 0.1, 0.3)

    @property
    def n_classes(self) -> int:
        return len(self.noise)

    def make(self, part: str, label: int, split: str) -> Sequences:
        seed, noise = _pool_seed(part, label), self.noise[label]
        return waves.wave_sequences(seed, _SIZES[split], self.context, noise=noise, split=split)


class DigitsFamily(SequenceFamily):
    """Images of digits, pixel by pixel, the name last. Meta-split and held-out part share none."""

    vocabulary: ClassVar[int] = digits.VOCABULARY
    _held_out_share = 0.2

    def __init__(self, context: int, unique_bytes: tuple[int, int]) -> None:
        if context != digits.N_PIXELS:
            raise ValueError(
                f"task 'digits' needs a context of {digits.N_PIXELS} tokens (pixels), got {context}"
            )
        super().__init__(context, unique_bytes)

    @property
    def n_classes(self) -> int:
        return 1

    def make(self, part: str, label: int, split: str) -> Sequences:
        tokens, counted = digits.digit_sequences(0, split=_SPLIT_OF_PART[part])
        end = len(tokens) - round(self._held_out_share * len(tokens))
        return (tokens[:end], counted[:end]) if split == "train" else (tokens[end:], counted[end:])


def _pool_seed(part: str, label: int) -> int:
    return 1000 * PARTS.index(part) + label
