"""Paired statistics: what a difference is worth, with an interval."""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

from metactl.knobs import FloatArray

N_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with a 95 % interval."""

    estimate: float
    low: float
    high: float


def paired_difference(left: FloatArray, right: FloatArray, seed: int = 0) -> Interval:
    """Mean of `left - right` over paired tasks, with an expanded percentile bootstrap interval.

    The percentiles lie farther out the fewer the tasks are, as those of Student's t do beside the
    normal distribution's (Hesterberg, arXiv 1411.5279): with 32 tasks by 6 %. A single pair says
    nothing of the spread: its interval is infinite.

    Args:
        left: One number per task.
        right: The same tasks.
        seed: Of the resampling.
    """
    difference = np.asarray(left) - np.asarray(right)
    if len(difference) == 1:
        return Interval(estimate=float(difference[0]), low=-np.inf, high=np.inf)
    means = difference[_resamples(len(difference), seed)].mean(axis=1)
    return _interval(float(difference.mean()), means, len(difference))


def gap_closed(
    policy: FloatArray, best_static: FloatArray, oracle: FloatArray, seed: int = 0
) -> Interval:
    """Share of the gap between the best static setting and the per-task oracle that is closed.

    A ratio of means, mean(static - policy) / mean(static - oracle), never a mean of ratios. Where
    the resampled gap is not positive there is no gap to close, and the interval is infinite.
    """
    gain = np.asarray(best_static) - np.asarray(policy)
    gap = np.asarray(best_static) - np.asarray(oracle)
    index = _resamples(len(gain), seed)
    gains, gaps = gain[index].mean(axis=1), gap[index].mean(axis=1)
    ratios = np.divide(
        gains, gaps, out=np.copysign(np.full_like(gains, np.inf), gains), where=gaps > 0
    )
    estimate = float(gain.mean() / gap.mean()) if gap.mean() > 0 else float("nan")
    if len(gain) == 1:
        return Interval(estimate=estimate, low=float("-inf"), high=float("inf"))
    return _interval(estimate, ratios, len(gain))


def probability_of_improvement(left: FloatArray, right: FloatArray) -> float:
    """Share of paired tasks on which `left` is below `right`, ties counting half.

    (arXiv 2108.13264 takes all pairs of runs; here each has its own.)
    """
    left, right = np.asarray(left), np.asarray(right)
    return float((left < right).mean() + 0.5 * (left == right).mean())


def interquartile_mean(values: FloatArray) -> float:
    """Mean of the middle half (arXiv 2108.13264), whatever a few extremes do."""
    ordered = np.sort(np.asarray(values))
    n = len(ordered)
    weight = np.clip(np.minimum(np.arange(1, n + 1) - n / 4, 3 * n / 4 - np.arange(n)), 0, 1)
    return float((ordered * weight).sum() / weight.sum())


def worst_decile(values: FloatArray) -> float:
    """Mean of the largest tenth (at least one)."""
    ordered = np.sort(np.asarray(values))
    return float(ordered[-max(1, round(len(ordered) / 10)) :].mean())


def _resamples(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, (N_RESAMPLES, n))


def _interval(estimate: float, resampled: FloatArray, n: int) -> Interval:
    tail = float(ndtr(-np.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975)))
    # Order statistics, so that infinite ratios need no arithmetic.
    low, high = np.quantile(resampled, (tail, 1 - tail), method="nearest")
    return Interval(estimate=estimate, low=float(low), high=float(high))
