"""Causal attention with a soft span, in two executions of one function.

*Masked*: each replica has its own span, entering as an additive bias. *Banded*: all replicas share
the span, and queries in chunks see only the keys the span can reach, so that time and memory grow
linearly with the sequence. Both weigh a key at distance d by

    m(d) = clamp((span + ramp - d) / ramp, 0, 1)         (adaptive span, arXiv 1905.07799)

inside the softmax: exp(logit) * m(d), normalised; zero outside, so a change of span is smooth.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_CHUNKS_BEHIND = 4  # of the band: more of them see fewer keys in vain, and copy more
_SHORTEST_CHUNK = 32
_BANDED_UP_TO = 0.75  # of the sequence; a longer band costs what the whole does
EXPLICIT_UP_TO = 128  # tokens; below, batched products beat the fused kernel on CPUs


def span_log_weight(
    distance: Tensor, span: Float[Tensor, " replica"], ramp: float
) -> Float[Tensor, "replica query key"]:
    """Log m(d) for causal distances, minus infinity for the future and beyond the span.

    Args:
        distance: `[query, key]`, query position minus key position in tokens.
        span: Tokens attended in full, per replica.
        ramp: Tokens over which the weight then falls to zero.
    """
    reach = span[:, None, None] + ramp - distance
    weight = torch.where(distance >= 0, (reach / ramp).clamp(0, 1), 0.0)
    return weight.log()


def causal_distance(seq: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    positions = torch.arange(seq, device=device, dtype=dtype)
    return positions[:, None] - positions[None, :]


def masked_attention(
    q: Float[Tensor, "replica batch head query qk_dim"],
    k: Float[Tensor, "replica batch head key qk_dim"],
    v: Float[Tensor, "replica batch head key head_dim"],
    bias: Float[Tensor, "replica bias_head query key"],
) -> Float[Tensor, "replica batch head query head_dim"]:
    """Attention with an additive bias per replica, and per head where `bias` has heads.

    Logits are divided by the root of `head_dim`, that of the values.
    """
    n, batch, heads, seq, _ = q.shape
    keys, head_dim = v.shape[-2:]
    if keys > EXPLICIT_UP_TO:
        mask = bias[:, None].expand(n, batch, *bias.shape[1:]).flatten(0, 1)
        out = F.scaled_dot_product_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            attn_mask=mask.to(q.dtype),
            scale=1 / math.sqrt(head_dim),
        )
        return out.unflatten(0, (n, batch))
    logits = torch.bmm(q.flatten(0, 2) / math.sqrt(head_dim), k.flatten(0, 2).transpose(1, 2))
    logits = logits.view(n, batch, heads, seq, keys).add_(bias[:, None])
    weights = torch.softmax(logits, dim=-1).view(-1, seq, keys)
    return torch.bmm(weights, v.flatten(0, 2)).view(n, batch, heads, seq, head_dim)


def banded_attention(
    q: Float[Tensor, "replica batch head seq qk_dim"],
    k: Float[Tensor, "replica batch head seq qk_dim"],
    v: Float[Tensor, "replica batch head seq head_dim"],
    span: float,
    ramp: float,
    by_distance: Float[Tensor, "replica head seq"] | None = None,
) -> Float[Tensor, "replica batch head seq head_dim"]:
    """Attention when all replicas share one span: a band where that is clearly shorter than the
    sequence, else fused causal attention (with the span's edge as a bias where it shows).

    Args:
        q: Queries.
        k: Keys.
        v: Values; logits are divided by the root of their dimension.
        span: Tokens attended in full.
        ramp: Tokens over which the weight then falls to zero.
        by_distance: Relative bias of each head by distance in tokens.
    """
    n, batch, _, seq, _ = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scale = 1 / math.sqrt(v.shape[-1])
    reach = math.ceil(span + ramp) - 1  # distance of the furthest key that has any weight
    chunk = max(_SHORTEST_CHUNK, math.ceil(reach / _CHUNKS_BEHIND))
    n_behind = math.ceil(reach / chunk)
    shared = torch.tensor([span], device=q.device, dtype=torch.float64)
    if span >= seq - 1 and by_distance is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    elif (n_behind + 1) * chunk > _BANDED_UP_TO * seq:
        distance = causal_distance(seq, device=q.device, dtype=torch.float64)
        bias = span_log_weight(distance, shared, ramp).to(q.dtype)
        if by_distance is not None:
            bias = (bias + toeplitz(by_distance).to(q.dtype)).repeat_interleave(batch, 0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        bias = _band_bias(seq, shared, ramp, chunk, n_behind).to(q.dtype)
        if by_distance is not None:
            bias = bias + _by_band_distance(by_distance, chunk, n_behind).to(q.dtype)
            bias = bias.repeat_interleave(batch, 0)
        else:
            bias = bias.expand(n * batch, *bias.shape[1:])
        out = _banded(q, k, v, bias, chunk, n_behind)
    return out.unflatten(0, (n, batch))


def _banded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, chunk: int, n_behind: int) -> Tensor:
    """Queries in chunks, each with the keys of its own chunk and of those behind it.

    Chunks lie along the batch, where the fused kernels take them for sequences of their own.
    """
    rows, _, seq, _ = q.shape
    n_chunks = math.ceil(seq / chunk)
    padding = n_chunks * chunk - seq

    def chunks(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, padding)).unflatten(2, (n_chunks, chunk)).transpose(1, 2)

    def with_those_behind(x: Tensor) -> Tensor:
        x = F.pad(chunks(x), (0, 0, 0, 0, 0, 0, n_behind, 0))
        return torch.cat([x[:, i : i + n_chunks] for i in range(n_behind + 1)], dim=3)

    out = F.scaled_dot_product_attention(
        chunks(q).flatten(0, 1),
        with_those_behind(k).flatten(0, 1),
        with_those_behind(v).flatten(0, 1),
        attn_mask=bias.flatten(0, 1),
        scale=1 / math.sqrt(v.shape[-1]),
    )
    return out.unflatten(0, (rows, n_chunks)).transpose(1, 2).flatten(2, 3)[:, :, :seq]


def _band_distance(chunk: int, n_behind: int, device: torch.device) -> Tensor:
    """Distance of every key that a chunk sees from each of its queries, `[query, key]`."""
    query = torch.arange(chunk, device=device, dtype=torch.float64) + n_behind * chunk
    key = torch.arange((n_behind + 1) * chunk, device=device, dtype=torch.float64)
    return query[:, None] - key


def _band_bias(seq: int, span: Tensor, ramp: float, chunk: int, n_behind: int) -> Tensor:
    """Log weights of the keys that each chunk sees, `[1, chunk, 1, query, key]`."""
    n_chunks = math.ceil(seq / chunk)
    weight = span_log_weight(_band_distance(chunk, n_behind, span.device), span, ramp)
    first = (torch.arange(n_chunks, device=span.device) - n_behind) * chunk
    place = first[:, None] + torch.arange(weight.shape[-1], device=span.device)
    before = torch.where(place < 0, -torch.inf, 0.0)  # before the first chunk there is nothing
    return (weight + before[:, None, :])[None, :, None]


def _by_band_distance(by_distance: Tensor, chunk: int, n_behind: int) -> Tensor:
    """A relative bias at those places, `[replica, 1, head, query, key]`."""
    distance = _band_distance(chunk, n_behind, by_distance.device)
    index = distance.clamp(0, by_distance.shape[-1] - 1).long()
    return by_distance[:, None, :, index]


def toeplitz(
    by_distance: Float[Tensor, "*batch seq"],
) -> Float[Tensor, "*batch seq seq"]:
    """Rows of a bias that depends on the distance alone: entry (i, j) is that of i - j.

    A view of the biases laid out once per relative position (2 seq - 1), not a gather; keys in
    the future repeat distance 0.
    """
    seq = by_distance.shape[-1]
    future = by_distance[..., :1].expand(*by_distance.shape[:-1], seq - 1)
    relative = torch.cat((by_distance.flip(-1), future), dim=-1)  # key - query, from 1 - seq
    return relative.unfold(-1, seq, 1).flip(-2)
