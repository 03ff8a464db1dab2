"""What is trained, how long, and with which rotation.

Sizes and learning rates were tuned on plain RoPE alone, until it beat chance clearly on every
task within seconds; all variants then get the same. The base of 100 stands to these contexts as
the usual 10 000 to 2048 tokens (see `models.rotary.useful_base`); RoPE with 10 000 is an arm too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from envs.tasks import digits, recall, waves
from models import TransformerConfig
from models.rotary import VARIANTS

BASE = 100.0
USUAL_BASE = 10_000.0
LENGTHS = (1, 2, 4)  # of recall's test sequences, in training contexts
LONGER = (0.8, 1.25, 1.6, 2.2)  # plain RoPE with so many times the steps, for equal time
SCALINGS = ("linear", "ntk", "dynamic", "yarn")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How models learn one task.

    Args:
        vocab_size: Distinct tokens.
        seq: Tokens per training sequence.
        steps: Optimizer steps.
        batch_size: Sequences per step and replica.
        learning_rate: Peak; linear warm-up over a tenth, then cosine decay to a tenth.
        seconds: Of one training of eight replicas of plain RoPE, roughly, on one core.
        longest: Longest test sequence, in training sequences.
        n_layers: Blocks.
    """

    vocab_size: int
    seq: int
    steps: int
    batch_size: int
    learning_rate: float
    seconds: float
    longest: int = 1
    n_layers: int = 2

    def model(self, arm: str) -> TransformerConfig:
        """The shape of an arm's model."""
        rotation: Mapping[str, Any] = {"variant": variant_of(arm), "trained_context": self.seq}
        return TransformerConfig(
            vocab_size=self.vocab_size,
            context=self.seq * self.longest,
            n_layers=self.n_layers,
            rotation=rotation,
            rope_base=USUAL_BASE if arm == USUAL else BASE,
            **SHAPE,
        )


SHAPE: dict[str, Any] = {
    "d_model": 48,
    "n_heads": 3,
    "d_ff": 96,
    "width_levels": (1.0,),
}
RECIPES = {
    "text": Recipe(
        vocab_size=256, seq=32, steps=400, batch_size=8, learning_rate=8e-3, seconds=12.0
    ),
    "recall": Recipe(
        vocab_size=recall.VOCABULARY,
        seq=24,
        steps=600,
        batch_size=8,
        learning_rate=4e-3,
        seconds=11.0,
        longest=LENGTHS[-1],
    ),
    "digits": Recipe(
        vocab_size=digits.VOCABULARY,
        seq=digits.N_PIXELS,
        steps=300,
        batch_size=8,
        learning_rate=3e-3,
        seconds=14.0,
    ),
    "waves": Recipe(
        vocab_size=waves.VOCABULARY,
        seq=48,
        steps=400,
        batch_size=8,
        learning_rate=1e-2,
        seconds=13.0,
    ),
}
USUAL = f"rope with base {USUAL_BASE:.0f}"
LONGER_ARMS = {f"rope, {factor:g} times the steps": factor for factor in LONGER}


def variant_of(arm: str) -> str:
    """The name of an arm's rotation."""
    return arm if arm in VARIANTS else "rope"
