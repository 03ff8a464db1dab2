"""Continuing text: sampling token after token with a key-value cache."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from models.cache import KeyValueCache
from models.rotary.pairs import at_least_float32


@torch.no_grad()
def generate(
    model: Callable[..., Tensor],
    tokens: Integer[Tensor, "replica batch seq"],
    max_new_tokens: int,
    *,
    context: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "replica batch longer"]:
    """The sequences, and `max_new_tokens` sampled ones behind each.

    Past the model's context it sees the latest half of a context and goes on from there.

    Args:
        model: Logits of tokens, given a cache.
        tokens: At least one token per sequence.
        max_new_tokens: Tokens to add.
        context: Most tokens that the model sees at once.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Share of the probability sampled from, the likeliest tokens first (nucleus
            sampling, arXiv 1904.09751).
        generator: Source of randomness; torch's global one without it.

    Raises:
        ValueError: For an empty prompt or a number out of range.
    """
    if tokens.dim() != 3:
        raise ValueError(f"tokens must have shape [replica, batch, seq], got {list(tokens.shape)}")
    if tokens.shape[2] < 1:
        raise ValueError("tokens must hold at least one token per sequence to continue, got 0")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    cache, pending = KeyValueCache(), tokens[:, :, -context:]
    for _ in range(max_new_tokens):
        if cache.length + pending.shape[2] > context:
            cache, pending = KeyValueCache(), tokens[:, :, -max(1, context // 2) :]
        logits = model(pending, cache=cache)[:, :, -1]
        pending = sample(logits, temperature, top_p, generator)[:, :, None]
        tokens = torch.cat((tokens, pending), dim=2)
    return tokens


def sample(
    logits: Float[Tensor, "replica batch vocab"],
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> Int[Tensor, "replica batch"]:
    """One token per sequence."""
    logits = at_least_float32(logits)
    largest = logits.amax(dim=-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("The logits are not finite: there is nothing to sample from")
    if temperature == 0:
        return logits.argmax(dim=-1)
    below = logits - largest  # so that no division overflows upwards
    scaled = torch.where(below == 0, below, below / temperature)
    probability = torch.softmax(scaled, dim=-1)
    if top_p < 1:
        ordered, index = probability.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # the token that crosses top_p stays in
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probability = torch.zeros_like(probability).scatter(-1, index, ordered)
    flat = probability.flatten(0, 1)
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])
