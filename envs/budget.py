"""What a run may spend: optimizer steps, or the FLOPs that as many would take at full cost."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

BUDGETS = ("steps", "flops")
Rows = slice | list[int]


class Budget:
    """How far runs are, how many optimizer steps each takes next, and its learning rate's course.

    With `"flops"`, a run whose knobs make a step cheaper takes more of them, so that a narrower
    model or a shorter span pays. Control steps then are equal shares of the FLOPs, and progress,
    warm-up and decay follow these.

    Args:
        kind: `"steps"` or `"flops"`.
        full_cost: FLOPs of an optimizer step at full width and span.
        device: Where the state lives.
    """

    def __init__(self, kind: str, full_cost: float, device: torch.device) -> None:
        self._by_flops, self._full_cost = kind == "flops", full_cost
        self._horizon = torch.ones((), dtype=torch.float64, device=device)

    def set_horizon(self, n_steps: int) -> None:
        """Puts another length of the runs in force, in optimizer steps at full cost."""
        self._horizon.fill_(n_steps)

    def shares(
        self, n_steps: int, flops: Float[Tensor, " replica"], cost: Float[Tensor, " replica"]
    ) -> list[tuple[int, Rows]]:
        """Who takes how many optimizer steps in the next control step, the fewest first.

        Args:
            n_steps: Of a control step at full cost.
            flops: Spent so far. What the last control step spent too much, or too little, is made
                up for.
            cost: Of an optimizer step at the knobs in force.
        """
        if not self._by_flops:
            return [(n_steps, slice(None))]
        share = n_steps * self._full_cost
        end = ((flops / share).round() + 1) * share
        counts = ((end - flops) / cost).round().clamp(min=1).long().tolist()
        return [
            (count, [row for row, own in enumerate(counts) if own == count])
            for count in sorted(set(counts))
        ]

    def learning_rate(
        self,
        peak: Float[Tensor, " replica"],
        step: Int[Tensor, " replica"],
        flops: Float[Tensor, " replica"],
        *,
        warmup: float,
        final: float,
    ) -> Float[Tensor, " replica"]:
        """Linear warm-up, then cosine decay.

        Args:
            peak: Of each run.
            step: Optimizer steps taken.
            flops: Spent.
            warmup: Share of the run spent warming up.
            final: Share of the peak at the end.
        """
        elapsed = flops / self._full_cost if self._by_flops else step
        progress = elapsed.double() / self._horizon
        warm_up = (warmup * self._horizon).clamp(min=1.0)
        warm = ((elapsed + 1) / warm_up.float()).clamp(max=1)
        phase = ((progress - warmup) / (1 - warmup)).clamp(0, 1)
        decay = final + (1 - final) * (1 + torch.cos(math.pi * phase)) / 2
        return peak * warm * decay
