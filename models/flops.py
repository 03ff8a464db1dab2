"""Analytic cost of a training step at the knobs in force."""

import math

from models.config import TransformerConfig


def attended_pairs(seq: int, reach: float) -> float:
    """Query-key pairs with a causal distance in [0, reach), for one sequence."""
    reach = min(seq, max(1, math.ceil(reach)))
    return reach * (reach + 1) / 2 + (seq - reach) * reach


def training_flops(
    config: TransformerConfig, *, width: float, span: float, batch: int, seq: int
) -> float:
    """Floating-point operations of one optimizer step of one replica, forward and backward.

    Counts the matrix products (a multiply-add is 2 operations; backward costs twice forward) of
    what is active at a width, with attention over the pairs that the span can reach; what a
    rotation adds is left out.

    Args:
        config: The shape at full width.
        width: Active fraction of the width, in (0, 1].
        span: Attention span in tokens.
        batch: Sequences per optimizer step.
        seq: Tokens per sequence.
    """
    d, hidden = config.d_model * width, config.hidden_units * width
    n_inputs = 2 if config.feed_forward == "swiglu" else 1
    weights = config.n_layers * (4 * d * d + (n_inputs + 1) * d * hidden) + d * config.vocab_size
    attention = config.n_layers * 2 * d * attended_pairs(seq, span + config.ramp)
    return 3 * 2 * batch * (seq * weights + attention)
