"""What befalls some runs at a time that nobody announces: the trial of a controller's feedback."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models import hashed_integers
from models.device import brought

KINDS = ("learning_rate", "labels", "switch", "kick")
_NONE = -1
_EARLIEST, _LATEST = 0.25, 0.7  # when it begins, in units of progress
_LENGTHS = (0.05, 0.15)  # how long a rate or noise in the labels stays
_SIZES = {"learning_rate": (5.0, 10.0), "labels": (0.3, 0.6), "switch": (1.0, 1.0)}
_SIZES["kick"] = (0.3, 0.8)
_STREAM = 0xD157
_LABEL_STREAM, _KICK_STREAM = 4, 5


class Disturbances:
    """One disturbance, or none, for each run, drawn from its seed.

    - `learning_rate`: 5 to 10 times the rate, for 5 to 15 % of the run.
    - `labels`: 30 to 60 % of the targets become random tokens, as long.
    - `switch`: from then on the run learns, and is judged by, another task.
    - `kick`: every weight is multiplied by 1 + s z, z standard normal, s from 0.3 to 0.8; once.

    Everything else about a run is the same with and without it, so an undisturbed run of the
    same seed is its twin.

    Args:
        kinds: Which of them, equally likely.
        probability: That a run is disturbed.
        n_runs: Rows.
        device: Where the state lives.
    """

    def __init__(
        self, kinds: tuple[str, ...], probability: float, n_runs: int, device: torch.device
    ) -> None:
        self.kinds, self.probability = kinds, probability
        whole = torch.zeros(n_runs, dtype=torch.int64, device=device)
        self.rows: dict[str, Tensor] = {
            "disturbance": whole + _NONE,
            "disturbance_begins": whole.clone(),
            "disturbance_ends": whole.clone(),
            "disturbance_size": whole.double(),
        }

    def draw(self, rows: Sequence[int], seeds: Sequence[int], horizon: int) -> list[int]:
        """Decides what befalls new runs; returns the rows that are to switch to another task."""
        drawn = [self._drawn(seed, horizon) for seed in seeds]
        for name, values in self.rows.items():
            new = torch.tensor([each[name] for each in drawn], dtype=values.dtype)
            values[list(rows)] = brought(new, values.device)
        switch = KINDS.index("switch")
        return [row for row, each in zip(rows, drawn, strict=True) if each["disturbance"] == switch]

    def _drawn(self, seed: int, horizon: int) -> dict[str, int | float]:
        rng = np.random.default_rng([seed, _STREAM])
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        begins = max(1, round(horizon * rng.uniform(_EARLIEST, _LATEST)))
        length = max(1, round(horizon * rng.uniform(*_LENGTHS)))
        befalls = bool(rng.random() < self.probability)
        return {
            "disturbance": KINDS.index(kind) if befalls else _NONE,
            "disturbance_begins": begins,
            "disturbance_ends": begins + (length if kind in ("learning_rate", "labels") else 1),
            "disturbance_size": rng.uniform(*_SIZES[kind]),
        }

    def due(self, step: Int[Tensor, " replica"], n_steps: int) -> set[int]:
        """At which of the next optimizer steps, counted from 0, some run switches or is kicked."""
        kinds, ahead = self.rows["disturbance"], self.rows["disturbance_begins"] - step
        once = (kinds == KINDS.index("switch")) | (kinds == KINDS.index("kick"))
        return set(ahead[once & (ahead >= 0) & (ahead < n_steps)].tolist())

    def active(self, kind: str, step: Int[Tensor, " replica"]) -> Bool[Tensor, " replica"]:
        """Where a kind of disturbance is at work before the optimizer step of this index."""
        rows = self.rows
        during = (rows["disturbance_begins"] <= step) & (step < rows["disturbance_ends"])
        return during & (rows["disturbance"] == KINDS.index(kind))

    def befallen(self, step: Int[Tensor, " replica"]) -> Bool[Tensor, " replica"]:
        """Where a disturbance began before the optimizer step of this index."""
        rows = self.rows
        return (rows["disturbance"] != _NONE) & (rows["disturbance_begins"] < step)

    def rate(self, step: Int[Tensor, " replica"]) -> Float[Tensor, " replica"]:
        """The factor of each run's learning rate."""
        size = self.rows["disturbance_size"]
        return torch.where(self.active("learning_rate", step), size, torch.ones_like(size))

    def spoil(
        self,
        targets: Int[Tensor, "replica batch seq"],
        step: Int[Tensor, " replica"],
        seeds: Int[Tensor, " replica"],
        vocabulary: int,
    ) -> Int[Tensor, "replica batch seq"]:
        """Targets, some of them random where the labels are disturbed."""
        place = torch.arange(targets[0].numel(), device=targets.device).view(1, -1)
        keys = ((seeds ^ (_LABEL_STREAM << 56))[:, None], step[:, None], place)
        tokens = hashed_integers(vocabulary, *keys).view_as(targets)
        chance = hashed_integers(1 << 24, *keys, torch.ones_like(place)).view_as(targets)
        share = self.rows["disturbance_size"] * self.active("labels", step)
        return torch.where(chance < (1 << 24) * share[:, None, None], tokens, targets)

    def kick_(
        self,
        weights: Float[Tensor, "replica weight"],
        step: Int[Tensor, " replica"],
        seeds: Int[Tensor, " replica"],
    ) -> None:
        """Shakes the weights of the runs that are kicked before this step, in place."""
        for row in self.active("kick", step).nonzero().flatten().tolist():
            seed = (int(seeds[row]) ^ (_KICK_STREAM << 56)) & (2**63 - 1)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(weights.shape[1], generator=generator, dtype=torch.float64)
            size = float(self.rows["disturbance_size"][row])
            weights[row] *= (1 + size * noise).to(weights)
