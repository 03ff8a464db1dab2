"""The knobs of an adaptive transformer: values per replica, changed in place while it trains."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import SharedSpan, causal_distance, span_log_weight
from models.config import LARGEST_BASE, TransformerConfig
from models.device import brought
from models.width import level_of_channel, nearest_level, stepped_gates

KNOB_NAMES = (
    "rope_base",
    "attention_span",
    "embedding_width",
    "dropout",
    "position_scale",
    "rotation_strength",
    "orthogonality_weight",
)
_ROUNDED = 1.01  # what a coarser type may make of a value
_BUFFERS = {"rope_base": "log_base", "embedding_width": "width_level"}  # others: their own name


class Knobs(nn.Module):
    """Knob values `[n_replicas]` in buffers, and the tables derived from them.

    The values are part of `state_dict`; the tables are rebuilt when a value moved, and only then.
    A change of width fades in and out: `embedding_width` sets the level asked for, and
    `step_gates` moves the gates towards it.

    Args:
        config: The shape, with the defaults.
        n_replicas: How many transformers.
        device: Where the values live.
        dtype: Type of the model's parameters.
        sliced: Whether all replicas must share width and span.
        capturable: Whether what is computed must not depend on the values, only what comes out.
        base_shape: Shape of one replica's bases: none, per layer, or per layer and head.

    Attributes:
        version: Changes whenever a value does, so that what was computed before can be told.
    """

    log_base: Tensor
    attention_span: Tensor
    width_level: Tensor
    gates: Tensor
    dropout: Tensor
    position_scale: Tensor
    rotation_strength: Tensor
    orthogonality_weight: Tensor
    span_bias: Tensor
    channel_gates: Tensor
    head_channel_gates: Tensor
    hidden_gates: Tensor
    channel_level: Tensor
    head_channel_level: Tensor
    hidden_level: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        n_replicas: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
        sliced: bool,
        capturable: bool = False,
        base_shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.config, self.n_replicas, self.sliced = config, n_replicas, sliced
        self.capturable = capturable
        self.version = 0
        levels, n = config.width_levels, n_replicas
        precise = torch.float64 if dtype == torch.float64 else torch.float32

        def full(value: float, *shape: int) -> Tensor:
            return torch.full((n, *shape), value, device=device, dtype=precise)

        self.register_buffer("log_base", full(math.log(config.rope_base), *base_shape))
        self.register_buffer("attention_span", full(float(config.context)))
        self.register_buffer("width_level", full(0.0).long() + len(levels) - 1)
        self.register_buffer("gates", full(1.0)[:, None].repeat(1, len(levels)))
        self.register_buffer("dropout", full(0.0))
        self.register_buffer("position_scale", full(1.0))
        self.register_buffer("rotation_strength", full(1.0))
        self.register_buffer("orthogonality_weight", full(config.rotary.orthogonality_weight))
        for name, size in (
            ("channel", config.d_model),
            ("head_channel", config.d_model),
            ("hidden", config.hidden_units),
        ):
            level = level_of_channel(size, levels).to(device)
            self.register_buffer(f"{name}_level", level, persistent=False)
            self.register_buffer(f"{name}_gates", full(1.0, size), persistent=False)
        table = torch.zeros(
            0 if sliced else n, config.context, config.context, device=device, dtype=precise
        )
        self.register_buffer("span_bias", table, persistent=False)
        self.register_load_state_dict_post_hook(Knobs.require_valid)
        self.refresh()

    def bounds(self, name: str) -> tuple[float, float]:
        """Smallest and largest value that is accepted."""
        ranges = {
            "rope_base": (1.0, LARGEST_BASE),
            "attention_span": (1.0, float(self.config.context)),
            "embedding_width": (0.0, 1.0),
            "dropout": (0.0, 0.95),
            "position_scale": (0.0, 1e3),
            "rotation_strength": (0.0, 1e3),
            "orthogonality_weight": (0.0, 1e6),
        }
        if name not in ranges:
            raise ValueError(f"Unknown knob {name!r}. Known: {', '.join(KNOB_NAMES)}")
        return ranges[name]

    def assign(self, values: Mapping[str, Any], rows: Sequence[int] | None = None) -> None:
        """Sets values in place; see `AdaptiveTransformer.set_knobs`."""
        index = self.index(rows)
        stored: dict[str, Tensor] = {}
        for name, value in values.items():  # on the CPU, and all before any is written
            self.bounds(name)  # refuses a name that is none
            try:
                tensor = torch.as_tensor(value, dtype=self.log_base.dtype, device="cpu").detach()
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"{name} must be numbers, got {value!r}") from None
            stored |= self._stored(name, self._per_row(name, tensor, len(index)), index)
        device = self.gates.device
        for buffer, value in stored.items():
            if rows is None:
                getattr(self, buffer).copy_(brought(value, device))
            else:
                getattr(self, buffer)[brought(index, device)] = brought(value, device)
        self.refresh(set(values))

    def index(self, rows: Sequence[int] | None) -> Tensor:
        """Replicas as indices; all by default.

        Raises:
            ValueError: For what is none of them.
        """
        if rows is None:
            return torch.arange(self.n_replicas)
        chosen = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        for row in chosen:
            whole = isinstance(row, Integral) and not isinstance(row, bool)
            if not whole or not 0 <= row < self.n_replicas:
                raise ValueError(f"rows must be indices below {self.n_replicas}, got {row!r}")
        return torch.tensor(chosen, dtype=torch.int64)

    def _per_row(self, name: str, value: Tensor, n_rows: int) -> Tensor:
        """A value for each row, shaped like the knob's buffer (bases may differ by layer)."""
        shape = getattr(self, _BUFFERS.get(name, name)).shape[1:]
        trailing = 0 if value.dim() <= 1 else value.dim() - 1
        value = value.view(*value.shape, *(1,) * (len(shape) - trailing)) if value.dim() else value
        try:
            return value.expand(n_rows, *shape)
        except RuntimeError:
            raise ValueError(
                f"{name} must be one number, or of shape {[n_rows, *shape]}, "
                f"got {list(value.shape)}"
            ) from None

    def _stored(self, name: str, value: Tensor, index: Tensor) -> dict[str, Tensor]:
        """What a knob's buffer holds for a value, by the buffer's name."""
        low, high = self.bounds(name)
        if not bool(((value >= low) & (value <= high)).all()):
            raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value.tolist()}")
        buffer, stored = _BUFFERS.get(name, name), value
        if name == "rope_base":
            stored = value.log()
        elif name == "embedding_width":
            stored = nearest_level(value, self.config.width_levels)
        if self.sliced and buffer in ("attention_span", "width_level"):
            moved = getattr(self, buffer).cpu().index_copy(0, index, stored)
            _require_shared(name, moved.tolist())
        return {buffer: stored}

    def values(self) -> dict[str, Tensor]:
        """Values in force, each `[n_replicas]` (bases may have a layer and a head dimension)."""
        return {
            "rope_base": self.log_base.exp(),
            "attention_span": self.attention_span.clone(),
            "embedding_width": self._widths()[self.width_level],
            "dropout": self.dropout.clone(),
            "position_scale": self.position_scale.clone(),
            "rotation_strength": self.rotation_strength.clone(),
            "orthogonality_weight": self.orthogonality_weight.clone(),
        }

    def computed_width(self) -> Tensor:
        """Share of the width that a step computes: what is asked for, or has not faded yet."""
        still_open = (self.gates > 0).sum(dim=1) - 1
        return self._widths()[torch.maximum(self.width_level, still_open)]

    def _widths(self) -> Tensor:
        """Share of the width of each level, where the knobs live."""
        return brought(torch.tensor(self.config.width_levels), self.gates.device)

    def step_gates(self, rate: float) -> None:
        """Moves the width gates by at most `rate`, above 0, towards the levels asked for."""
        if not rate > 0:
            raise ValueError(f"The rate of the gates must be above 0, got {rate}")
        if self.gates_moving:
            self.gates.copy_(stepped_gates(self.gates, self.width_level, rate))
            self.refresh({"embedding_width"})

    def settle_gates(self, rows: Sequence[int] | Tensor) -> None:
        """Opens and closes the gates of some replicas at once, as at the start of a run.

        Args:
            rows: Which, or a mask `[n_replicas]`.
        """
        if self.gates_moving:
            chosen = rows
            if not isinstance(chosen, Tensor):
                chosen = torch.zeros(self.n_replicas, dtype=torch.bool)
                chosen[list(rows)] = True
            settled = stepped_gates(self.gates, self.width_level, 1.0)
            chosen = chosen.to(settled.device)[:, None]
            moved = torch.where(chosen, settled, self.gates)
            if self.sliced:
                _require_shared("embedding_width", moved.tolist())
            self.gates.copy_(moved)
            self.refresh({"embedding_width"})

    def storage(self, knobs: Sequence[str] = KNOB_NAMES) -> dict[str, Tensor]:
        """The buffers behind the values, each with a leading replica dimension; after writing
        to them, call `AdaptiveTransformer.refresh`.
        """
        names = [_BUFFERS.get(name, name) for name in knobs]
        names += ["gates"] if "embedding_width" in knobs else []
        return {name: getattr(self, name) for name in names}

    def require_valid(self, *_: object) -> None:
        """Refuses values that no knob takes, as a damaged file may hold them: after loading.

        A span that was learned in a longer context becomes the whole of this one. Values may have
        been rounded to a coarser type: past the end of a range they become its end.

        Raises:
            ValueError: The message names the knob.
        """
        self.attention_span.clamp_(max=self.config.context)
        for name in KNOB_NAMES:
            low, high = self.bounds(name)
            stored = getattr(self, _BUFFERS.get(name, name))
            if name == "rope_base":
                low, high = 0.0, math.log(high)
            elif name == "embedding_width":
                low, high = 0, len(self.config.width_levels) - 1
            if not bool(((stored >= low / _ROUNDED) & (stored <= high * _ROUNDED)).all()):
                raise ValueError(
                    f"The loaded {_BUFFERS.get(name, name)} must be in [{low:g}, {high:g}], "
                    f"got {stored.tolist()}"
                )
            stored.clamp_(low, high)
        gates = self.gates
        if not bool(((gates >= 0) & (gates <= 1)).all() and (gates[:, 0] > 0).all()):
            raise ValueError(
                f"The loaded gates must be in [0, 1], the first of each replica above 0, "
                f"got {gates.tolist()}"
            )

    def keep_precision(self, values: Mapping[str, Tensor]) -> None:
        """Undoes a cast of the values to a type too coarse for them, but not a move."""
        for name, value in values.items():
            now = getattr(self, name)
            if now.is_floating_point() and now.dtype not in (torch.float32, torch.float64):
                setattr(self, name, value.to(now.device))

    def refresh(self, moved: set[str] | None = None) -> None:
        """Rebuilds what depends on the knobs that moved (all of them by default)."""
        self.version += 1
        if moved is None or "attention_span" in moved:
            self._refresh_span()
        if moved is None or "embedding_width" in moved:
            self._refresh_gates()
        if moved is None or "dropout" in moved:
            self.dropout_on = self.capturable or bool((self.dropout > 0).any())

    def _refresh_span(self) -> None:
        if self.sliced:
            spans = self.attention_span.tolist()
            _require_shared("attention_span", spans)
            self._span = SharedSpan.of(spans[0], self.config.ramp)
            self._reach_level = 1 << (self._span.reach - 1).bit_length()
            self._whole_level = self.config.context * (self.config.context <= self._span.whole)
            return
        span = self.attention_span
        distance = causal_distance(self.config.context, device=span.device, dtype=span.dtype)
        self.span_bias.copy_(span_log_weight(distance, span, self.config.ramp))

    def shared_span(self) -> SharedSpan:
        """The span of all replicas, in sliced execution.

        Compiled, the program is one for spans up to each power of two, not for every span.
        """
        if torch.compiler.is_compiling():
            return SharedSpan(self.attention_span[:1], self._reach_level, self._whole_level)
        return self._span

    def span_bias_rows(self, first: int, seq: int) -> Tensor:
        """Log weights of `seq` keys for the queries `first` .. seq - 1, `[replica, query, key]`."""
        if not self.sliced:
            return self.span_bias[:, first:seq, :seq]
        span = self.attention_span
        positions = torch.arange(seq, device=span.device, dtype=span.dtype)
        distance = positions[first:, None] - positions
        return span_log_weight(distance, span, self.config.ramp)

    def _refresh_gates(self) -> None:
        gates = self.gates
        for name in ("channel", "head_channel", "hidden"):  # written in place: graphs read there
            level, spread = getattr(self, f"{name}_level"), getattr(self, f"{name}_gates")
            spread.copy_(gates.index_select(1, level))
        if self.capturable:
            self.gates_moving, self.all_open = True, False
            return
        target = torch.arange(gates.shape[1], device=gates.device) <= self.width_level[:, None]
        self.gates_moving = bool((gates != target).any())
        self.all_open = bool((gates == 1).all())
        if self.sliced:
            _require_shared("embedding_width", gates.tolist())
            self.top_level = int((gates[0] > 0).nonzero().max())

    def parameter_levels(self) -> dict[str, Tensor]:
        """The width level of every element of every parameter, shaped like one replica's.

        An element belongs to the lowest level at which it takes part; it is inactive while
        that level's gate is 0.
        """
        channel, heads, hidden = self.channel_level, self.head_channel_level, self.hidden_level
        hidden_in = hidden.repeat(2 if self.config.feed_forward == "swiglu" else 1)
        vocabulary = torch.zeros(self.config.vocab_size, dtype=torch.long, device=channel.device)

        def outer(rows: Tensor, columns: Tensor) -> Tensor:
            return torch.maximum(rows[:, None], columns[None, :])

        levels = {
            "embedding": outer(vocabulary, channel),
            "final_norm": channel,
            "unembedding": outer(channel, vocabulary),
        }
        for i in range(self.config.n_layers):
            levels |= {
                f"blocks.{i}.attention_norm": channel,
                f"blocks.{i}.qkv": outer(channel, heads.repeat(3)),
                f"blocks.{i}.attention_out": outer(heads, channel),
                f"blocks.{i}.ffn_norm": channel,
                f"blocks.{i}.ffn_in": outer(channel, hidden_in),
                f"blocks.{i}.ffn_out": outer(hidden, channel),
            }
        return levels


def _require_shared(name: str, values: list[Any]) -> None:
    if any(value != values[0] for value in values):
        raise ValueError(f"Sliced execution needs one {name} for all replicas, got {values}")
