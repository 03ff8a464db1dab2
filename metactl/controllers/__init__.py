"""Controllers: what turns observations into knob moves, learned or not."""

from metactl.controllers.base import BaseController
from metactl.controllers.guard import Guard
from metactl.controllers.learned import Learned
from metactl.controllers.random import RandomMoves
from metactl.controllers.replay import Replay
from metactl.controllers.responsive import Responsive
from metactl.controllers.rules import GapDriven, Plateau, Together
from metactl.controllers.schedule import Schedule
from metactl.controllers.static import Static
from metactl.controllers.swapped import WithSignalsOf

__all__ = [
    "BaseController",
    "GapDriven",
    "Guard",
    "Learned",
    "Plateau",
    "RandomMoves",
    "Replay",
    "Responsive",
    "Schedule",
    "Static",
    "Together",
    "WithSignalsOf",
]
