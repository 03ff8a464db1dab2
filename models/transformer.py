"""The adaptive transformer: N replicas in one tensor program, knobs that move in flight."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from models import shrink
from models.cache import KeyValueCache
from models.config import TransformerConfig
from models.device import brought
from models.generation import generate
from models.initial import draw_weights
from models.internals import Watch
from models.knobs import Knobs
from models.layers import Pass, attention, checked_tokens, embed, feed_forward, normalise
from models.noise import Noise, NoisePool, keep_mask
from models.rotary import Rotary, fold
from models.rotary.pairs import without_autocast


class AdaptiveTransformer(nn.Module):
    """Decoder-only transformer whose parameters all carry a leading replica dimension.

    Pre-norm blocks (RMSNorm, arXiv 1910.07467) with rotary attention and a GELU or SwiGLU layer.
    Weights are zero until `initialise`.
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
        capturable: Compute the same whatever the knobs are, and never wait for the device: what a
            CUDA graph needs. For masked execution.

    Example:
        >>> model = AdaptiveTransformer(TransformerConfig(d_model=16, n_heads=4), n_replicas=3)
        >>> model.initialise([0, 1, 2], seeds=[10, 11, 12])
        >>> model.set_knobs({"dropout": [0.0, 0.1, 0.2]})
        >>> tokens = torch.zeros(3, 4, 8, dtype=torch.long)
        >>> model(tokens).shape
        torch.Size([3, 4, 8, 256])
    """

    knobs: Knobs
    rotation: Rotary

    def __init__(
        self,
        config: TransformerConfig,
        n_replicas: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        sliced: bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__()
        if n_replicas < 1:
            raise ValueError(f"n_replicas must be at least 1, got {n_replicas}")
        self.config, self.n_replicas = config, n_replicas
        self.sliced = n_replicas == 1 and not capturable if sliced is None else sliced
        if self.sliced and capturable:
            raise ValueError("Sliced execution depends on the knobs, so it is not capturable")
        rotation = self._build_rotation(device, dtype)
        self.knobs = Knobs(
            config,
            n_replicas,
            device=device,
            dtype=dtype,
            sliced=self.sliced,
            capturable=capturable,
            base_shape=rotation.base_shape(),
        )
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
        self.rotation = rotation
        self._pool: NoisePool | None = None
        self.register_load_state_dict_post_hook(AdaptiveTransformer.refresh)
        self.refresh()

    def _build_rotation(self, device: torch.device | str | None, dtype: torch.dtype) -> Rotary:
        shape = self.config.rotation_shape(self.n_replicas, dtype=dtype, device=device)
        return Rotary(self.config.rotary, shape)

    def set_knobs(self, values: Mapping[str, Any], rows: Sequence[int] | None = None) -> None:
        """Sets knob values in place; a width change then fades in through `step_gates`.

        Args:
            values: By name: `rope_base`, `attention_span` (tokens), `embedding_width` (fraction),
                `dropout` (probability), `position_scale`, `rotation_strength` (factors of the
                positions and of the Givens angles), `orthogonality_weight`. Each a number or
                one number per row; bases also `[row, layer]` or `[row, layer, head]` where the
                rotation has one for each.
            rows: The replicas concerned; all by default.

        Raises:
            ValueError: For an unknown knob or a value outside its range.
        """
        self.knobs.assign(values, rows)
        if {"rope_base", "position_scale"} & set(values):
            self.rotation.refresh(self.knobs.log_base, self.knobs.position_scale)

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptiveTransformer":
        """Moves and casts as any module does, but knob values keep their precision."""
        knobs = self.knobs.storage()
        super()._apply(fn, recurse)
        self.knobs.keep_precision(knobs)
        self._pool = None  # it may be on another device
        self.refresh()
        return self

    def refresh(self, *_: object) -> None:
        """Rebuilds all that depends on the knobs, after their storage was written to."""
        self.knobs.refresh()
        self.rotation.refresh(self.knobs.log_base, self.knobs.position_scale)

    # Parameters ------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, rows: list[int], seeds: list[int]) -> None:
        """Draws fresh parameters for some replicas, each by its own seed (`models.initial`)."""
        if len(rows) != len(seeds):
            raise ValueError(f"initialise needs a seed for each row, got {len(rows)}, {len(seeds)}")
        self.knobs.index(rows)  # refuses what is no row
        own = dict(self._own_parameters())
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        fresh = draw_weights(own, self.config.n_layers, generators)
        for name, parameter in own.items():
            parameter[rows] = fresh[name]
        for row, generator in zip(rows, generators, strict=True):
            self.rotation.initialise(row, generator)

    @torch.no_grad()
    def scale_weights_(self, rows: list[int], factors: list[float]) -> None:
        """Multiplies the matrices and embeddings of some replicas, after `initialise`."""
        scale = brought(torch.tensor(factors, dtype=self.embedding.dtype), self.embedding.device)
        for name, parameter in self._own_parameters():
            if not name.endswith("norm"):
                parameter[rows] *= scale.view(-1, *(1,) * (parameter.dim() - 1))

    def _own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All but the rotation's, so that variants share what they have in common."""
        named = self.named_parameters()
        return (pair for pair in named if not pair[0].startswith("rotation."))

    def decayed_parameters(self) -> set[str]:
        """Names of the parameters that weight decay is for: matrices and embeddings."""
        own = self._own_parameters()
        return {name for name, p in own if p.dim() > 2 and p.requires_grad}

    def parameter_levels(self) -> dict[str, Tensor]:
        """The width level of every element of every parameter; see `Knobs.parameter_levels`."""
        knobs = self.knobs
        heads = knobs.head_channel_level[:: self.config.head_dim]
        levels = self.rotation.levels(heads, knobs.channel_level)
        rotation = {f"rotation.{name}": level for name, level in levels.items()}
        return {**knobs.parameter_levels(), **rotation}

    @torch.no_grad()
    def fold_rotations_(self) -> "AdaptiveTransformer":
        """Multiplies the static matrices into the projections, for good: same logits, no cost.

        For deployment: the matrices and their parameters are gone afterwards, the strength in
        force is baked in, and an optimizer made before still holds what is gone.

        Raises:
            ValueError: If no part of the rotation is static.
        """
        rotary = self.config.rotary
        if not rotary.static_matrices:
            raise ValueError(
                f"There is nothing to fold in rotation {self.config.rotation!r}: what it has "
                f"depends on positions or tokens"
            )
        matrices = self.rotation.prepare(1, self.knobs.rotation_strength)
        with without_autocast(self.embedding.device):
            for layer in range(self.config.n_layers):
                qkv = self.get_parameter(f"blocks.{layer}.qkv")
                qkv.copy_(fold(qkv, matrices, layer, self.config.n_heads))
        self.config = shrink.folded_config(self.config)
        self.knobs.config = self.config
        kept, learns = self.rotation.state_dict(), dict(self.rotation.named_parameters())
        self.rotation = self._build_rotation(self.embedding.device, self.embedding.dtype)
        self.rotation.load_state_dict({name: kept[name] for name in self.rotation.state_dict()})
        for name, parameter in self.rotation.named_parameters():
            parameter.requires_grad_(learns[name].requires_grad)
        self.rotation.train(self.training)
        self.refresh()
        return self

    @torch.no_grad()
    def shrink_(self) -> "AdaptiveTransformer":
        """Drops what the width in force leaves inactive, for good: same logits, less of a model.

        For deployment: an optimizer made before still holds what is gone.

        Raises:
            ValueError: If replicas differ in width, or a width still fades.
        """
        top = shrink.common_level(self.knobs.gates, self.knobs.width_level)
        config = shrink.shrunk_config(self.config, top)
        learns = {name: p.requires_grad for name, p in self.named_parameters()}
        kept = shrink.active_parameters(dict(self.named_parameters()), self.parameter_levels(), top)
        knobs = shrink.active_knobs(self.knobs.storage(), config.n_heads, top)
        small = AdaptiveTransformer(
            config,
            self.n_replicas,
            device=self.embedding.device,
            dtype=self.embedding.dtype,
            sliced=self.sliced,
            capturable=self.knobs.capturable,
        )
        for name, parameter in small.named_parameters():
            parameter.copy_(kept[name])
            parameter.requires_grad_(learns[name])
        for name, value in small.knobs.storage().items():
            value.copy_(knobs[name])
        small.train(self.training)
        small.knobs.version = self.knobs.version  # a cache of before is not one of after
        for name, part in (*small.named_parameters(recurse=False), *small.named_children()):
            setattr(self, name, part)
        self.config = config
        self.refresh()
        return self

    def generate(
        self,
        tokens: Integer[Tensor, "replica batch seq"],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "replica batch longer"]:
        """Continues sequences, one sampled token after the other; see `models.generation`."""
        return generate(
            self,
            tokens,
            max_new_tokens,
            context=self.config.context,
            temperature=temperature,
            top_p=top_p,
            generator=generator,
        )

    def trial_input(self, training: bool) -> dict[str, Any]:
        """Arguments of a short forward pass, for whoever wants to see what a knob does."""
        length = min(16, self.config.context)
        tokens = torch.arange(length, device=self.embedding.device) % self.config.vocab_size
        seeds = torch.arange(self.n_replicas, device=tokens.device)
        noise = Noise(seeds, torch.zeros_like(seeds)) if training else None
        return {"tokens": tokens.expand(self.n_replicas, 1, length), "noise": noise}

    def count_parameters(self) -> int:
        """Parameters of one replica."""
        return sum(p[0].numel() for p in self.parameters())

    # Forward ---------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Integer[Tensor, "replica batch seq"],
        noise: Noise | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "replica batch seq vocab"]:
        """Next-token logits.

        Args:
            tokens: Token ids of each replica; with a cache, those that follow what it holds.
            noise: Where each replica's dropout noise comes from; without it dropout is off.
            cache: Of the tokens before; what is computed is added to it.
        """
        before = 0 if cache is None else cache.length
        tokens = self._checked(tokens, self.config.context - before)
        if cache is None:
            return self._logits(tokens, noise, None)
        if noise is not None:
            raise ValueError("A cache is for generating; dropout noise is for training")
        seq, stale = tokens.shape[2], cache.version != self.knobs.version
        if before and (stale or not self.rotation.extends(before, before + seq)):
            assert cache.tokens is not None
            tokens = torch.cat((cache.tokens, tokens), dim=2)
            cache.clear()
        logits = self._logits(tokens, None, cache)
        cache.append_tokens(tokens, self.knobs.version)
        return logits[:, :, -seq:]

    @torch.no_grad()
    def internal_signals(
        self, tokens: Integer[Tensor, "replica batch seq"]
    ) -> dict[str, Float[Tensor, " replica"]]:
        """What goes on inside while these tokens are read, by name; see `models.internals`."""
        tokens = self._checked(tokens, self.config.context)
        self._logits(tokens, None, None, watch := Watch())
        return watch.signals()

    def _checked(self, tokens: Tensor, longest: int) -> Tensor:
        unseen = self.knobs.capturable or torch.compiler.is_compiling()
        n_tokens = None if unseen or tokens.device.type != "cpu" else self.config.vocab_size
        return checked_tokens(tokens, self.n_replicas, longest, n_tokens)

    def _logits(
        self,
        tokens: Tensor,
        noise: Noise | None,
        cache: KeyValueCache | None,
        watch: Watch | None = None,
    ) -> Tensor:
        state = self._prepare(tokens, noise, cache)
        state.watch = watch
        x = embed(tokens.flatten(1), self.embedding, state)
        for layer, module in enumerate(self.blocks):
            block = cast(nn.ParameterDict, module)
            x = x + attention(normalise(x, state), block, state, layer)
            x = x + feed_forward(normalise(x, state), block, state)
        weight = self.unembedding[:, : state.d_model] * self.final_norm[:, : state.d_model, None]
        x = normalise(x, state)
        if watch is not None:
            watch.final(x)
        return torch.bmm(x, weight).view(*tokens.shape, -1)

    def penalty(self) -> Float[Tensor, " replica"]:
        """What the rotation adds to the loss: its weight times ||R R^T - I||_F^2."""
        heads = self.knobs.head_channel_level[:: self.config.head_dim]
        return self.knobs.orthogonality_weight * self.rotation.penalty(self.knobs.gates[:, heads])

    def _prepare(self, tokens: Tensor, noise: Noise | None, cache: KeyValueCache | None) -> Pass:
        config, knobs = self.config, self.knobs
        share = config.width_levels[knobs.top_level] if self.sliced else 1.0
        d, hidden = round(config.d_model * share), round(config.hidden_units * share)
        heads = round(config.n_heads * share)
        dtype = self.embedding.dtype
        channel = knobs.channel_gates[:, :d].to(dtype)
        head_channels = knobs.head_channel_gates[:, : heads * config.head_dim].to(dtype)
        _, batch, seq = tokens.shape
        keep = None
        if noise is not None and knobs.dropout_on:
            keep = self._keep_masks(batch * seq, noise, d)
        offset = 0 if cache is None else cache.length
        return Pass(
            config=config,
            knobs=knobs,
            rotation=self.rotation,
            gate_model=channel[:, None, :],
            gate_heads=head_channels.repeat(1, 3)[:, None, :],
            gate_hidden=knobs.hidden_gates[:, None, :hidden].to(dtype),
            inverse_width=1 / knobs.channel_gates[:, :d].square().sum(dim=1)[:, None, None],
            d_model=d,
            n_heads=heads,
            hidden=hidden,
            keep=keep,
            rotary=self.rotation.prepare(offset + seq, knobs.rotation_strength, offset),
            batch=batch,
            cache=cache,
        )

    def reserve_noise(self, n_tokens: int) -> NoisePool:
        """The dropout noise of so many tokens, made once; call it before `torch.compile`."""
        window = n_tokens * self.config.d_model
        if self._pool is None or self._pool.window != window:
            self._pool = NoisePool(window, device=self.embedding.device)
        return self._pool

    def _keep_masks(self, n_tokens: int, noise: Noise, d: int) -> list[Tensor]:
        n_places = 1 + 2 * self.config.n_layers
        sizes = [len(noise.seeds), len(noise.steps)]
        if sizes != [self.n_replicas] * 2:
            raise ValueError(f"noise needs {self.n_replicas} seeds and steps each, got {sizes}")
        raw = self.reserve_noise(n_tokens).read(noise, n_places).unflatten(2, (n_tokens, -1))
        masks = keep_mask(raw[..., :d], self.knobs.dropout, self.embedding.dtype)
        return list(reversed(masks.unbind(1)))
