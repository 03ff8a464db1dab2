"""metactl: a learned controller that adjusts a transformer's hyperparameters while it trains."""

from typing import TYPE_CHECKING, Any

from metactl.knobs import Knob, KnobSet
from metactl.policy import Policy, PolicyError
from metactl.run import Diverged, Measurement, SingleRuns, TrainingRun

if TYPE_CHECKING:
    from metactl.adapters import AttachError, FunctionKnob, KnobAdapter
    from metactl.attach import Controller, Decision

__all__ = [
    "AttachError",
    "Controller",
    "Decision",
    "Diverged",
    "FunctionKnob",
    "Knob",
    "KnobAdapter",
    "KnobSet",
    "Measurement",
    "Policy",
    "PolicyError",
    "SingleRuns",
    "TrainingRun",
]

_WITH_TORCH = {
    "AttachError": "metactl.adapters",
    "Controller": "metactl.attach",
    "Decision": "metactl.attach",
    "FunctionKnob": "metactl.adapters",
    "KnobAdapter": "metactl.adapters",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Imports what needs torch when it is asked for: the command line stays quick."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module 'metactl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WITH_TORCH[name]), name)
