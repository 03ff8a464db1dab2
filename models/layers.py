"""The layers of a transformer block, as functions of what one forward pass shares."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import banded_attention, masked_attention, toeplitz
from models.cache import KeyValueCache
from models.config import TransformerConfig
from models.internals import Watch
from models.knobs import Knobs
from models.rotary import LayerTurn, Rotary, RotaryPass, fold, layer_heads
from models.rotary.pairs import at_least_float32

_EPS = 1e-6


@dataclass
class Pass:
    """What one forward pass shares between its layers."""

    config: TransformerConfig
    knobs: Knobs
    rotation: Rotary
    gate_model: Tensor  # [replica, 1, d_model]
    gate_heads: Tensor  # [replica, 1, 3 * d_model], heads of q, k and v
    gate_hidden: Tensor  # [replica, 1, hidden]
    inverse_width: Tensor  # [replica, 1, 1], 1 / effective number of active channels
    d_model: int
    n_heads: int
    hidden: int
    keep: list[Tensor] | None  # dropout multipliers, the next place's last
    rotary: RotaryPass
    batch: int
    cache: KeyValueCache | None
    watch: Watch | None = None


def checked_tokens(tokens: Tensor, n_replicas: int, longest: int, vocab_size: int | None) -> Tensor:
    """Token ids as int64, whatever whole numbers they come in.

    Args:
        tokens: `[replica, batch, seq]`.
        n_replicas: Of the model.
        longest: Most tokens of a sequence.
        vocab_size: Size of the vocabulary that they must be of; `None` looks at none of them, which
            on a GPU would wait.

    Raises:
        ValueError: For another shape, another type, or a token outside of the vocabulary.
    """
    fits = tokens.dim() == 3 and len(tokens) == n_replicas and tokens.numel() > 0
    if not fits or tokens.shape[2] > longest:
        wanted = f"[{n_replicas}, batch of 1 or more, 1 to {longest}]"
        raise ValueError(f"tokens must have shape {wanted}, got {list(tokens.shape)}")
    if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(f"tokens must be whole numbers, got {tokens.dtype}")
    tokens = tokens.long()  # bytes would be taken for a mask
    if vocab_size is not None:
        low, high = int(tokens.min()), int(tokens.max())
        if not 0 <= low <= high < vocab_size:
            raise ValueError(f"tokens must be in [0, {vocab_size - 1}], got {low} to {high}")
    return tokens


def embed(tokens: Tensor, table: Tensor, state: Pass) -> Tensor:
    """The active channels of each token, `[replica, token]` to `[replica, token, channel]`."""
    rows = torch.arange(len(table), device=tokens.device)[:, None]
    table = _gated(table[:, :, : state.d_model], state.gate_model, state)
    return drop(table[rows, tokens], state)


def attention(x: Tensor, block: nn.ParameterDict, state: Pass, layer: int) -> Tensor:
    """Causal attention of one block, its output projection included."""
    n, n_tokens, d = x.shape
    heads, head_dim = state.n_heads, state.config.head_dim
    rotary = state.config.rotary
    weight = block["qkv"]
    if heads < state.config.n_heads:
        weight = weight.unflatten(2, (3, -1))[:, :d, :, : heads * head_dim].flatten(2)
    weight = _gated(weight * block["attention_norm"][:, :d, None], state.gate_heads, state)
    weight = fold(weight, state.rotary, layer, heads)
    qkv = torch.bmm(x, weight).view(n, state.batch, -1, 3, heads, head_dim)
    before = None if state.cache is None else state.cache.last_angles(layer)
    angles = state.rotation.conditional_angles(x, layer, heads, state.batch, before)
    turn = LayerTurn(state.rotary, layer, heads, angles, rotary.polar)
    qk, v = qkv.split((2, 1), dim=3)
    q, k = turn.queries_keys(qk).permute(3, 0, 1, 4, 2, 5).unbind()
    v = v.squeeze(3)
    if rotary.value_rotation:
        v = turn.values(v)
    v = v.permute(0, 1, 3, 2, 4)
    if state.cache is not None:
        k, v = state.cache.append(layer, k, v, angles)
    out = _attend(q, k, v, state, layer).permute(0, 1, 3, 2, 4)
    if rotary.value_rotation:
        out = turn.values(out.contiguous(), back=True)
    out = out.reshape(n, n_tokens, heads * head_dim)
    back = _gated(block["attention_out"][:, : heads * head_dim, :d], state.gate_model, state)
    return drop(torch.bmm(out, back), state)


def _attend(q: Tensor, k: Tensor, v: Tensor, state: Pass, layer: int) -> Tensor:
    relative = state.rotary
    by_distance = layer_heads(relative.by_distance, layer, state.n_heads)
    offset, seq = k.shape[3] - q.shape[3], k.shape[3]
    plain = state.cache is None and state.watch is None
    if state.knobs.sliced and plain and relative.bias is None:
        span = state.knobs.shared_span()
        return banded_attention(q, k, v, span, state.config.ramp, by_distance)
    bias = state.knobs.span_bias_rows(offset, seq)[:, None]
    if by_distance is not None:
        bias = bias + toeplitz(by_distance)
    any_bias = layer_heads(relative.bias, layer, state.n_heads)
    if any_bias is not None:
        bias = bias + any_bias
    if state.watch is not None:
        head_dim = state.config.head_dim
        gates = state.gate_heads[:, 0, : state.n_heads * head_dim : head_dim]
        state.watch.attention(q, k, bias.to(q.dtype), head_dim, gates)
    return masked_attention(q, k, v, bias.to(q.dtype))


def feed_forward(x: Tensor, block: nn.ParameterDict, state: Pass) -> Tensor:
    """The GELU or SwiGLU layer of one block."""
    d, hidden = state.d_model, state.hidden
    weight = block["ffn_in"][:, :d]
    swiglu = state.config.feed_forward == "swiglu"
    if hidden < state.config.hidden_units:
        weight = weight.unflatten(2, (2 if swiglu else 1, -1))[..., :hidden].flatten(2)
    gate = torch.cat((state.gate_hidden,) * 2, dim=2) if swiglu else state.gate_hidden
    weight = _gated(weight * block["ffn_norm"][:, :d, None], gate, state)
    h = torch.bmm(x, weight)
    if swiglu:
        a, b = h.chunk(2, dim=-1)
        h = F.silu(a) * b
    else:
        h = F.gelu(h)
    if state.watch is not None:
        state.watch.hidden(h, state.gate_hidden)
    back = _gated(block["ffn_out"][:, :hidden, :d], state.gate_model, state)
    return drop(torch.bmm(h, back), state)


def _gated(weight: Tensor, gate: Tensor, state: Pass) -> Tensor:
    return weight if state.knobs.all_open else weight * gate


def normalise(x: Tensor, state: Pass) -> Tensor:
    """RMS norm over the active channels; the gain is folded into the next weight.

    The squares are summed in float32 at least: float16 ends at 65504.
    """
    mean_square = at_least_float32(x).square().sum(dim=-1, keepdim=True) * state.inverse_width
    return x * torch.rsqrt(mean_square + _EPS).to(x.dtype)


def drop(x: Tensor, state: Pass) -> Tensor:
    """Multiplies by the next place's dropout noise."""
    return x if state.keep is None else x * state.keep.pop()
