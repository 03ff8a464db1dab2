"""Training dynamics as a fixed list of bounded numbers: the observation.

Every signal is a pure function of a `History`, free of the scale of the loss, the length of the
run and the size of the model (logs, ratios, slopes per unit of progress), so that a policy learned
on small runs reads large ones. A signal that a run cannot give is 0 and its group's flag says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metactl.arrays import from_json, to_json
from metactl.errors import unknown_name
from metactl.knobs import FloatArray, KnobSet
from metactl.run import Measurement

BOUND = 10.0
_TINY = 1e-12
FAST, SLOW = 0.05, 0.2  # half-lives, in units of progress
GAP_SCALE = 4.0  # of the generalisation gap

_COLUMNS = (
    *("progress", "train_loss", "train_loss_std", "probe_loss", "gradient_norm"),
    *("update_ratio_median", "update_ratio_max", "tokens_seen", "unique_tokens"),
    *("n_parameters", "relative_cost"),
)


class History:
    """The measurements of N runs since their starts, the newest last.

    Args:
        n_runs: Rows.
        length: Control steps remembered.
        internal: Signals from inside the model that are remembered, too.

    Attributes:
        columns: By field of `Measurement` (and `progress`): `[n_runs, length]`, NaN where
            nothing was measured.
    """

    def __init__(self, n_runs: int, length: int, internal: Sequence[str] = ()) -> None:
        names = (*_COLUMNS, *internal)
        self.columns = {name: np.full((n_runs, length), np.nan) for name in names}

    def reset(self, rows: list[int], start: Mapping[str, FloatArray]) -> None:
        """Forgets some runs and notes what is known before their first step."""
        for name, column in self.columns.items():
            column[rows] = np.nan
            if name in start:
                column[rows, -1] = start[name]

    def append(self, progress: FloatArray, measurement: Measurement) -> None:
        measured = {**measurement.internal, **measurement.arrays(), "progress": progress}
        for name, column in self.columns.items():
            column[:, :-1] = column[:, 1:]
            newest = measured.get(name)
            column[:, -1] = np.nan if newest is None else newest
            if name in ("train_loss", "probe_loss"):  # exactly 0 is a failed report, and no news
                failed = (column[:, -1] == 0) & np.isfinite(column[:, -2])
                column[failed, -1] = column[failed, -2]

    def __len__(self) -> int:
        """How many measurements there are, of runs side by side."""
        return int(np.isfinite(self.columns["progress"][0]).sum())

    def state_dict(self) -> dict[str, Any]:
        """All columns, as JSON values."""
        return {name: to_json(column) for name, column in self.columns.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes in the columns of a history of any length, thinned where they do not fit."""
        n_runs, length = self.columns["progress"].shape
        there = np.shape(state["progress"])[-1]
        if there < 2:  # a run begins, and ends
            raise ValueError(f"a history needs at least 2 columns, got {there}")
        like = np.empty((n_runs, there))
        self.columns = {name: from_json(state[name], like) for name in self.columns}
        while len(self) > length:
            self.thin()
        missing = max(length - there, 0)
        for name, column in self.columns.items():
            padded = np.pad(column, ((0, 0), (missing, 0)), constant_values=np.nan)
            self.columns[name] = padded[:, -length:]

    def thin(self) -> None:
        """Forgets every other measurement of runs side by side, but not how they began.

        Losses are seen at the start or at the first control step, so both stay.
        """
        length = self.columns["progress"].shape[1]
        first = length - len(self)
        kept = sorted({first, first + 1, *range(length - 1, first, -2)})
        for name, column in self.columns.items():
            self.columns[name] = np.full_like(column, np.nan)
            self.columns[name][:, -len(kept) :] = column[:, kept]

    def __getitem__(self, name: str) -> FloatArray:
        return self.columns[name]

    def latest(self, name: str) -> FloatArray:
        return self.columns[name][:, -1]

    def first(self, name: str) -> FloatArray:
        """The earliest finite value of each run, NaN where there is none."""
        column = self.columns[name]
        index = np.isfinite(column).argmax(axis=1)
        return column[np.arange(len(column)), index]


