"""Causal attention with a soft span, in two executions of one function.

*Masked*: each replica has its own span, entering as an additive bias. *Banded*: all replicas share
the span, and queries in chunks see only the keys the span can reach, so that time and memory grow
linearly with the sequence. Both weigh a key at distance d by

    m(d) = clamp((span + ramp - d) / ramp, 0, 1)         (adaptive span, arXiv 1905.07799)

inside the softmax: exp(logit) * m(d), normalised; zero outside, so a change of span is smooth.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.gradient import first_derivative_only

_CHUNKS_BEHIND = 4  # of the band: more of them see fewer keys in vain, in smaller products
_SHORTEST_CHUNK = 32
_BANDED_UP_TO = 0.75  # of the sequence; a longer band costs what the whole does
EXPLICIT_UP_TO = 128  # tokens; below, batched products beat the fused kernel on CPUs


class SharedSpan(NamedTuple):
    """One span of all replicas: what a program only reads, and what decides which program it is.

    Args:
        tokens: Attended in full; a number, or a tensor of one.
        reach: Distance of the furthest key that has any weight, or more.
        whole: Longest sequence in which every key is known to have its full weight.
    """

    tokens: float | Tensor
    reach: int
    whole: int

    @classmethod
    def of(cls, span: float, ramp: float) -> "SharedSpan":
        return cls(span, math.ceil(span + ramp) - 1, math.floor(span) + 1)


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
    if k.shape[3] > EXPLICIT_UP_TO:
        n, batch = q.shape[:2]
        mask = bias[:, None].expand(n, batch, *bias.shape[1:]).flatten(0, 1)
        out = F.scaled_dot_product_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            attn_mask=mask.to(q.dtype),
            scale=1 / math.sqrt(v.shape[-1]),
        )
        return out.unflatten(0, (n, batch))
    return _Explicit.apply(q, k, v, bias)


class _Explicit(torch.autograd.Function):
    """Attention by batched products, for sequences so short that the fused kernel does not pay.

    What has few columns, as many as a head has channels, is multiplied transposed, in the
    backward pass, too: libraries are up to three times as fast at the same product with few rows.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        n, batch, heads, seq, _ = q.shape
        keys, head_dim = v.shape[-2:]
        ctx.bias_heads, ctx.scale = bias.shape[1], 1 / math.sqrt(head_dim)
        q, k, v = (x.flatten(0, 2) for x in (q, k, v))
        logits = q.new_empty(n, batch, heads, seq, keys).copy_(bias[:, None]).flatten(0, 2)
        weights = torch.softmax(logits.baddbmm_(q, k.transpose(1, 2), alpha=ctx.scale), dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        out = torch.bmm(v.transpose(1, 2), weights.transpose(1, 2))
        return out.view(n, batch, heads, head_dim, seq).transpose(3, 4)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        shape, grad = grads[0].shape[:3], grads[0].flatten(0, 2)
        by_weight = torch.bmm(grad, v.transpose(1, 2))
        by_logit = torch._softmax_backward_data(by_weight, weights, -1, weights.dtype)
        by_q = torch.bmm(k.transpose(1, 2), by_logit.transpose(1, 2)).mul_(ctx.scale)
        by_k = torch.bmm(q.transpose(1, 2), by_logit).mul_(ctx.scale)
        by_v = torch.bmm(grad.transpose(1, 2), weights)
        by_bias = None
        if ctx.needs_input_grad[3]:
            over = 1 if ctx.bias_heads > 1 else (1, 2)
            by_bias = by_logit.unflatten(0, shape).sum(over)
            by_bias = by_bias if ctx.bias_heads > 1 else by_bias[:, None]
        by_qkv = (x.transpose(1, 2).unflatten(0, shape) for x in (by_q, by_k, by_v))
        return *by_qkv, by_bias


def banded_attention(
    q: Float[Tensor, "replica batch head seq qk_dim"],
    k: Float[Tensor, "replica batch head seq qk_dim"],
    v: Float[Tensor, "replica batch head seq head_dim"],
    span: SharedSpan,
    ramp: float,
    by_distance: Float[Tensor, "replica head seq"] | None = None,
) -> Float[Tensor, "replica batch head seq head_dim"]:
    """Attention when all replicas share one span: a band where that is clearly shorter than the
    sequence, else fused causal attention (with the span's edge as a bias where it shows).

    Args:
        q: Queries.
        k: Keys.
        v: Values; logits are divided by the root of their dimension.
        span: That all share.
        ramp: Tokens over which the weight then falls to zero.
        by_distance: Relative bias of each head by distance in tokens.
    """
    n, batch, heads, seq, _ = q.shape
    scale = 1 / math.sqrt(v.shape[-1])
    reach, chunk = span.reach, max(_SHORTEST_CHUNK, -(-span.reach // _CHUNKS_BEHIND))
    if by_distance is not None:
        by_distance = by_distance.repeat_interleave(batch, 0).flatten(0, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = _last_rows(q.shape[2], k.shape[2], span.tokens, ramp, by_distance, q)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    if seq <= span.whole and by_distance is None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.unflatten(0, (n, batch))
    q, k, v = (x.flatten(0, 2) for x in (q, k, v))
    if reach + chunk > _BANDED_UP_TO * seq:
        return attend(q[:, None], k[:, None], v[:, None]).view(n, batch, heads, seq, -1)
    n_chunks = (seq - reach) // chunk
    first = seq - n_chunks * chunk  # queries so early that they may see all before them
    early = attend(*(x[:, None, :first] for x in (q, k, v)))
    behind = (_Windows.apply(x, first - reach, reach + chunk, chunk) for x in (k, v))
    late = attend(q[:, first:].unflatten(1, (n_chunks, chunk)), *behind)
    out = torch.cat((early.squeeze(1), late.flatten(1, 2)), dim=1)
    return out.view(n, batch, heads, seq, -1)


class _Windows(torch.autograd.Function):
    """Overlapping windows of a sequence, all views of it; their gradients add up in few passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, size: int, step: int) -> Tensor:
        ctx.shape, ctx.first, ctx.step = x.shape, first, step
        return x[:, first:].unfold(1, size, step).transpose(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        total = grad.new_zeros(ctx.shape)
        n_windows = grad.shape[1]
        for start in range(0, grad.shape[2], ctx.step):
            part = grad[:, :, start : start + ctx.step].transpose(2, 3)
            apart = total[:, ctx.first + start :].unfold(1, part.shape[3], ctx.step)
            apart[:, :n_windows].add_(part)
        return total, None, None, None


def _last_rows(
    n_queries: int,
    n_keys: int,
    span: float | Tensor,
    ramp: float,
    by_distance: Tensor | None,
    like: Tensor,
) -> Tensor:
    """Bias of the last queries of so many keys, `[1 or replica * batch * head, query, key]`."""
    precise = torch.promote_types(like.dtype, torch.float32)
    distance = torch.arange(n_keys - 1, -n_queries, -1, device=like.device, dtype=precise)
    if not isinstance(span, Tensor):
        span = torch.full_like(distance[:1], span)
    relative = span_log_weight(distance[None], span.to(distance), ramp)[:, 0]
    if by_distance is not None:
        relative = relative + by_distance[:, distance.clamp(0, by_distance.shape[1] - 1).long()]
    return relative.to(like.dtype).unfold(-1, n_keys, 1).flip(-2)


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
