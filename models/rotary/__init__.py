"""Rotation variants: how positions enter attention, one interface for all of them."""

from models.rotary.component import Shape
from models.rotary.config import VARIANTS, RotationConfig, parse_rotation, rotation_names
from models.rotary.frequencies import useful_base
from models.rotary.rotary import Rotary
from models.rotary.turning import LayerTurn, RotaryPass, fold, layer_heads

__all__ = [
    "VARIANTS",
    "LayerTurn",
    "Rotary",
    "RotaryPass",
    "RotationConfig",
    "Shape",
    "fold",
    "layer_heads",
    "parse_rotation",
    "rotation_names",
    "useful_base",
]