# Building blocks -------------------------------------------------------------------------------


def log_ratio(value: FloatArray, reference: FloatArray) -> FloatArray:
    """log(value / reference), finite for zero."""
    return np.log(np.maximum(value, _TINY)) - np.log(np.maximum(reference, _TINY))


def slope(progress: FloatArray, values: FloatArray, half_life: float) -> FloatArray:
    """Exponentially weighted least-squares slope per unit of progress, `[n_runs]`.

    Weights halve every `half_life` of progress into the past. NaN with fewer than two points.

    Args:
        progress: `[n_runs, length]`.
        values: `[n_runs, length]`, NaN where unknown.
        half_life: In units of progress.
    """
    known = np.isfinite(values) & np.isfinite(progress)
    age = progress[:, -1:] - np.where(known, progress, 0.0)
    weight = np.where(known, np.exp2(-np.minimum(age / half_life, 60.0)), 0.0)
    total = np.maximum(weight.sum(axis=1, keepdims=True), _TINY)
    x, y = np.where(known, progress, 0.0), np.where(known, values, 0.0)
    dx = x - (weight * x).sum(axis=1, keepdims=True) / total
    dy = y - (weight * y).sum(axis=1, keepdims=True) / total
    variance = (weight * dx * dx).sum(axis=1)
    covariance = (weight * dx * dy).sum(axis=1)
    enough = known.sum(axis=1) >= 2
    return np.where(enough, covariance / np.maximum(variance, _TINY), np.nan)


def _log(values: FloatArray) -> FloatArray:
    return np.log(np.maximum(values, _TINY))


# The signals -----------------------------------------------------------------------------------


def progress(history: History) -> FloatArray:
    """Fraction of the budget used, from -1 at the start to 1 at the end."""
    return 2 * history.latest("progress") - 1


def train_level(history: History) -> FloatArray:
    """log(train loss / its starting value)."""
    return log_ratio(history.latest("train_loss"), history.first("train_loss"))


def probe_level(history: History) -> FloatArray:
    """log(probe loss / its starting value)."""
    return log_ratio(history.latest("probe_loss"), history.first("probe_loss"))


def train_slope_fast(history: History) -> FloatArray:
    """Slope of the log train loss at a half-life of 5 % of the run."""
    return slope(history["progress"], _log(history["train_loss"]), FAST)


def train_slope_slow(history: History) -> FloatArray:
    """Slope of the log train loss at a half-life of 20 % of the run."""
    return slope(history["progress"], _log(history["train_loss"]), SLOW)


def probe_slope_fast(history: History) -> FloatArray:
    """Slope of the log probe loss at a half-life of 5 % of the run."""
    return slope(history["progress"], _log(history["probe_loss"]), FAST)


def probe_slope_slow(history: History) -> FloatArray:
    """Slope of the log probe loss at a half-life of 20 % of the run."""
    return slope(history["progress"], _log(history["probe_loss"]), SLOW)


def generalisation_gap(history: History) -> FloatArray:
    """4 log(probe loss / train loss): positive when the run fits its data better than new data."""
    gap = log_ratio(history.latest("probe_loss"), history.latest("train_loss"))
    return GAP_SCALE * gap


def gap_slope(history: History) -> FloatArray:
    """Slope of the generalisation gap at a half-life of 10 % of the run."""
    gap = _log(history["probe_loss"]) - _log(history["train_loss"])
    return slope(history["progress"], gap, 0.1)


def best_distance(history: History) -> FloatArray:
    """10 log(probe loss / best probe loss so far), 0 at the best."""
    losses = history["probe_loss"]
    best = np.min(np.where(np.isfinite(losses), losses, np.inf), axis=1)
    return 10 * log_ratio(history.latest("probe_loss"), best)


def loss_noise(history: History) -> FloatArray:
    """log10 of the minibatch losses' deviation over the drop of the loss per 1 % of the run."""
    relative = history.latest("train_loss_std") / np.maximum(history.latest("train_loss"), _TINY)
    drop = 0.01 * np.abs(train_slope_fast(history)) + 1e-4
    return np.log10(np.maximum(relative, 1e-6) / drop)


