"""Dropout of any module tree: every dropout module, and probabilities kept as attributes."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from metactl.adapters.base import AttachError, ModelKnob, configs_of, is_compiled, unwrapped
from metactl.knobs import Knob

_NAMES = (  # of probabilities, in modules and in configs
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_dropout",
    "attn_pdrop",
    "dropout",
    "dropout_p",
    "dropout_prob",
    "dropout_rate",
    "embd_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
    "residual_dropout",
)


class DropoutKnob(ModelKnob):
    """Moves all dropout probabilities together, keeping their proportions.

    The value is the largest probability. Where all are 0, all get the value. Entries of the
    `config` of a model, or of one inside it, follow, so that a saved checkpoint carries the value
    in force. Under `torch.compile`, where every new probability compiles anew, there are only a few
    levels.

    Args:
        model: The model.
        trial: Computes the model's output in the given mode.
        compiled: Whether it runs through `torch.compile`; by default as it looks.
    """

    def __init__(
        self, model: nn.Module, trial: Callable[[bool], Tensor], *, compiled: bool | None = None
    ) -> None:
        super().__init__(model, lambda: trial(True))
        inner = unwrapped(model)
        modules = list(_module_places(inner))
        if not modules:
            raise AttachError("the model has no dropout module and no dropout attribute")
        configs = configs_of(inner)
        self._lead = modules[0]
        for place in modules:
            if getattr(*place) > getattr(*self._lead):
                self._lead = place
        written = [(c, name) for c in configs for name in _NAMES if _is_settable(c, name)]
        places = [*modules, *written]
        self._places = [(owner, name, getattr(owner, name)) for owner, name in places]
        self._first = float(getattr(*self._lead))
        self.knob = _knob(self._first, is_compiled(model, compiled))

    def read(self) -> float:
        return float(getattr(*self._lead))

    def write(self, value: float) -> None:
        for owner, name, first in self._places:
            share = first / self._first if self._first else 1.0
            setattr(owner, name, min(value * share, 1.0))

    def restore(self) -> None:
        for owner, name, first in self._places:
            setattr(owner, name, first)


def _knob(default: float, compiled: bool) -> Knob:
    if not compiled:
        return Knob(name="dropout", low=0.0, high=max(0.6, default), default=default)
    if default == 0:
        levels = (0.0, 0.15, 0.3)
    elif default < 0.6:
        levels = (0.0, default, min(2 * default, 0.6))
    else:
        levels = (0.0, default / 2, default)
    return Knob(
        name="dropout", low=0.0, high=levels[-1], default=default, scale="levels", levels=levels
    )


def _module_places(model: nn.Module) -> Iterator[tuple[Any, str]]:
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            yield module, "p"
        else:
            for name in _NAMES:
                if _is_settable(module, name):
                    yield module, name


def _is_settable(owner: Any, name: str) -> bool:
    """Whether it is a probability that can be moved; a property or a frozen config cannot."""
    value = getattr(owner, name, None)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        return False
    try:
        setattr(owner, name, value)
    except (AttributeError, TypeError):
        return False
    return True
