"""Where a population goes next, learned from where its members have been (PB2, arXiv 2002.02518).

A Gaussian process over the knobs predicts what a stretch of training gains; what was seen long ago
counts less (arXiv 1601.06650). A member that takes over from another gets the knobs with the
highest upper confidence bound, given that the others go on where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from metactl.knobs import FloatArray

_LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)  # over which the gain changes, in ranges of a knob
_FORGETTING = (0.0, 0.05, 0.2, 0.5)  # per stretch
_NOISE = (0.03, 0.1, 0.3, 1.0)  # variance, where that of the gains is 1
_N_CANDIDATES = 256  # over the whole space, and as many around what is known
_NEARBY = 0.1


@dataclass(frozen=True)
class Stretch:
    """What the members of a population did between two takeovers.

    Args:
        positions: Of their knobs, `[n_members, n_knobs]` in [0, 1].
        gain: By how much their probe loss fell, `[n_members]`; minus infinity if they diverged.
    """

    positions: FloatArray
    gain: FloatArray


def promising(
    stretches: Sequence[Stretch],
    better: FloatArray,
    going_on: FloatArray,
    rng: np.random.Generator,
) -> FloatArray:
    """Knobs for members that take over from others: PB2.

    Gains are standardised within each stretch: early ones are larger, whatever the knobs.

    Args:
        stretches: So far, the oldest first; at least one.
        better: Knobs of those that they take over from, `[n_new, n_knobs]` in [0, 1].
        going_on: Knobs of the members that keep theirs, `[n, n_knobs]`.
        rng: Draws the candidates.

    Returns:
        `[n_new, n_knobs]` in [0, 1].
    """
    positions = np.concatenate([stretch.positions for stretch in stretches])
    gains = np.concatenate([_standardised(stretch.gain) for stretch in stretches])
    times = np.repeat(np.arange(len(stretches)), [len(s.gain) for s in stretches]).astype(float)
    length, forgetting, noise = max(
        product(_LENGTHS, _FORGETTING, _NOISE),
        key=lambda chosen: _log_likelihood(positions, times, gains, *chosen),
    )
    now = float(len(stretches))
    kernel = _kernel(positions, times, positions, times, length, forgetting)
    weights = cho_solve(_factor(kernel, noise), gains)
    breadth = np.sqrt(0.2 + np.log1p(0.4 * len(gains)))
    taken = going_on
    for _ in better:
        candidates = _candidates(positions, rng)
        ahead = np.full(len(candidates), now)
        mean = _kernel(candidates, ahead, positions, times, length, forgetting) @ weights
        known = np.concatenate((positions, taken))
        known_times = np.concatenate((times, np.full(len(taken), now)))
        seen = _kernel(known, known_times, known, known_times, length, forgetting)
        cross = _kernel(candidates, ahead, known, known_times, length, forgetting)
        explained = (cross * cho_solve(_factor(seen, noise), cross.T).T).sum(axis=1)
        bound = mean + breadth * np.sqrt(np.maximum(1 - explained, 0))
        taken = np.concatenate((taken, candidates[[bound.argmax()]]))
    return taken[len(going_on) :]


def _standardised(gain: FloatArray) -> FloatArray:
    """Mean 0 and variance 1; who diverged is as bad as the worst who did not."""
    finite = np.isfinite(gain)
    if not finite.any():
        return np.zeros_like(gain)
    gain = np.where(finite, gain, gain[finite].min())
    return (gain - gain.mean()) / max(float(gain.std()), 1e-9)


def _candidates(positions: FloatArray, rng: np.random.Generator) -> FloatArray:
    anywhere = rng.random((_N_CANDIDATES, positions.shape[1]))
    known = positions[rng.integers(len(positions), size=_N_CANDIDATES)]
    nearby = known + _NEARBY * rng.standard_normal(known.shape)
    return np.concatenate((anywhere, nearby.clip(0, 1)))


def _kernel(
    left: FloatArray,
    left_times: FloatArray,
    right: FloatArray,
    right_times: FloatArray,
    length: float,
    forgetting: float,
) -> FloatArray:
    squared = ((left[:, None] - right[None]) ** 2).sum(axis=-1)
    apart = np.abs(left_times[:, None] - right_times[None])
    kernel: FloatArray = np.exp(-0.5 * squared / length**2) * (1 - forgetting) ** (apart / 2)
    return kernel


def _factor(kernel: FloatArray, noise: float) -> tuple[FloatArray, bool]:
    return cho_factor(kernel + noise * np.eye(len(kernel)), lower=True)


def _log_likelihood(
    positions: FloatArray,
    times: FloatArray,
    gains: FloatArray,
    length: float,
    forgetting: float,
    noise: float,
) -> float:
    kernel = _kernel(positions, times, positions, times, length, forgetting)
    factor = _factor(kernel, noise)
    fit = gains @ cho_solve(factor, gains)
    return float(-0.5 * fit - np.log(np.diag(factor[0])).sum())
