"""Homeostasis as a measured quantity: vitals, their set-points, and the drive away from them.

A *vital* is a signal of a run's health that no loss says. Its *set-point* is where it is in healthy
runs (those of the best static settings), and how widely it lies there, both as a function of
progress. The *drive* is one number for how far all vitals together are from their set-points,
D = sqrt(sum_i w_i z_i^4) with z_i the distance beyond the half-width, in half-widths (Keramati and
Gutkin 2014, doi:10.7554/eLife.04811, with n = 4, m = 2). A run is in balance where D <= 1.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from pydantic.dataclasses import dataclass

from metactl.arrays import Remembers
from metactl.config import STRICT
from metactl.knobs import FloatArray
from metactl.signals import INTERNAL, UNIVERSAL, Codec

VITALS = (
    "update_ratio",
    "generalisation_gap",
    "gradient_trend",
    "loss_noise",
    "attention_entropy",  # from here on where they are measured
    "dormant_fraction",
)
BALANCE = 1.0  # drive up to which a run is in balance
HELD = 3  # control steps in balance that count as settled
_BINS = 10
_WIDTH = 1e-3  # of a set-point, at least
_WIDTHS = {"attention_entropy": 0.1, "dormant_fraction": 1.0}  # logits: a unit more is no change
_GROUPS = {signal.name: signal.group for signal in (*UNIVERSAL, *INTERNAL)}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SetPoints:
    """Where the vitals of healthy runs are, over a run.

    Args:
        progress: Centres of the bins of progress, from 0 to 1, `[n_bins]`.
        medians: By vital, `[n_bins]`.
        half_widths: By vital: half of the range from the 10th to the 90th percentile.
    """

    progress: tuple[float, ...]
    medians: dict[str, tuple[float, ...]]
    half_widths: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        if set(self.medians) != set(self.half_widths):
            raise ValueError("set-points need a median and a half-width of every vital")
        if any(later <= earlier for earlier, later in pairwise(self.progress)):
            raise ValueError(f"set-points need increasing bins of progress, got {self.progress}")
        for name, widths in self.half_widths.items():
            if not len(self.progress) == len(widths) == len(self.medians[name]) > 0:
                raise ValueError(f"set-point {name!r} must have one value per bin of progress")
            if not all(0 < width < math.inf for width in widths):
                raise ValueError(f"set-point {name!r} must have finite half-widths above 0")

    def drive(self, observations: np.ndarray, names: Sequence[str]) -> FloatArray:
        """How far runs are from balance; a vital that is not measured counts as in balance.

        Args:
            observations: `[..., n_observations]`.
            names: Of their entries.

        Returns:
            The drive, `[...]`, at least 0.
        """
        seen = np.asarray(observations, dtype=np.float64)
        index = {name: i for i, name in enumerate(names)}
        progress = (seen[..., index["signal/progress"]] + 1) / 2
        total = np.zeros(progress.shape)
        for name in self.medians:
            if f"signal/{name}" not in index:
                continue
            median = np.interp(progress, self.progress, self.medians[name])
            width = np.interp(progress, self.progress, self.half_widths[name])
            beyond = np.abs(seen[..., index[f"signal/{name}"]] - median) / width - 1
            flag = index.get(f"has/{_GROUPS.get(name)}")
            known = 1.0 if flag is None else seen[..., flag] > 0
            total += known * np.maximum(beyond, 0.0) ** 4 / len(self.medians)
        return np.sqrt(total)


def estimate(observations: np.ndarray, names: Sequence[str]) -> SetPoints:
    """Set-points from healthy runs, of the vitals that they measure.

    Args:
        observations: After each control step of each run, `[n_runs, n_control_steps, n_entries]`.
        names: Of the entries.
    """
    seen = np.asarray(observations, dtype=np.float64)
    index = {name: i for i, name in enumerate(names)}
    progress = (seen[..., index["signal/progress"]] + 1) / 2
    n_bins = min(_BINS, seen.shape[1])
    bins = np.clip(np.ceil(n_bins * progress - 1e-4) - 1, 0, n_bins - 1)  # (0, 0.1] is bin 0
    medians, half_widths = {}, {}
    for name in VITALS:
        if f"signal/{name}" not in index:
            continue
        flag = index.get(f"has/{_GROUPS[name]}")
        if flag is not None and not (seen[..., flag] > 0).all():
            continue  # these runs cannot say
        values = seen[..., index[f"signal/{name}"]]
        low, middle, high = np.array(
            [np.quantile(values[bins == i], (0.1, 0.5, 0.9)) for i in range(n_bins)]
        ).T
        least = _WIDTHS.get(name, _WIDTH)
        medians[name] = tuple(middle.tolist())
        half_widths[name] = tuple(np.maximum((high - low) / 2, least).tolist())
    centres = tuple(((np.arange(n_bins) + 0.5) / n_bins).tolist())
    return SetPoints(progress=centres, medians=medians, half_widths=half_widths)


def homeostasis_index(drive: FloatArray) -> FloatArray:
    """Share of the control steps in balance, `[..., n_control_steps]` -> `[...]`."""
    return (np.asarray(drive) <= BALANCE).mean(axis=-1)


class Balance(Remembers):
    """What a board shows of homeostasis while runs go on: means over them, by tag.

    `homeostasis/drive` (where there are set-points), `homeostasis/index` (so far) and
    `homeostasis/control_effort` (so far).

    Args:
        set_points: Of healthy runs, if known.
        codec: Of the observations.
        positions: Where the knobs begin, `[n_runs, n_knobs]`.
    """

    memory = ("_n_steps", "_balanced", "_effort", "_positions")

    def __init__(self, set_points: SetPoints | None, codec: Codec, positions: FloatArray) -> None:
        self._set_points, self._codec = set_points, codec
        self._positions = np.array(positions, dtype=np.float64)
        self._n_steps, self._balanced, self._effort = 0, np.zeros(len(positions)), 0.0
        self.drive: FloatArray | None = None  # after the last control step, `[n_runs]`

    def read(self, observation: np.ndarray) -> dict[str, float]:
        """Takes in what was observed after a control step, `[n_runs, n_entries]`."""
        positions = self._codec.positions(observation)
        self._effort += float(np.abs(positions - self._positions).sum(axis=1).mean())
        self._positions, self._n_steps = positions, self._n_steps + 1
        found = {"homeostasis/control_effort": self._effort}
        if self._set_points is not None:
            self.drive = self._set_points.drive(observation, self._codec.names)
            self._balanced = self._balanced + (self.drive <= BALANCE)
            found["homeostasis/drive"] = float(self.drive.mean())
            found["homeostasis/index"] = float(self._balanced.mean() / self._n_steps)
        return found


def settling_steps(drive: FloatArray, onset: int) -> int:
    """Control steps from a disturbance until a run that left its balance holds it for `HELD` steps.

    Args:
        drive: After each control step of one run, `[n_control_steps]`.
        onset: Index of the control step in which it began.

    Returns:
        0 if the run never left its balance; as many as are left of the run, if it never settles.
    """
    balanced = np.asarray(drive)[onset:] <= BALANCE
    if balanced.all():
        return 0
    for start in range(int(balanced.argmin()), len(balanced) - HELD + 1):
        if balanced[start : start + HELD].all():
            return start
    return len(balanced)


def control_effort(positions: FloatArray) -> FloatArray:
    """How far all knobs together travelled, in whole ranges: `[..., step, knob]` -> `[...]`."""
    return np.abs(np.diff(positions, axis=-2)).sum(axis=(-2, -1))
