"""Times of several sides that take turns, so that what the machine does else befalls all alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Run = Callable[[], object]
S = TypeVar("S", bound=Hashable)


def in_turn(
    sides: Mapping[S, Run], rounds: int, *, repeats: int = 1, warm_up: int = 1, device: str = "cpu"
) -> dict[S, list[float]]:
    """Seconds of a run of every side, in every round.

    Args:
        sides: What is timed, by name.
        rounds: How often, in turn.
        repeats: Runs of a side in each round.
        warm_up: Rounds before, which do not count.
        device: That is waited for.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[S, list[float]] = {name: [] for name in sides}
    for turn in range(-warm_up, rounds):
        for name, run in sides.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            wait()
            if turn >= 0:
                times[name].append((time.perf_counter() - start) / repeats)
    return times


def ratio(times: Mapping[S, list[float]], side: S, other: S) -> float:
    """Median over the rounds of how many times longer a side takes than another."""
    return statistics.median(a / b for a, b in zip(times[side], times[other], strict=True))


def medians(times: Mapping[S, list[float]]) -> dict[S, float]:
    """Seconds by side."""
    return {name: statistics.median(each) for name, each in times.items()}
