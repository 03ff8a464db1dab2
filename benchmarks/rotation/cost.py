"""What a Givens product costs beside a dense matrix as heads grow wider."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.rotary.givens import SCHEDULES, givens_product, partners

HEAD_DIMS = (8, 16, 32, 64, 128)
TOKENS = 1024
_HEADS = 4
_PAIRS = 15


def givens_cost(pairs: int = _PAIRS) -> dict[str, Any]:
    """Seconds forward and backward, medians, by head dimension and schedule.

    Both sides turn `TOKENS` tokens of four heads by one matrix per head; the Givens side builds
    its matrices from the angles first. They are measured in turn; `ratio` is the median of the
    pairs' ratios.
    """
    return {
        schedule: {str(dim): _compare(schedule, dim, pairs) for dim in HEAD_DIMS}
        for schedule in SCHEDULES
    }


def _compare(schedule: str, dim: int, pairs: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(dim)
    partner = partners(schedule, dim)
    x = torch.randn(_HEADS, TOKENS, dim, generator=generator)
    angles = torch.randn(_HEADS, len(partner), dim // 2, generator=generator)
    dense = torch.randn(_HEADS, dim, dim, generator=generator)

    def build(angles: Tensor) -> Tensor:
        return givens_product(angles, partner)

    sides: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "dense": (lambda matrix: x @ matrix, dense),
        "givens": (lambda angles: x @ build(angles), angles),
        "build": (build, angles),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs + 1):
        for name, (function, parameter) in sides.items():
            seconds[name].append(_seconds(function, parameter))
    kept = {name: each[1:] for name, each in seconds.items()}  # the first warms up
    ratios = [a / b for a, b in zip(kept["givens"], kept["dense"], strict=True)]
    medians = {f"{name}_seconds": statistics.median(each) for name, each in kept.items()}
    return {**medians, "ratio": statistics.median(ratios), "angles": angles[0].numel()}


def _seconds(function: Callable[[Tensor], Tensor], parameter: Tensor) -> float:
    leaf = parameter.detach().requires_grad_()
    start = time.perf_counter()
    function(leaf).square().sum().backward()
    return time.perf_counter() - start
