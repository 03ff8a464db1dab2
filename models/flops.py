"""Analytic cost of a training step at the knobs in force."""

import torch
from torch import Tensor

from models.config import TransformerConfig


def attended_pairs(seq: int, reach: Tensor) -> Tensor:
    """Query-key pairs with a causal distance in [0, reach), for one sequence."""
    reach = reach.ceil().clamp(1, seq)
    return reach * (reach + 1) / 2 + (seq - reach) * reach


def training_flops(
    config: TransformerConfig, *, width: float | Tensor, span: float | Tensor, batch: int, seq: int
) -> Tensor:
    """Floating-point operations of one optimizer step of one replica, forward and backward.

    Counts the matrix products (a multiply-add is 2 operations; backward costs twice forward) of
    what is active at a width, with attention over the pairs that the span can reach; what a
    rotation adds is left out.

    Args:
        config: The shape at full width.
        width: Active fraction of the width, in (0, 1]; a number, or one for each replica.
        span: Attention span in tokens, likewise.
        batch: Sequences per optimizer step.
        seq: Tokens per sequence.

    Returns:
        Float64, shaped like what was given.
    """
    width, span = (torch.as_tensor(x, dtype=torch.float64) for x in (width, span))
    reach = attended_pairs(seq, span + config.ramp)
    attention = config.n_layers * 2 * config.d_model * width * reach
    return 3 * 2 * batch * (seq * matrix_weights(config, width) + attention)


def matrix_weights(config: TransformerConfig, width: Tensor | float = 1.0) -> Tensor | float:
    """Weights of the matrices that every token passes, at a width; rotations are left out."""
    d, hidden = config.d_model * width, config.hidden_units * width
    n_inputs = 2 if config.feed_forward == "swiglu" else 1
    return config.n_layers * (4 * d * d + (n_inputs + 1) * d * hidden) + d * config.vocab_size
