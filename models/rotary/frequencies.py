"""How fast each pair of channels turns: bases, learned changes, and longer contexts."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

SCALINGS = ("linear", "ntk", "dynamic", "yarn")
_YARN_FAST, _YARN_SLOW = 32.0, 1.0  # turns within the trained context: kept; slowed down
_XPOS_OFFSET, _XPOS_LENGTH = 0.4, 512.0  # the paper's gamma, and tokens per factor
_XPOS_LARGEST = 1e30  # gain that float32 holds, with room for what it multiplies


def useful_base(context: int) -> float:
    """About the smallest base with which attention tells near from far over a context.

    A fit of the bounds of arXiv 2405.14591: 37 at 64 tokens, 3374 at 1024.
    """
    return 0.0424 * context**1.628


def inverse_frequencies(
    log_base: Float[Tensor, "*shape"], n_channels: int
) -> Float[Tensor, "*shape pair"]:
    """inv_freq_i = base^(-2i / n_channels), radians per token."""
    exponents = torch.arange(0, n_channels, 2, device=log_base.device, dtype=log_base.dtype)
    return torch.exp(-log_base[..., None] * exponents / n_channels)


def scaled_frequencies(
    log_base: Float[Tensor, "*shape"],
    n_channels: int,
    scaling: str | None,
    factor: float,
    trained_context: int,
    seq: int,
) -> Float[Tensor, "*shape pair"]:
    """Inverse frequencies for sequences longer than those trained on.

    `linear` (arXiv 2306.15595) slows all pairs by `factor`; `ntk` raises the base so that the
    slowest pair slows by `factor` and the fastest stays; `dynamic` does so by what the sequence
    at hand needs; `yarn` (arXiv 2309.00071) slows the pairs that turn less than once in the
    trained context, keeps those that turn 32 times, and blends in between.

    Args:
        log_base: Log of the bases.
        n_channels: Channels that turn.
        scaling: One of `SCALINGS`, or `None`.
        factor: How many times longer sequences get.
        trained_context: Tokens per sequence in training.
        seq: Tokens of the sequence at hand; matters to `dynamic` only.
    """
    if scaling == "linear":
        return inverse_frequencies(log_base, n_channels) / factor
    if scaling in ("ntk", "dynamic"):
        if scaling == "dynamic":
            factor = factor * max(seq, trained_context) / trained_context - (factor - 1)
        stretch = math.log(factor) * n_channels / max(n_channels - 2, 1)
        return inverse_frequencies(log_base + stretch, n_channels)
    plain = inverse_frequencies(log_base, n_channels)
    if scaling == "yarn":

        def pair_that_turns(times: float) -> Tensor:
            """Which pair (a fraction of an index) turns so often within the trained context;
            without bound where the base is near 1 and all pairs turn alike.
            """
            return n_channels * math.log(trained_context / (times * 2 * math.pi)) / (2 * log_base)

        low = pair_that_turns(_YARN_FAST).floor().clamp(0, n_channels - 1)[..., None]
        high = pair_that_turns(_YARN_SLOW).ceil().clamp(0, n_channels - 1)[..., None]
        high = torch.where(high == low, low + 1e-3, high)
        pair = torch.arange(plain.shape[-1], device=plain.device, dtype=plain.dtype)
        slowed = ((pair - low) / (high - low)).clamp(0, 1)
        return plain / factor * slowed + plain * (1 - slowed)
    return plain


def yarn_temperature(factor: float) -> float:
    """What YaRN multiplies the logits by: (0.1 ln(factor) + 1)^2."""
    return (0.1 * math.log(factor) + 1) ** 2


def xpos_gain(positions: Float[Tensor, " seq"], n_pairs: int) -> Float[Tensor, "seq pair"]:
    """Magnitude of queries at each position; keys take the inverse (xPos, arXiv 2212.10554).

    Far keys lose weight, the fast pairs' share most. Positions count from the middle of the
    context, where the gains of both reach furthest.
    """
    pair = torch.arange(n_pairs, device=positions.device, dtype=positions.dtype)
    decay = (pair / n_pairs + _XPOS_OFFSET) / (1 + _XPOS_OFFSET)
    return decay ** (positions[:, None] / _XPOS_LENGTH)


def xpos_reach() -> int:
    """Longest context, in tokens, whose gains float32 holds."""
    per_token = math.log((1 + _XPOS_OFFSET) / _XPOS_OFFSET) / _XPOS_LENGTH
    return int(2 * math.log(_XPOS_LARGEST) / per_token)
