"""Attention span of transformers' models: a causal window on top of each layer's own mask."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metactl.adapters.base import (
    AttachError,
    ModelKnob,
    configs_of,
    is_compiled,
    longest_sequence,
    unwrapped,
)
from metactl.knobs import Knob

_KEY, _LONGEST = "attention_span", "attention_span_longest"  # in the model's config
_LAYER_TYPES = "layer_types"  # of models whose layers have windows of their own
_MISSING = object()
_HOLDER = "_metactl_span"
_ATTENTIONS = ("eager", "sdpa")
_SHORTEST = 4.0  # tokens


def narrowed(mask: Tensor, span: Tensor) -> Tensor:
    """A causal mask whose queries see only the nearest `span` keys.

    A query's position is that of the last key it may see; so padding and caches need no more said.

    Args:
        mask: `[batch or 1, head or 1, query, key]`; bool (True is seen), or added to the logits.
        span: Tokens that a query sees, itself included; a fraction rounds up.
    """
    lowest = None if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    seen = mask if lowest is None else mask > lowest
    keys = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(seen, keys, 0).amax(dim=-1, keepdim=True)
    far = last - keys >= span
    return mask & ~far if lowest is None else mask.masked_fill(far, lowest)


class SpanHolder:
    """Lets every attention layer of a model see the last tokens only.

    A pre-hook of each layer narrows the mask that the layer is given, so padding, packed
    sequences, caches and a window of the model's own stay in force. At full span the layers are
    called as ever.

    Args:
        model: The model, without wrappers.
        longest: Full span, in tokens.

    Attributes:
        value: The span in force; a fraction of a token rounds up.
    """

    def __init__(self, model: nn.Module, longest: float) -> None:
        self.longest = longest
        layers = attention_layers(model)
        self._ends = layers[0], layers[-1]  # of a forward pass
        self._span = torch.zeros((), device=next(layers[0].parameters()).device)
        self._known: tuple[Any, Tensor] | None = None  # the layer before: what it had, and got
        self.set(longest)
        self._handles = [
            layer.register_forward_pre_hook(self._narrow, with_kwargs=True) for layer in layers
        ]

    def set(self, value: float) -> None:
        self.value = min(value, self.longest)
        self.active = value < self.longest  # compiled code asks for this alone
        self._span.fill_(self.value)
        self._known = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _narrow(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.active:
            return None
        given = kwargs.get("attention_mask")
        key = given
        if given is None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            key = (hidden.shape[1], _n_keys(layer, hidden, kwargs), hidden.dtype, hidden.device)
        if torch.compiler.is_compiling():
            made = self._made(key)
        else:  # layers mostly share their mask; the next pass may have another in its place
            if self._known is None or layer is self._ends[0] or not _is_same(self._known[0], key):
                self._known = key, self._made(key)
            made = self._known[1]
            if layer is self._ends[1]:
                self._known = None
        return args, {**kwargs, "attention_mask": made}

    def _made(self, key: Any) -> Tensor:
        mask = key if isinstance(key, Tensor) else _causal(*key)
        return narrowed(mask, self._span.to(mask.device))


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, tuple) and isinstance(b, tuple) and a == b)


def _n_keys(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    n = hidden.shape[1]
    return n if cache is None else int(cache.get_mask_sizes(n, getattr(layer, "layer_idx", 0))[0])


def _causal(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a layer without a mask stands for, as numbers that every kind of attention adds."""
    lowest = torch.full((queries, keys), torch.finfo(dtype).min, dtype=dtype, device=device)
    return lowest.triu(keys - queries + 1)[None, None]


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that compute causal attention under an `attention_mask`."""
    return [
        module
        for module in model.modules()
        if getattr(module, "is_causal", False) is True
        and "attention_mask" in inspect.signature(module.forward).parameters
    ]


def hold_span(model: nn.Module) -> None:
    """Puts the span that a checkpoint carries (`config.attention_span`) in force, for good.

    Where `config.sliding_window` follows (see `AttentionSpanKnob`) the model has it without this.

    Raises:
        AttachError: If the model's attention cannot be narrowed.
    """
    inner = unwrapped(model)
    spans = [span for config in configs_of(inner) if (span := getattr(config, _KEY, None))]
    if spans and not hasattr(inner, _HOLDER):
        (span, *_) = spans
        _checked(inner)
        holder = SpanHolder(inner, math.inf)
        holder.set(float(span))
        setattr(inner, _HOLDER, holder)


def _checked(model: nn.Module) -> Any:
    """The config of the attention layers, if they can be narrowed."""
    own = getattr(model, "config", None)
    configs = [getattr(layer, "config", own) for layer in attention_layers(model)]
    kinds = {getattr(config, "_attn_implementation", None) for config in configs}
    if not kinds or None in kinds:
        raise AttachError("the model has no causal attention layers as transformers makes them")
    for kind in kinds - set(_ATTENTIONS):
        raise AttachError(f"it needs eager or sdpa attention, the model has {kind!r}")
    return configs[0]


class AttentionSpanKnob(ModelKnob):
    """Moves the number of tokens that every attention layer sees.

    `config.attention_span` follows (see `hold_span`), and where it is the window of all layers,
    `config.sliding_window` too, unless compiled; so a saved checkpoint carries the value in force.
    What was compiled before is compiled anew, since it would not call the hooks.

    Args:
        model: The model.
        trial: Computes the model's output in the given mode.
        longest: Longest sequence in tokens; without it, what the config allows.
        compiled: Whether it runs through `torch.compile`; by default as it looks.
    """

    def __init__(
        self,
        model: nn.Module,
        trial: Callable[[bool], Tensor],
        longest: int | None = None,
        *,
        compiled: bool | None = None,
    ) -> None:
        super().__init__(model, lambda: trial(False))
        compiled = is_compiled(model, compiled)
        inner = unwrapped(model)
        self._inner, self._config = inner, _checked(inner)
        windowed = hasattr(self._config, "sliding_window") and not self._of(_LAYER_TYPES)
        window = self._of("sliding_window") if windowed else None
        written = [_KEY, _LONGEST]
        if windowed and not compiled:  # a window of whole tokens compiles anew each time
            written.append("sliding_window")
        self._entries = {name: self._of(name, _MISSING) for name in written}
        # A config that carries a longest span was left by a controller, and so may its window be.
        high = longest_sequence(self._config, longest, self._of(_LONGEST) or window)
        if high is None:
            raise AttachError("the longest sequence is not known; give attach an example of it")
        held: SpanHolder | None = getattr(inner, _HOLDER, None)
        if held is not None:
            self._first = min(held.value, high)
            held.longest = high
        else:
            self._first = min(self._window_in_force(window), high)
            held = SpanHolder(inner, high)
            setattr(inner, _HOLDER, held)
            if compiled:
                torch.compiler.reset()
        self._holder = held
        held.set(self._first)
        self.knob = Knob(
            name="attention_span",
            low=min(_SHORTEST, high / 2),
            high=high,
            default=self._first,
            scale="log2",
            unit="tokens",
        )

    def read(self) -> float:
        return self._holder.value

    def write(self, value: float) -> None:
        self._holder.set(float(value))
        numbers = {_KEY: float(value), _LONGEST: self.knob.high, "sliding_window": math.ceil(value)}
        for name in self._entries:
            setattr(self._config, name, numbers[name])

    def restore(self) -> None:
        self._holder.set(self._first)
        for name, value in self._entries.items():
            if value is not _MISSING:
                setattr(self._config, name, value)
            elif hasattr(self._config, name):
                delattr(self._config, name)

    def close(self) -> None:
        if not self._holder.active and getattr(self._inner, _HOLDER, None) is self._holder:
            self._holder.remove()
            delattr(self._inner, _HOLDER)

    def far(self) -> float:
        """Short where it can be: a trial on few tokens sees no difference between long spans."""
        return self.knob.high if self.read() == self.knob.low else self.knob.low

    def _window_in_force(self, window: float | None) -> float:
        """Of a model without hooks: its own window, before the span was rounded up to it."""
        if not window:
            return math.inf
        span = self._of(_KEY)
        return float(span if span is not None and math.ceil(span) == window else window)

    def _of(self, name: str, default: Any = None) -> Any:
        return getattr(self._config, name, default)
