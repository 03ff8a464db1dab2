"""Knobs of somebody else's training run: found, tried, and then moved."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from metactl.adapters.adaptive import ADAPTIVE_KNOBS, AdaptiveKnob, is_adaptive
from metactl.adapters.base import AttachError, FunctionKnob, KnobAdapter
from metactl.adapters.dropout import DropoutKnob
from metactl.adapters.optimizer import LearningRateKnob, WeightDecayKnob
from metactl.adapters.rope import RopeBaseKnob
from metactl.adapters.span import AttentionSpanKnob, hold_span
from metactl.adapters.trial import length_of, make_trial
from metactl.errors import unknown_name

__all__ = ["KNOWN", "AttachError", "FunctionKnob", "KnobAdapter", "find_adapters", "hold_span"]

KNOWN = (*ADAPTIVE_KNOBS, "learning_rate_multiplier", "weight_decay")

_Maker = Callable[[], KnobAdapter]


def _makers(
    model: nn.Module, optimizer: torch.optim.Optimizer, example: Any, compiled: bool | None
) -> dict[str, _Maker]:
    """What makes each knob's adapter for this model; knobs that it cannot have are not there."""
    trial = make_trial(model, example)
    makers: dict[str, _Maker] = {
        "learning_rate_multiplier": lambda: LearningRateKnob(optimizer),
        "weight_decay": lambda: WeightDecayKnob(optimizer),
    }
    if is_adaptive(model):
        return makers | {
            name: partial(AdaptiveKnob, name, model, trial, optimizer) for name in ADAPTIVE_KNOBS
        }
    longest = length_of(example)
    return makers | {
        "rope_base": lambda: RopeBaseKnob(model, trial, longest),
        "attention_span": lambda: AttentionSpanKnob(model, trial, longest, compiled=compiled),
        "dropout": lambda: DropoutKnob(model, trial, compiled=compiled),
    }


def find_adapters(
    wanted: Sequence[str | KnobAdapter],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    example: Any = None,
    compiled: bool | None = None,
) -> tuple[list[KnobAdapter], dict[str, str]]:
    """The adapters that proved to work, and by name why others did not.

    Args:
        wanted: Names from `KNOWN`, or adapters of the user's own.
        model: The model.
        optimizer: Its optimizer.
        example: An input for the trial; see `metactl.adapters.trial.make_trial`.
        compiled: Whether the model runs through `torch.compile`; by default as it looks.

    Raises:
        AttachError: For what is neither a known name nor an adapter, and for a name twice.
    """
    makers = _makers(model, optimizer, example, compiled)
    found: list[KnobAdapter] = []
    missing: dict[str, str] = {}
    if not isinstance(wanted, Sequence) or isinstance(wanted, str):
        raise AttachError(f"knobs must be a list of names and adapters, got {wanted!r}")
    for entry in wanted:
        if isinstance(entry, str) and entry not in KNOWN:
            raise AttachError(unknown_name("knob", entry, KNOWN))
        if not isinstance(entry, str | KnobAdapter):
            raise AttachError(f"a knob must be a name or an adapter, got {type(entry).__name__}")
    names = [entry if isinstance(entry, str) else entry.knob.name for entry in wanted]
    if len(set(names)) < len(names):
        raise AttachError(f"two of the knobs have the same name: {', '.join(names)}")
    for name, entry in zip(names, wanted, strict=True):
        if isinstance(entry, str) and entry not in makers:
            missing[name] = "no way to move it in this model"
            continue
        adapter: KnobAdapter | None = None
        try:
            adapter = makers[entry]() if isinstance(entry, str) else entry
            adapter.verify()
            found.append(adapter)
        except Exception as error:  # an adapter of the user's own may raise anything
            if adapter is not None:
                adapter.close()
            expected = isinstance(error, AttachError)
            why = str(error) if expected else f"{type(error).__name__}: {error}"
            missing[name] = why
    return found, missing
