"""What task families have in common: a task is places in the data of its family."""

import abc
import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

PROBE_SEQUENCES = 16
TEST_SEQUENCES = 48
_ANOTHER = 0x07E4
_GOLDEN = (5**0.5 - 1) / 2
_MOST = 1 << 62  # tokens


@dataclass(frozen=True)
class Task:
    """Data of one training run, as places in its family's data.

    Args:
        part: Of the data: `"meta_train"`, `"meta_test"` or, of text, `"all"`.
        train_start: First training token.
        train_tokens: Unique training tokens.
        probe: Starts of the `PROBE_SEQUENCES` probe sequences.
        test: Starts of the `TEST_SEQUENCES` test sequences. Training data, probe and test share
            no token.
        seed: That it is the task of; what else belongs to a task is drawn by it.
        label: Class of the task, in families that have them.
    """

    part: str
    train_start: int
    train_tokens: int
    probe: NDArray[np.int64]
    test: NDArray[np.int64]
    seed: int
    label: int = 0


class TaskFamily(abc.ABC):
    """Draws tasks of one kind.

    Attributes:
        vocabulary: Distinct tokens, which are 0 to `vocabulary - 1`.
        data: All tokens, one after the other.
        counted: Whether each token counts when it is the next one, if not all do.
        stride: A training sequence may begin at every `stride`-th token of a task's data.
    """

    vocabulary: ClassVar[int]
    data: NDArray[np.uint8]
    counted: NDArray[np.bool_] | None
    stride: int

    @abc.abstractmethod
    def sample(self, seed: int, split: str) -> Task:
        """The task of a seed, from the `"meta_train"` or the `"meta_test"` part of the data.

        Consecutive seeds spread evenly over what is drawn, so that tasks side by side are alike
        as a set.
        """

    def fingerprint(self) -> str:
        """SHA-256 of the data."""
        return hashlib.sha256(self.data.tobytes()).hexdigest()

    def unlike(self, task: Task, seed: int) -> Task:
        """Another task of the same part and, where there are several, of another class."""
        return self.sample(another_seed(seed), task.part)


def evenly(seed: int, bounds: tuple[int, int]) -> float:
    """A number within bounds; those of consecutive seeds lie evenly, log-uniformly."""
    low, high = np.log(bounds)
    return float(np.exp(low + seed * _GOLDEN % 1.0 * (high - low)))


def another_seed(seed: int) -> int:
    """A seed that has nothing to do with this one."""
    return int(np.random.default_rng([seed, _ANOTHER]).integers(2**31))


def check_unique_bytes(unique_bytes: tuple[int, int]) -> None:
    """Refuses a senseless range of data sizes."""
    low, high = unique_bytes
    if not 0 < low <= high < _MOST:
        raise ValueError(f"unique_bytes must be 0 < low <= high < 2**62, got {low}, {high}")
