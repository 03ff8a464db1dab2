"""What a controlled run writes down: to TensorBoard, or wherever its owner likes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from metactl.adapters import AttachError
from metactl.run import Measurement

logger = logging.getLogger(__name__)

TAGS = {  # of what was measured, by field of `Measurement`
    "train_loss": "train/loss",
    "gradient_norm": "train/gradient_norm",
    "update_ratio_median": "train/update_ratio",
    "probe_loss": "probe/loss",
    "flops": "perf/flops",
}


class Log:
    """Scalars by tag and optimizer step; it never stops a run.

    Args:
        target: A TensorBoard `SummaryWriter`, a function of (tag, value, step), or None.
        strict: Raise what goes wrong, instead of going on without.

    Raises:
        AttachError: If the target is none of these.
    """

    def __init__(self, target: Any, *, strict: bool = False) -> None:
        add_scalar = getattr(target, "add_scalar", target)
        if target is not None and not callable(add_scalar):
            raise AttachError(
                f"log must be a SummaryWriter or a function of (tag, value, step), got "
                f"{type(target).__name__}"
            )
        self._add: Callable[[str, float, int], object] | None = add_scalar
        self._strict = strict

    def write(self, values: Mapping[str, float], step: int) -> None:
        if self._add is None:
            return
        try:
            for tag, value in values.items():
                self._add(tag, value, step)
        except Exception:
            if self._strict:
                raise
            logger.warning("Logging failed; the controller goes on without", exc_info=True)
            self._add = None


def tagged(
    measurement: Measurement, names: Sequence[str], observation: np.ndarray
) -> dict[str, float]:
    """What was measured and the signals made of it, by tag.

    Args:
        measurement: Of one run.
        names: Of the entries of the observation.
        observation: `[n_observations]`.
    """
    arrays = measurement.arrays()
    values = {tag: arrays[field] for field, tag in TAGS.items()}
    seen = {tag: float(value[0]) for tag, value in values.items() if value is not None}
    signals = {
        name: float(value)
        for name, value in zip(names, observation, strict=True)
        if name.startswith("signal/")
    }
    return seen | signals
