"""Knobs: hyperparameters that can move in flight, and the set that turns actions into values."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from metactl.errors import unknown_name

FloatArray = NDArray[np.float64]

SCALES = ("log2", "linear", "logit", "levels")


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A hyperparameter that can be moved while a run trains.

    A knob has a *position* in [0, 1] on its own scale, and actions move the position; so one
    policy means the same on runs whose bounds differ.

    Args:
        name: By which policies and runs find each other's knobs.
        low: Smallest value.
        high: Largest value.
        default: Value of a run that nobody controls.
        scale: `"log2"`, `"linear"`, `"logit"`, or `"levels"` (the nearest of `levels`).
        levels: For `scale="levels"`: the increasing values there are.
        max_move: Largest move of the position over a whole run, if all actions point one way;
            a control step of a fraction f of the run moves at most `f * max_move`.
        unit: What the value counts, for people.

    Raises:
        ValueError: If the numbers do not fit together.
    """

    name: str
    low: float
    high: float
    default: float
    scale: str = "linear"
    levels: tuple[float, ...] = ()
    max_move: float = 4.0
    unit: str = ""

    def __post_init__(self) -> None:
        def refuse(what: str) -> None:
            raise ValueError(f"Knob {self.name!r}: {what}")

        if not (isinstance(self.name, str) and self.name and self.name.isprintable()):
            refuse("a name must be of printable characters")
        if self.scale not in SCALES:
            refuse(unknown_name("scale", self.scale, SCALES))
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            refuse(f"needs finite low < high, got low={self.low}, high={self.high}")
        if not self.low <= self.default <= self.high:
            refuse(f"default must be in [{self.low:g}, {self.high:g}], got {self.default:g}")
        if self.scale == "log2" and self.low <= 0:
            refuse(f"a log2 scale needs low > 0, got {self.low:g}")
        if self.scale == "logit" and not (0 < self.low and self.high < 1):
            refuse(f"a logit scale needs bounds inside (0, 1), got [{self.low:g}, {self.high:g}]")
        if self.scale == "levels":
            increasing = all(a < b for a, b in pairwise(self.levels))
            if len(self.levels) < 2 or not increasing:
                refuse(f"needs at least two increasing levels, got {self.levels}")
            if (self.low, self.high) != (self.levels[0], self.levels[-1]):
                refuse(f"low and high must be the outer levels, got {self.low:g}, {self.high:g}")
            if self.default not in self.levels:
                refuse(f"default must be one of the levels {self.levels}, got {self.default:g}")
        if not 0 < self.max_move < math.inf:
            refuse(f"max_move must be above 0 and finite, got {self.max_move:g}")

    def value(self, position: FloatArray) -> FloatArray:
        """Values at positions in [0, 1]."""
        position = np.clip(position, 0.0, 1.0)
        if self.scale == "levels":
            index = np.rint(position * (len(self.levels) - 1)).astype(int)
            return np.asarray(self.levels)[index]
        low, high = self._warp(np.array([self.low, self.high]))
        warped = low + position * (high - low)
        if self.scale == "log2":
            value = np.exp2(warped)
        elif self.scale == "logit":
            value = 1 / (1 + np.exp(-warped))
        else:
            value = warped
        value = np.clip(value, self.low, self.high)
        # An untouched knob has exactly its default, not a rounding of it.
        return np.where(position == self.position(self.default), self.default, value)

    def position(self, value: FloatArray | float) -> FloatArray:
        """Positions of values.

        Raises:
            ValueError: If a value is outside the knob's range.
        """
        value = np.asarray(value, dtype=np.float64)
        if not np.all((value >= self.low) & (value <= self.high)):
            raise ValueError(
                f"{self.name} must be in [{self.low:g}, {self.high:g}], got {value.tolist()}"
            )
        if self.scale == "levels":
            index = np.abs(value[..., None] - np.asarray(self.levels)).argmin(axis=-1)
            return index / (len(self.levels) - 1)
        low, high = self._warp(np.array([self.low, self.high]))
        return (self._warp(value) - low) / (high - low)

    def _warp(self, value: FloatArray) -> FloatArray:
        if self.scale == "log2":
            return np.log2(value)
        if self.scale == "logit":
            return np.log(value / (1 - value))
        return value


class KnobSet:
    """An ordered set of knobs; turns actions into positions and positions into values.

    Args:
        knobs: In the order of the action's entries.

    Raises:
        ValueError: If there are none, or two have the same name.

    Example:
        >>> knobs = KnobSet([Knob(name="dropout", low=0.0, high=0.5, default=0.1)])
        >>> start = knobs.default_positions(1)
        >>> moved = knobs.move(start, np.array([[1.0]]), progress=1 / 40)
        >>> knobs.values(moved)["dropout"].round(3).tolist()
        [0.2]
    """

    def __init__(self, knobs: Sequence[Knob]) -> None:
        names = [knob.name for knob in knobs]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"A KnobSet needs knobs with different names, got {names}")
        self.knobs = tuple(knobs)
        self.names = tuple(names)
        self.max_moves = np.array([knob.max_move for knob in knobs])

    def __len__(self) -> int:
        return len(self.knobs)

    def __iter__(self) -> Iterator[Knob]:
        return iter(self.knobs)

    def __getitem__(self, name: str) -> Knob:
        if name not in self.names:
            raise ValueError(unknown_name("knob", name, self.names))
        return self.knobs[self.names.index(name)]

    def default_positions(self, n_runs: int) -> FloatArray:
        """`[n_runs, n_knobs]`."""
        return self.positions({}, n_runs)

    def positions(self, values: Mapping[str, FloatArray | float], n_runs: int) -> FloatArray:
        """Positions `[n_runs, n_knobs]` of values; defaults where a knob has none.

        Raises:
            ValueError: For a name that is no knob, or a value outside its range.
        """
        for name in values:
            self[name]  # refuses unknown names
        columns = [knob.position(values.get(knob.name, knob.default)) for knob in self.knobs]
        return np.stack([np.broadcast_to(column, (n_runs,)) for column in columns], axis=1).copy()

    def move(
        self,
        positions: FloatArray,
        action: FloatArray,
        *,
        progress: float,
        available: FloatArray | None = None,
    ) -> FloatArray:
        """Positions after an action; action 0 moves nothing.

        Args:
            positions: `[n_runs, n_knobs]` in [0, 1].
            action: `[n_runs, n_knobs]`, clipped to [-1, 1]: share of the largest move.
            progress: Fraction of the run that the control step covers.
            available: 1 where a knob may move, else 0.
        """
        step = np.clip(action, -1.0, 1.0) * self.max_moves * progress
        if available is not None:
            step = step * available
        return np.clip(positions + step, 0.0, 1.0)

    def values(self, positions: FloatArray) -> dict[str, FloatArray]:
        """Values by name, each `[n_runs]`."""
        return {knob.name: knob.value(positions[:, i]) for i, knob in enumerate(self.knobs)}
