"""The adaptive transformer: N replicas in one tensor program, knobs that move while it trains."""

from models.config import TransformerConfig
from models.flops import training_flops
from models.knobs import KNOB_NAMES
from models.loss import cross_entropy
from models.noise import Noise, hashed_integers
from models.transformer import AdaptiveTransformer

__all__ = [
    "KNOB_NAMES",
    "AdaptiveTransformer",
    "Noise",
    "TransformerConfig",
    "cross_entropy",
    "hashed_integers",
    "training_flops",
]
