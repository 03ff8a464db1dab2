"""Numbers and arrays as JSON values and back, exactly; JSON has no word for infinity or NaN."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def to_json(value: Any) -> Any:
    """An array or number as lists, numbers and, where not finite, the strings of `str`."""
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(value: Any, like: Any) -> Any:
    """The inverse of `to_json`.

    Args:
        value: What `to_json` returned.
        like: Something of the type, dtype and shape that the result must have.

    Raises:
        ValueError: If the value does not fit.
    """
    if not isinstance(like, np.ndarray):
        return type(like)(value)
    array = np.asarray(value)
    if array.shape != like.shape:
        raise ValueError(f"expected numbers of shape {like.shape}, got {array.shape}")
    return array.astype(like.dtype)


class Remembers:
    """What goes on where it was: `memory` names the attributes that hold what it has seen, arrays
    or plain numbers.
    """

    memory: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as JSON values."""
        return {name: to_json(getattr(self, name)) for name in self.memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a state in force: all that `memory` names or, where that does not fit, nothing."""
        read = {name: from_json(state[name], getattr(self, name)) for name in self.memory}
        for name, value in read.items():
            setattr(self, name, value)


def six_digits(value: Any) -> Any:
    """Plain values with six digits of every number; what is not finite, JSON's null."""
    if isinstance(value, dict):
        return {name: six_digits(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [six_digits(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
