"""Training one arm: every seed a replica, all of them in one tensor program."""

import math
import statistics
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchmarks.rotation.data import TaskData
from benchmarks.rotation.recipes import Recipe
from envs.adamw import ReplicatedAdamW
from models import AdaptiveTransformer

_FIRST_WEIGHT_SEED = 1000
_WARMUP, _LOW, _WEIGHT_DECAY = 0.1, 0.1, 0.1
_CHUNK = 64  # test sequences at once
_TIMED_EVERY = 10  # optimizer steps


def build(recipe: Recipe, arm: str, n_seeds: int) -> AdaptiveTransformer:
    """Fresh models; what an arm shares with plain RoPE has the same initial weights."""
    model = AdaptiveTransformer(recipe.model(arm), n_seeds, sliced=False)
    rows = list(range(n_seeds))
    model.initialise(rows, [_FIRST_WEIGHT_SEED + row for row in rows])
    return model


class Trainer:
    """A population, its optimizer and its place in the schedule."""

    def __init__(self, recipe: Recipe, arm: str, data: TaskData, steps: int) -> None:
        self.recipe, self.data, self.steps = recipe, data, steps
        self.model = build(recipe, arm, len(data.tokens))
        self.optimizer = ReplicatedAdamW(self.model)

    def step(self, index: int) -> None:
        """The optimizer step of this index, on the sequences that belong to it."""
        batch = self.recipe.batch_size
        places = slice(index * batch, (index + 1) * batch)
        tokens, counted = self.data.tokens[:, places], self.data.counted[:, places]
        losses, _, targets = scores(self.model, tokens, counted)
        (losses / targets + self.model.penalty()).sum().backward()
        n = len(tokens)
        self.optimizer.step(
            torch.full((n,), self._learning_rate(index)),
            torch.full((n,), _WEIGHT_DECAY),
            self.model.knobs.gates > 0,
        )

    def _learning_rate(self, index: int) -> float:
        warm = min(1.0, (index + 1) / max(1.0, _WARMUP * self.steps))
        phase = min(max((index / self.steps - _WARMUP) / (1 - _WARMUP), 0.0), 1.0)
        decay = _LOW + (1 - _LOW) * (1 + math.cos(math.pi * phase)) / 2
        return self.recipe.learning_rate * warm * decay


def scores(
    model: AdaptiveTransformer,
    tokens: Int[Tensor, "replica batch seq_and_1"],
    counted: Bool[Tensor, "replica batch seq"],
) -> tuple[Float[Tensor, " replica"], Float[Tensor, " replica"], Int[Tensor, " replica"]]:
    """Sums of loss (nats) and of right answers over the targets that count, and their number."""
    n = len(tokens)
    rows = counted.nonzero(as_tuple=True)
    logits, targets = model(tokens[..., :-1])[rows], tokens[..., 1:][rows]
    loss = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(dim=-1) == targets).to(loss)
    zero = torch.zeros(n)
    losses, hits = (zero.index_add(0, rows[0], each) for each in (loss, right))
    return losses, hits, torch.bincount(rows[0], minlength=n)


@torch.no_grad()
def evaluate(
    model: AdaptiveTransformer, test: tuple[Tensor, Tensor]
) -> tuple[list[float], list[float]]:
    """Mean loss (nats) and accuracy of every replica."""
    chunks = zip(*(part.split(_CHUNK, dim=1) for part in test), strict=True)
    parts = [scores(model, *chunk) for chunk in chunks]
    losses, hits, targets = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
    return (losses / targets).tolist(), (hits / targets).tolist()


@dataclass
class StepTimes:
    """Wall times of single optimizer steps, in pairs: an arm's, and plain RoPE's beside it."""

    arm: list[float] = field(default_factory=list)
    rope: list[float] = field(default_factory=list)

    def report(self) -> dict[str, float]:
        """Medians in seconds, and the median of the pairs' ratios."""
        ratios = [a / b for a, b in zip(self.arm, self.rope, strict=True)]
        return {
            "seconds_per_step": statistics.median(self.arm),
            "rope_seconds_per_step": statistics.median(self.rope),
            "time_ratio": statistics.median(ratios),
        }


def train(trainer: Trainer, reference: Trainer) -> StepTimes:
    """Trains the one; every tenth step is timed beside a step of the other, in turn first."""
    times = StepTimes()
    for index in range(trainer.steps):
        if index % _TIMED_EVERY:
            trainer.step(index)
            continue
        order = [(trainer, times.arm), (reference, times.rope)]
        for each, seconds in order if index // _TIMED_EVERY % 2 else reversed(order):
            start = time.perf_counter()
            each.step(index)
            seconds.append(time.perf_counter() - start)
    if len(times.arm) > 1:  # the first pair warms up
        del times.arm[0], times.rope[0]
    return times
