"""What a controller decided at a control step of somebody else's training run."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a controller decided at one control step.

    Args:
        step: Optimizer steps taken so far.
        values: By knob: the value decided on, in force from now if `applied`.
        previous: By knob: the value in force until now.
        applied: Whether the values were put in force (mode `"act"`).
        vetoed: Whether the guard decided instead of the controller.
        reason: The guard's, in words; empty where it let the controller decide.
        drive: How far the run is from balance, where set-points say so; in balance up to 1.
    """

    step: int
    values: dict[str, float]
    previous: dict[str, float]
    applied: bool
    vetoed: bool
    reason: str
    drive: float | None = None
