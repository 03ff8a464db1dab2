"""RoPE base of transformers' models: the configuration's entry and the buffers made from it."""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from metactl.adapters.base import AttachError, ModelKnob, longest_sequence, unwrapped
from metactl.knobs import Knob

_KEY = "rope_theta"  # transformers' name for the base
_FULL = "full_attention"
_PLAIN = ("inv_freq", "original_inv_freq")


class RopeBaseKnob(ModelKnob):
    """Moves the base by rewriting the inverse frequencies in place.

    The configuration's `rope_parameters` follows: the buffers are not part of a checkpoint, and a
    reloaded model makes them from there. Where layer types have bases of their own, that of the
    full attention moves.

    The smallest base is a quarter of the longest sequence: then the slowest pair, whose wavelength
    is 2 pi times the base, just does not come round within it.

    Args:
        model: The model.
        trial: Computes the model's output in the given mode.
        longest: Longest sequence in tokens; without it, what the config allows.
    """

    def __init__(
        self, model: nn.Module, trial: Callable[[bool], Tensor], longest: int | None = None
    ) -> None:
        super().__init__(model, lambda: trial(False))
        inner = unwrapped(model)
        self._rotaries = [m for m in inner.modules() if _buffers(m) and hasattr(m, "config")]
        if not self._rotaries:
            raise AttachError("the model has none of transformers' rotary embeddings")
        self._parameters = [_parameters(m.config) for m in self._rotaries]
        bases = {float(p[_KEY]) for p in self._parameters}
        if len(bases) > 1:
            raise AttachError(f"the model has several bases: {sorted(bases)}")
        self._first = self._parameters[0][_KEY]
        self._tensors = [
            [(buffer, buffer.detach().clone()) for buffer in _buffers(m)] for m in self._rotaries
        ]
        base = float(self._first)
        tokens = longest_sequence(self._rotaries[0].config, longest) or 0.0
        self.knob = Knob(
            name="rope_base",
            low=min(max(tokens / 4, 4.0), base),
            high=max(1e6, base),
            default=base,
            scale="log2",
            unit="base",
        )

    def read(self) -> float:
        return float(self._parameters[0][_KEY])

    def write(self, value: float) -> None:
        for rotary, parameters in zip(self._rotaries, self._parameters, strict=True):
            parameters[_KEY] = float(value)
            made = _frequencies(rotary)
            with torch.no_grad():
                for buffer, frequencies in zip(_buffers(rotary), made, strict=True):
                    buffer.copy_(frequencies)

    def restore(self) -> None:
        for parameters in self._parameters:
            parameters[_KEY] = self._first
        for rotary, kept in zip(self._rotaries, self._tensors, strict=True):
            live, made = _buffers(rotary), _frequencies(rotary)
            with torch.no_grad():
                for now, (then, value), frequencies in zip(live, kept, made, strict=True):
                    # A dynamic embedding makes new buffers for sequences longer than any before.
                    now.copy_(value if now is then else frequencies)


def _buffers(module: nn.Module) -> list[Tensor]:
    return list(_named_buffers(module).values())


def _named_buffers(module: nn.Module) -> dict[str, Tensor]:
    names = (*_PLAIN, *(f"{_FULL}_{name}" for name in _PLAIN))
    own = dict(module.named_buffers(recurse=False))
    return {name: own[name] for name in names if name in own}


def _parameters(config: Any) -> MutableMapping[str, Any]:
    found = next(_with_base(getattr(config, "rope_parameters", None)), None)
    if found is None:
        raise AttachError("the model's config has no rope_parameters with a rope_theta")
    return found


def _with_base(parameters: Any) -> Iterator[MutableMapping[str, Any]]:
    if isinstance(parameters, MutableMapping):
        if _KEY in parameters:
            yield parameters
        elif _FULL in parameters:
            yield from _with_base(parameters[_FULL])


def _frequencies(rotary: Any) -> list[Tensor]:
    """What belongs into its buffers, by the function with which the model itself made them."""
    kind = rotary.rope_type
    options: dict[str, Any] = {}
    if isinstance(kind, MutableMapping):
        kind, options = kind[_FULL], {"layer_type": _FULL}
    if kind == "default":
        make = rotary.compute_default_rope_parameters
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        make = ROPE_INIT_FUNCTIONS[kind]
    made = []
    for name in _named_buffers(rotary):
        seen = {}
        if kind == "dynamic" and "original" not in name:  # stretched for the longest sequence
            cached = rotary.max_seq_len_cached
            seen["seq_len"] = getattr(rotary, f"{_FULL}_max_seq_len_cached", cached)
        made.append(make(rotary.config, **options, **seen)[0])
    return made
