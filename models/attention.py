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
    q: Float[Tensor, "replica batch head seq head_dim"],
    k: Float[Tensor, "replica batch head seq head_dim"],
    v: Float[Tensor, "replica batch head seq head_dim"],
    bias: Float[Tensor, "replica seq seq"],
) -> Float[Tensor, "replica batch head seq head_dim"]:
    """Attention with an additive bias per replica."""
    n, batch, heads, seq, head_dim = q.shape
    if seq > EXPLICIT_UP_TO:
        folded = (n * batch, heads, seq, head_dim)
        mask = bias[:, None].expand(n, batch, seq, seq).reshape(n * batch, 1, seq, seq)
        out = F.scaled_dot_product_attention(
            q.reshape(folded), k.reshape(folded), v.reshape(folded), attn_mask=mask.to(q.dtype)
        )
        return out.view(q.shape)
    flat = (n * batch * heads, seq, head_dim)
    logits = torch.bmm(q.reshape(flat) / math.sqrt(head_dim), k.reshape(flat).transpose(1, 2))
    logits = logits.view(n, batch * heads, seq, seq).add_(bias[:, None])
    weights = torch.softmax(logits, dim=-1).view(-1, seq, seq)
    return torch.bmm(weights, v.reshape(flat)).view(q.shape)


def banded_attention(
    q: Float[Tensor, "replica batch head seq head_dim"],
    k: Float[Tensor, "replica batch head seq head_dim"],
    v: Float[Tensor, "replica batch head seq head_dim"],
    span: float,
    ramp: float,
) -> Float[Tensor, "replica batch head seq head_dim"]:
    """Attention when all replicas share one span: a band when that is shorter than half the
    sequence, else fused causal attention (with the span's edge as a bias where it shows).
    """
    n, batch, heads, seq, head_dim = q.shape
    folded = (n * batch, heads, seq, head_dim)
    q, k, v = q.reshape(folded), k.reshape(folded), v.reshape(folded)
    chunk = math.ceil(span + ramp)
    shared = torch.tensor([span], device=q.device, dtype=torch.float64)
    if 2 * chunk > seq:
        if span >= seq - 1:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            distance = causal_distance(seq, device=q.device, dtype=torch.float64)
            bias = span_log_weight(distance, shared, ramp).to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        out = _banded(q, k, v, shared, ramp, chunk)
    return out.view(n, batch, heads, seq, head_dim)


def _banded(q: Tensor, k: Tensor, v: Tensor, span: Tensor, ramp: float, chunk: int) -> Tensor:
    rows, heads, seq, head_dim = q.shape
    n_chunks = math.ceil(seq / chunk)
    padding = n_chunks * chunk - seq

    def chunks(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, padding)).view(rows, heads, n_chunks, chunk, head_dim)

    def with_previous(x: Tensor) -> Tensor:
        x = chunks(x)
        previous = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        return torch.cat((previous, x), dim=3)

    query = torch.arange(chunk, device=q.device, dtype=torch.float64)[:, None] + chunk
    key = torch.arange(2 * chunk, device=q.device, dtype=torch.float64)[None, :]
    bias = span_log_weight(query - key, span, ramp)
    bias = bias.expand(n_chunks, chunk, 2 * chunk).clone()
    bias[0, :, :chunk] = -torch.inf  # before the first chunk there is nothing
    out = F.scaled_dot_product_attention(
        chunks(q), with_previous(k), with_previous(v), attn_mask=bias.to(q.dtype)
    )
    return out.view(rows, heads, n_chunks * chunk, head_dim)[:, :, :seq]
