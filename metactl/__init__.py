"""metactl: a learned controller that adjusts a transformer's hyperparameters while it trains."""

from metactl.knobs import Knob, KnobSet
from metactl.policy import Policy, PolicyError
from metactl.run import Diverged, Measurement, SingleRuns, TrainingRun

__all__ = [
    "Diverged",
    "Knob",
    "KnobSet",
    "Measurement",
    "Policy",
    "PolicyError",
    "SingleRuns",
    "TrainingRun",
]
