"""The adaptive transformer: N replicas in one tensor program, four knobs that move in flight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.attention import banded_attention, masked_attention
from models.config import TransformerConfig
from models.knobs import Knobs
from models.noise import Noise, NoisePool, keep_mask
from models.rotary import Rotation, build_rotation

_EPS = 1e-6


@dataclass
class _Pass:
    """What one forward pass shares between its layers."""

    gate_model: Tensor  # [replica, 1, d_model]
    gate_heads: Tensor  # [replica, 1, 3 * d_model], heads of q, k and v
    gate_hidden: Tensor  # [replica, 1, hidden]
    inverse_width: Tensor  # [replica, 1, 1], 1 / effective number of active channels
    d_model: int
    n_heads: int
    hidden: int
    span: float | None  # shared span when sliced, else None
    keep: list[Tensor] | None  # dropout multipliers, the next place's last


class AdaptiveTransformer(nn.Module):
    """Decoder-only transformer whose parameters all carry a leading replica dimension.

    Pre-norm blocks (RMSNorm, arXiv 1910.07467) with rotary attention and a GELU or SwiGLU layer.
    The knobs are tensors of shape `[n_replicas]` held in buffers and changed in place by
    `set_knobs`; they are part of `state_dict`. Derived tables are rebuilt when a knob moves, and
    only then.

    Two executions of the same function: *masked* (each replica its own width and span) and
    *sliced* (all replicas share width and span, so what is inactive is not computed at all).

    Args:
        config: The shape.
        n_replicas: How many independent transformers.
        device: Where parameters live.
        dtype: Parameter type; float64 for tests.
        sliced: `True` or `False` to force an execution, `None` to slice when `n_replicas == 1`.

    Example:
        >>> model = AdaptiveTransformer(TransformerConfig(d_model=16, n_heads=4), n_replicas=3)
        >>> model.initialise([0, 1, 2], seeds=[10, 11, 12])
        >>> model.set_knobs({"dropout": [0.0, 0.1, 0.2]})
        >>> tokens = torch.zeros(3, 4, 8, dtype=torch.long)
        >>> model(tokens).shape
        torch.Size([3, 4, 8, 256])
    """

    knobs: Knobs
    rotation: Rotation

    def __init__(
        self,
        config: TransformerConfig,
        n_replicas: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        sliced: bool | None = None,
    ) -> None:
        super().__init__()
        if n_replicas < 1:
            raise ValueError(f"n_replicas must be at least 1, got {n_replicas}")
        self.config = config
        self.n_replicas = n_replicas
        self.sliced = n_replicas == 1 if sliced is None else sliced
        self.knobs = Knobs(config, n_replicas, device=device, dtype=dtype, sliced=self.sliced)
        d, hidden, n = config.d_model, config.hidden_units, n_replicas

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(n, *shape, device=device, dtype=dtype))

        self.embedding = weight(config.vocab_size, d)
        self.blocks = nn.ModuleList(
            nn.ParameterDict(
                {
                    "attention_norm": weight(d),
                    "qkv": weight(d, 3 * d),
                    "attention_out": weight(d, d),
                    "ffn_norm": weight(d),
                    "ffn_in": weight(d, hidden * (2 if config.feed_forward == "swiglu" else 1)),
                    "ffn_out": weight(hidden, d),
                }
            )
            for _ in range(config.n_layers)
        )
        self.final_norm = weight(d)
        self.unembedding = weight(d, config.vocab_size)
        self.rotation = build_rotation(
            config.rotation, n_replicas=n, head_dim=config.head_dim, context=config.context
        ).to(device)
        self._pool: NoisePool | None = None
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())
        self.refresh()

    def set_knobs(self, values: Mapping[str, Any], rows: Sequence[int] | None = None) -> None:
        """Sets knob values in place; a width change then fades in through `step_gates`.

        Args:
            values: By name: `rope_base`, `attention_span` (tokens), `embedding_width` (fraction),
                `dropout` (probability). Each a number or one number per row.
            rows: The replicas concerned; all by default.

        Raises:
            ValueError: For an unknown knob or a value outside its range.
        """
        self.knobs.assign(values, rows)
        if "rope_base" in values:
            self.rotation.refresh(self.knobs.log_base)

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptiveTransformer":
        """Moves and casts as any module does, but knob values keep their precision."""
        knobs = self.knobs.storage()
        super()._apply(fn, recurse)
        self.knobs.keep_precision(knobs)
        self.refresh()
        return self

    def refresh(self) -> None:
        """Rebuilds all that depends on the knobs, after their storage was written to."""
        self.knobs.refresh()
        self.rotation.refresh(self.knobs.log_base)

    # Parameters ------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, rows: list[int], seeds: list[int]) -> None:
        """Draws fresh parameters for some replicas, each from its own seed.

        Weights are normal with deviation 1/sqrt(fan in), projections back into the residual
        stream smaller by 1/sqrt(2 n_layers); norms are one (GPT-2's scheme).
        """
        residual = 1 / math.sqrt(2 * self.config.n_layers)
        for row, seed in zip(rows, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in self.named_parameters():
                leaf = name.rsplit(".", 1)[-1]
                if leaf.endswith("norm"):
                    parameter[row].fill_(1.0)
                    continue
                shape = parameter.shape[1:]
                std = 1.0 if leaf == "embedding" else 1 / math.sqrt(shape[0])
                std *= residual if leaf in ("attention_out", "ffn_out") else 1.0
                draw = torch.randn(shape, generator=generator, dtype=torch.float64) * std
                parameter[row].copy_(draw)

    def count_parameters(self) -> int:
        """Parameters of one replica."""
        return sum(p.numel() for p in self.parameters()) // self.n_replicas

    # Forward ---------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Int[Tensor, "replica batch seq"],
        noise: Noise | None = None,
    ) -> Float[Tensor, "replica batch seq vocab"]:
        """Next-token logits.

        Args:
            tokens: Token ids of each replica.
            noise: Where each replica's dropout noise comes from; without it dropout is off.
        """
        n, batch, seq = tokens.shape
        if n != self.n_replicas or seq > self.config.context:
            raise ValueError(
                f"tokens must have shape [{self.n_replicas}, batch, at most "
                f"{self.config.context}], got {list(tokens.shape)}"
            )
        state = self._prepare(batch * seq, noise)
        x = self._embed(tokens.flatten(1), state)
        for module in self.blocks:
            block = cast(nn.ParameterDict, module)
            x = x + self._attention(_normalise(x, state), block, state, batch)
            x = x + self._feed_forward(_normalise(x, state), block, state)
        weight = self.unembedding[:, : state.d_model] * self.final_norm[:, : state.d_model, None]
        return torch.bmm(_normalise(x, state), weight).view(n, batch, seq, -1)

    def _prepare(self, n_tokens: int, noise: Noise | None) -> _Pass:
        config, knobs = self.config, self.knobs
        share = config.width_levels[knobs.top_level] if self.sliced else 1.0
        d, hidden = round(config.d_model * share), round(config.hidden_units * share)
        heads = round(config.n_heads * share)
        gates = knobs.gates.to(self.embedding.dtype)
        channel = gates[:, knobs.channel_level[:d]]
        head_channels = gates[:, knobs.head_channel_level[: heads * config.head_dim]]
        keep = None
        if noise is not None and knobs.dropout_on:
            keep = self._keep_masks(n_tokens, noise, d)
        return _Pass(
            gate_model=channel[:, None, :],
            gate_heads=head_channels.repeat(1, 3)[:, None, :],
            gate_hidden=gates[:, None, knobs.hidden_level[:hidden]],
            inverse_width=1 / channel.square().sum(dim=1)[:, None, None],
            d_model=d,
            n_heads=heads,
            hidden=hidden,
            span=knobs.shared_span if self.sliced else None,
            keep=keep,
        )

    def _keep_masks(self, n_tokens: int, noise: Noise, d: int) -> list[Tensor]:
        window = n_tokens * self.config.d_model
        if self._pool is None or self._pool.window != window:
            self._pool = NoisePool(window, device=self.embedding.device)
        n_places = 1 + 2 * self.config.n_layers
        raw = self._pool.read(noise, n_places)
        raw = raw.view(self.n_replicas, n_places, n_tokens, self.config.d_model)[..., :d]
        masks = keep_mask(raw, self.knobs.dropout, self.embedding.dtype)
        return list(reversed(masks.unbind(1)))

    def _embed(self, tokens: Tensor, state: _Pass) -> Tensor:
        rows = torch.arange(self.n_replicas, device=tokens.device)[:, None]
        table = self.embedding[:, :, : state.d_model]
        if not self.knobs.all_open:
            table = table * state.gate_model
        return _drop(table[rows, tokens], state)

    def _attention(self, x: Tensor, block: nn.ParameterDict, state: _Pass, batch: int) -> Tensor:
        n, n_tokens, d = x.shape
        heads, head_dim = state.n_heads, self.config.head_dim
        weight = block["qkv"]
        if heads < self.config.n_heads:
            weight = weight.unflatten(2, (3, -1))[:, :d, :, : heads * head_dim].flatten(2)
        weight = self._gated(weight * block["attention_norm"][:, :d, None], state.gate_heads)
        qkv = torch.bmm(x, weight).view(n, batch, -1, 3 * heads, head_dim)
        qk, v = qkv.split((2 * heads, heads), dim=3)
        q, k = self.rotation(qk).permute(0, 1, 3, 2, 4).split(heads, dim=2)
        v = v.permute(0, 1, 3, 2, 4)
        if state.span is None:
            seq = n_tokens // batch
            out = masked_attention(q, k, v, self.knobs.span_bias[:, :seq, :seq])
        else:
            out = banded_attention(q, k, v, state.span, self.config.ramp)
        out = out.permute(0, 1, 3, 2, 4).reshape(n, n_tokens, heads * head_dim)
        back = self._gated(block["attention_out"][:, : heads * head_dim, :d], state.gate_model)
        return _drop(torch.bmm(out, back), state)

    def _feed_forward(self, x: Tensor, block: nn.ParameterDict, state: _Pass) -> Tensor:
        d, hidden = state.d_model, state.hidden
        weight = block["ffn_in"][:, :d]
        swiglu = self.config.feed_forward == "swiglu"
        if hidden < self.config.hidden_units:
            weight = weight.unflatten(2, (2 if swiglu else 1, -1))[..., :hidden].flatten(2)
        gate = torch.cat((state.gate_hidden,) * 2, dim=2) if swiglu else state.gate_hidden
        weight = self._gated(weight * block["ffn_norm"][:, :d, None], gate)
        h = torch.bmm(x, weight)
        if swiglu:
            a, b = h.chunk(2, dim=-1)
            h = F.silu(a) * b
        else:
            h = F.gelu(h)
        back = self._gated(block["ffn_out"][:, :hidden, :d], state.gate_model)
        return _drop(torch.bmm(h, back), state)

    def _gated(self, weight: Tensor, gate: Tensor) -> Tensor:
        return weight if self.knobs.all_open else weight * gate


def _normalise(x: Tensor, state: _Pass) -> Tensor:
    """RMS norm over the active channels; the gain is folded into the next weight."""
    mean_square = x.square().sum(dim=-1, keepdim=True) * state.inverse_width
    return x * torch.rsqrt(mean_square + _EPS)


def _drop(x: Tensor, state: _Pass) -> Tensor:
    return x if state.keep is None else x * state.keep.pop()