def gradient_level(history: History) -> FloatArray:
    """log(gradient norm / its own median over the run so far)."""
    norms = history["gradient_norm"]
    known = np.isfinite(norms)
    filled = np.where(known, norms, np.inf)
    order = np.sort(filled, axis=1)
    middle = np.maximum(known.sum(axis=1) - 1, 0) // 2
    return log_ratio(history.latest("gradient_norm"), order[np.arange(len(order)), middle])


def gradient_trend(history: History) -> FloatArray:
    """Slope of the log gradient norm at a half-life of 10 % of the run."""
    return slope(history["progress"], _log(history["gradient_norm"]), 0.1)


def update_ratio(history: History) -> FloatArray:
    """log10(||update|| / ||weight||), median over tensors, 0 at 1e-3."""
    return np.log10(np.maximum(history.latest("update_ratio_median"), _TINY)) + 3


def update_ratio_peak(history: History) -> FloatArray:
    """log10(||update|| / ||weight||), maximum over tensors, 0 at 1e-2."""
    return np.log10(np.maximum(history.latest("update_ratio_max"), _TINY)) + 2


def data_pressure(history: History) -> FloatArray:
    """log10(parameters / unique tokens): how much memory there is for the data."""
    return log_ratio(history.latest("n_parameters"), history.latest("unique_tokens")) / np.log(10)


def epochs(history: History) -> FloatArray:
    """log10(1 + epochs of the unique tokens seen)."""
    return np.log10(1 + history.latest("tokens_seen") / history.latest("unique_tokens"))


def cost_rate(history: History) -> FloatArray:
    """log2(cost of a step at the knobs in force / at default knobs)."""
    return np.log2(np.maximum(history.latest("relative_cost"), _TINY))


def attention_entropy(history: History) -> FloatArray:
    """Logit (from 1 to 99 %) of the entropy of attention over the largest possible."""
    return _logit(history.latest("attention_entropy"))


def dormant_fraction(history: History) -> FloatArray:
    """Logit (from 1 to 99 %) of the share of units that hardly ever answer (arXiv 2302.12902)."""
    return _logit(history.latest("dormant_fraction"))


def stable_rank(history: History) -> FloatArray:
    """log10 of ||X||_F^2 / ||X||_2^2 of the final representations: 0 where they are all alike."""
    return np.log10(np.maximum(history.latest("stable_rank"), _TINY))


def gradient_noise_scale(history: History) -> FloatArray:
    """log10 of the gradient's noise over its signal in one batch (arXiv 1812.06162)."""
    return np.log10(np.maximum(history.latest("gradient_noise_scale"), _TINY))


def _logit(share: FloatArray) -> FloatArray:
    inside = np.clip(share, 0.01, 0.99)
    return np.log(inside) - np.log1p(-inside)


@dataclass(frozen=True)
class Signal:
    """A named signal and the group whose absence masks it, with what else it takes."""

    function: Callable[[History], FloatArray]
    group: str
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__


UNIVERSAL = (
    Signal(progress, "progress"),
    Signal(train_level, "train_loss"),
    Signal(train_slope_fast, "train_loss"),
    Signal(train_slope_slow, "train_loss"),
    Signal(loss_noise, "train_loss"),
    Signal(probe_level, "probe_loss"),
    Signal(probe_slope_fast, "probe_loss"),
    Signal(probe_slope_slow, "probe_loss"),
    Signal(generalisation_gap, "probe_loss"),
    Signal(gap_slope, "probe_loss"),
    Signal(best_distance, "probe_loss"),
    Signal(gradient_level, "gradient_norm"),
    Signal(gradient_trend, "gradient_norm"),
    Signal(update_ratio, "update_ratio_median"),
    Signal(update_ratio_peak, "update_ratio_median", ("update_ratio_max",)),
    Signal(data_pressure, "unique_tokens", ("n_parameters",)),
    Signal(epochs, "unique_tokens", ("tokens_seen",)),
    Signal(cost_rate, "relative_cost"),
)
INTERNAL = tuple(
    Signal(function, function.__name__)
    for function in (attention_entropy, dormant_fraction, stable_rank, gradient_noise_scale)
)
"""Optional: what runs can read from inside their model; the universal ones need no model."""
INTERNAL_NAMES = tuple(signal.name for signal in INTERNAL)
_ALWAYS = ("progress", "train_loss")
GROUPS = tuple(dict.fromkeys(s.group for s in UNIVERSAL if s.group not in _ALWAYS))
"""Of universal signals that a run may lack; a flag says whether it has them."""
KNOB_ENTRIES = ("position", "last_move", "available")


