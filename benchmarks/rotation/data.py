"""Training and test sequences of every seed, the same for all arms with the same steps."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.rotation.recipes import LENGTHS, Recipe
from envs.tasks import TextFamily, digits, load_corpus, recall, waves

_TEXT_BYTES = 1_000_000  # of training text per seed
_N_TEST, _N_LONGER_TEST = 128, 64  # sequences per seed
Examples = tuple[NDArray[np.int64], NDArray[np.bool_]]


@dataclass(frozen=True)
class TaskData:
    """Sequences of one task.

    Args:
        tokens: `[seed, step * batch, seq + 1]`.
        counted: Whether the token after each position counts, `[seed, step * batch, seq]`.
        tests: By name; the first is like the training data.
    """

    tokens: Tensor
    counted: Tensor
    tests: dict[str, tuple[Tensor, Tensor]]


def task_data(task: str, recipe: Recipe, n_seeds: int, steps: int) -> TaskData:
    """Fresh sequences for every step (digits: epoch after epoch), and each seed's own test."""
    n, seq, seeds = steps * recipe.batch_size, recipe.seq, range(n_seeds)
    tests: dict[str, list[Examples]]
    if task == "text":
        family = TextFamily(load_corpus(None), seq, (_TEXT_BYTES, _TEXT_BYTES))
        both = [_text(family, seed, n) for seed in seeds]
        train, tests = [pair[0] for pair in both], {"test": [pair[1] for pair in both]}
    elif task == "digits":
        train = [digits.digit_sequences(seed, n) for seed in seeds]
        tests = {"test": [digits.digit_sequences(seed, split="test") for seed in seeds]}
    elif task == "waves":
        train = [waves.wave_sequences(seed, n, seq) for seed in seeds]
        tests = {"test": [waves.wave_sequences(seed, _N_TEST, seq, split="test") for seed in seeds]}
    else:
        train = [recall.recall_sequences(seed, n, seq, (2, seq - 2)) for seed in seeds]
        tests = {
            name: [_recall(seed, *wanted) for seed in seeds]
            for name, wanted in _recalls(seq).items()
        }
    return TaskData(*_stacked(train), {name: _stacked(each) for name, each in tests.items()})


def _stacked(examples: list[Examples]) -> tuple[Tensor, Tensor]:
    tokens, counted = zip(*examples, strict=True)
    return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(counted))


def _text(family: TextFamily, seed: int, n: int) -> tuple[Examples, Examples]:
    task, data = family.sample(seed, "meta_train"), family.corpus.data
    rng = np.random.default_rng([seed, 0xDA7A])
    starts = task.train_start + rng.integers(0, task.train_tokens - family.context, n)
    window = np.arange(family.context + 1)

    def examples(first: NDArray[np.int64]) -> Examples:
        tokens = data[first[:, None] + window].astype(np.int64)
        return tokens, np.ones((len(first), family.context), dtype=np.bool_)

    return examples(starts), examples(task.test)


def _recalls(seq: int) -> dict[str, tuple[int, int, tuple[int, int]]]:
    """Number, length and gaps of test sequences: longer ones have old gaps, and only new ones."""
    wanted = {"test": (_N_TEST, seq, (2, seq - 2))}
    for length in LENGTHS[1:]:
        longer, n = length * seq, _N_LONGER_TEST
        wanted[f"{length}x, gaps as in training"] = (n, longer, (2, seq - 2))
        wanted[f"{length}x, longer gaps"] = (n, longer, (longer // 2, longer - 2))
    return wanted


def _recall(seed: int, n: int, seq: int, gaps: tuple[int, int]) -> Examples:
    return recall.recall_sequences(seed, n, seq, gaps, induction_share=0.0, split="test")


def chance(data: TaskData, vocab_size: int) -> dict[str, float]:
    """Test losses without a model: of the targets' frequencies, and of the last token alone.

    Both are counted on the training data (with half a count for everything), per seed, then
    averaged; nats.
    """
    losses: dict[str, list[float]] = {"frequencies": [], "last_token": []}
    for seed in range(len(data.tokens)):
        counts = np.full((vocab_size, vocab_size), 0.5)
        np.add.at(counts, _pairs(data.tokens[seed], data.counted[seed]), 1)
        test = _pairs(*(part[seed] for part in data.tests["test"]))
        frequency = counts.sum(0) / counts.sum()
        losses["frequencies"].append(float(-np.log(frequency[test[1]]).mean()))
        following = counts / counts.sum(1, keepdims=True)
        losses["last_token"].append(float(-np.log(following[test]).mean()))
    return {name: float(np.mean(each)) for name, each in losses.items()}


def _pairs(tokens: Tensor, counted: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    read, target = tokens[:, :-1][counted], tokens[:, 1:][counted]
    return read.numpy(), target.numpy()
