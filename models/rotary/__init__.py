"""Rotation variants: how positions enter queries and keys, one interface for all of them."""

from models.rotary.base import Rotation, build_rotation, rotation_names
from models.rotary.rope import Rope

__all__ = ["Rope", "Rotation", "build_rotation", "rotation_names"]
