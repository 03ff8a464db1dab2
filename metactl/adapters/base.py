"""What moves one knob of somebody else's training run."""

import abc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metactl.knobs import Knob

_INSIDE = 0.37  # a position between the ends, where whole numbers are rare


class AttachError(ValueError):
    """A training run that cannot be controlled as asked; the message says why."""


class KnobAdapter(abc.ABC):
    """Reads and writes one knob in a live training run.

    `verify` is called once, before the knob is used: it shows that a move has an effect and that
    the way back is exact.
    """

    knob: Knob

    @abc.abstractmethod
    def read(self) -> float:
        """The value in force."""

    @abc.abstractmethod
    def write(self, value: float) -> None:
        """Puts a value in force."""

    @abc.abstractmethod
    def restore(self) -> None:
        """Puts everything back to what it was before the adapter came, bit for bit."""

    @abc.abstractmethod
    def verify(self) -> None:
        """Moves the knob there and back.

        Raises:
            AttachError: If nothing changes, or if the way back is not exact.
        """

    def close(self) -> None:
        """Lets go of the run; the value in force stays."""
        return  # most hold nothing

    def far(self) -> float:
        """A value clearly different from the one in force."""
        low, high = self.knob.low, self.knob.high
        position = self.knob.position(min(max(self.read(), low), high))
        return float(self.knob.value(position * 0 + (1.0 if position < 0.5 else 0.0)))


class ModelKnob(KnobAdapter):
    """A knob whose effect is seen in the model's output.

    Args:
        model: The model.
        trial: Computes the model's output on a fixed input, leaving no trace.
    """

    def __init__(self, model: nn.Module, trial: Callable[[], Tensor]) -> None:
        self.model, self.trial = model, trial

    def verify(self) -> None:
        first = self.trial()
        try:
            self.write(self.far())
            moved = self.trial()
        finally:
            self.restore()
        if same(first, moved):
            raise AttachError("moving it does not change the model's output")
        if not same(first, self.trial()):
            raise AttachError("after moving it back the model's output is not what it was")


class FunctionKnob(KnobAdapter):
    """A knob of the user's own: two functions.

    `attach` writes two values on trial, which must be read back (to 1e-6 of them), and then the one
    that was there. Whether a value has an effect is not tried.

    Args:
        knob: Name, range and scale.
        read: Returns the value in force.
        write: Puts a value in force.

    Example:
        >>> state = {"noise": 0.1}
        >>> knob = Knob(name="noise", low=0.0, high=1.0, default=0.1)
        >>> adapter = FunctionKnob(
        ...     knob, lambda: state["noise"], lambda value: state.update(noise=value)
        ... )
        >>> adapter.write(0.5)
        >>> adapter.read()
        0.5
    """

    def __init__(
        self, knob: Knob, read: Callable[[], float], write: Callable[[float], object]
    ) -> None:
        self.knob, self._read, self._write = knob, read, write
        self._original = self.read()

    def read(self) -> float:
        return float(self._read())

    def write(self, value: float) -> None:
        self._write(value)

    def restore(self) -> None:
        self._write(self._original)

    def verify(self) -> None:
        for there in (self.far(), float(self.knob.value(np.asarray(_INSIDE)))):
            try:
                self.write(there)
                read = self.read()
            finally:
                self.restore()
            if abs(read - there) > 1e-6 * max(abs(there), 1e-6):
                raise AttachError(f"{there:g} was written and {read:g} read back")
        if self.read() != self._original:
            raise AttachError("moving it back does not restore it")


def same(a: Tensor, b: Tensor) -> bool:
    """Bit-for-bit equality; NaN equals NaN."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers for compilation and data parallelism."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.parallel.DistributedDataParallel | nn.DataParallel
        ):
            inner = model.module
        if inner is None:
            return model
        model = inner


def configs_of(model: nn.Module) -> list[Any]:
    """The configs of a model and of those inside it, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if config is not None}.values())


def longest_sequence(config: Any, *limits: float | None) -> float | None:
    """The smallest of some limits and of what a transformers config allows, in tokens."""
    allowed = getattr(config, "max_position_embeddings", None)
    return min((float(limit) for limit in (*limits, allowed) if limit), default=None)


def is_compiled(model: nn.Module, said: bool | None = None) -> bool:
    """Whether a part of the model runs through `torch.compile`: as it looks, unless it is said."""
    if said is not None:
        return said
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
