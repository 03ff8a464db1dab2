"""Knobs of models that hold their knobs themselves, as the adaptive transformer does."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from metactl.adapters.base import AttachError, ModelKnob, unwrapped
from metactl.knobs import Knob

ADAPTIVE_KNOBS = (  # `models.KNOB_NAMES`, which this package may not import
    "rope_base",
    "attention_span",
    "embedding_width",
    "dropout",
    "position_scale",
    "rotation_strength",
    "orthogonality_weight",
)
_FADE_STEPS = 10  # optimizer steps of a change of width
_PRECISION = 1e-5  # relative; what single precision makes of a value


def is_adaptive(model: nn.Module) -> bool:
    """Whether the model holds its knobs: `set_knobs`, `knobs` and a config with `knob_ranges`."""
    inner = unwrapped(model)
    return hasattr(inner, "set_knobs") and hasattr(getattr(inner, "config", None), "knob_ranges")


class AdaptiveKnob(ModelKnob):
    """Moves one knob of all replicas of an adaptive transformer.

    Values are buffers of the model, so a checkpoint carries them. A change of width fades in over
    ten optimizer steps. An orthogonality weight acts where the loss includes `model.penalty()`.

    Args:
        name: From `ADAPTIVE_KNOBS`.
        model: The model.
        trial: Computes the model's output in the given mode.
        optimizer: Whose steps fade a change of width.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        trial: Callable[[bool], Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        super().__init__(model, lambda: self._output(trial))
        self._name = name
        self._inner = cast(Any, unwrapped(model))
        fields = self._inner.config.knob_ranges()[name]
        values = self._inner.knobs.values()[name].double().unique()
        if len(values) > 1:
            raise AttachError(f"it differs among replicas or layers: {values.tolist()}")
        value = float(values)
        self._written = min(max(value, fields["low"]), fields["high"])
        if not self._is(value):
            raise AttachError(
                f"it must be in [{fields['low']:g}, {fields['high']:g}], the model has {value:g}"
            )
        self.knob = Knob(name=name, default=self._written, **fields)
        self._first = self._written, self._storage()
        self._moved, self._handle = False, None
        if name == "embedding_width":
            self._handle = optimizer.register_step_post_hook(lambda *_: self._fade())

    def read(self) -> float:
        value = float(self._inner.knobs.values()[self._name].flatten()[0])
        return self._written if self._is(value) else value

    def write(self, value: float) -> None:
        self._inner.set_knobs({self._name: value})
        self._written, self._moved = float(value), True

    def restore(self) -> None:
        self._moved = False
        self._written, values = self._first
        for name, tensor in self._inner.knobs.storage([self._name]).items():
            tensor.copy_(values[name])
        self._inner.refresh()

    def verify(self) -> None:
        try:
            super().verify()
        finally:
            self.restore()  # the gates too, which a trial opens and closes at once

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            if self._moved:
                self._settle()

    def _is(self, value: float) -> bool:
        return math.isclose(value, self._written, rel_tol=_PRECISION, abs_tol=_PRECISION)

    def _storage(self) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = self._inner.knobs.storage([self._name])
        return {name: tensor.clone() for name, tensor in stored.items()}

    def _fade(self) -> None:
        if self._moved:  # else the gates are their owner's
            self._inner.knobs.step_gates(1 / _FADE_STEPS)

    def _settle(self) -> None:
        self._inner.knobs.settle_gates(list(range(self._inner.n_replicas)))

    def _output(self, trial: Callable[[bool], Tensor]) -> Tensor:
        self._settle()
        output = trial(self._name == "dropout")
        with torch.no_grad():
            return torch.cat((output, self._inner.penalty().double().flatten()))