def is_flag(name: str) -> bool:
    """Whether an entry of an observation, by its name, is 0 or 1."""
    return name.startswith("has/") or name.endswith("/available")


class Codec:
    """The one place where observations are put together, for training and deployment alike.

    An observation is the universal signals, one flag per group (1 where it is measured) and, for
    each knob, its position (-1 to 1), its last move (share of the largest) and its availability.

    Args:
        knobs: The knobs of the run.
        signals: The signals observed, in order.

    Attributes:
        names: Of the entries.
        groups: Of the signals that can be absent, in the order of their flags.
    """

    def __init__(self, knobs: KnobSet, signals: tuple[Signal, ...] = UNIVERSAL) -> None:
        self.knobs, self.signals = knobs, signals
        self.groups = (*GROUPS, *(s.group for s in signals if s.group in INTERNAL_NAMES))
        self.names = (
            *(f"signal/{signal.name}" for signal in signals),
            *(f"has/{group}" for group in self.groups),
            *(f"knob/{knob}/{entry}" for knob in knobs.names for entry in KNOB_ENTRIES),
        )
        self._index = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def observe(
        self,
        history: History,
        positions: FloatArray,
        last_moves: FloatArray,
        available: FloatArray,
        visible: FloatArray | None = None,
    ) -> np.ndarray:
        """Observations `[n_runs, len(self)]`, float32 in [-10, 10].

        Args:
            history: What was measured.
            positions: `[n_runs, n_knobs]` in [0, 1].
            last_moves: `[n_runs, n_knobs]`, share of the largest move.
            available: `[n_runs, n_knobs]`, 1 where a knob can move, else 0.
            visible: `[n_runs, n_groups]`, 0 where a group counts as not measured; all by default.
        """
        n = len(positions)
        out = np.zeros((n, len(self)), dtype=np.float64)
        known = {signal.group: np.isfinite(history.latest(signal.group)) for signal in self.signals}
        for signal, name in ((s, name) for s in self.signals for name in s.needs):
            known[signal.group] &= np.isfinite(history.latest(name))
        for i, group in enumerate(self.groups):
            if visible is not None:
                known[group] = known[group] & (visible[:, i] > 0)
            out[:, len(self.signals) + i] = known[group]
        with np.errstate(all="ignore"):
            for i, signal in enumerate(self.signals):
                out[:, i] = np.where(known[signal.group], signal.function(history), 0.0)
        entries = np.stack((2 * positions - 1, last_moves, np.ones_like(available)), axis=2)
        out[:, -3 * len(self.knobs) :] = (entries * available[:, :, None]).reshape(n, -1)
        return np.nan_to_num(np.clip(out, -BOUND, BOUND), nan=0.0).astype(np.float32)

    def read(self, observation: np.ndarray, name: str) -> np.ndarray:
        """One entry of observations, by name, `[n_runs]`."""
        if name not in self._index:
            raise ValueError(unknown_name("observation", name, self.names))
        return observation[:, self._index[name]]

    def positions(self, observation: np.ndarray) -> FloatArray:
        """Knob positions `[n_runs, n_knobs]` in [0, 1] from observations."""
        entries = observation[:, -3 * len(self.knobs) :].reshape(len(observation), -1, 3)
        return (entries[:, :, 0].astype(np.float64) + 1) / 2
