"""The shape of an adaptive transformer, validated once where it is stated."""

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from numbers import Real
from typing import Any

import torch

from models.rotary.component import Shape
from models.rotary.config import RotationConfig, parse_rotation
from models.rotary.frequencies import useful_base

LARGEST_BASE = 1e9
_SHORTEST_RAMP = 0.1  # tokens; where it is steeper, rounding decides between executions
FEED_FORWARDS = ("gelu", "swiglu")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of an `AdaptiveTransformer`; knob defaults are part of it.

    Args:
        vocab_size: Number of distinct tokens (256 for bytes).
        d_model: Channels of the residual stream at full width.
        n_layers: Number of blocks.
        n_heads: Attention heads at full width; must divide `d_model` into even head dimensions.
        context: Longest sequence, in tokens.
        d_ff: Hidden units of the feed-forward layer at full width; `None` means `4 * d_model`.
        feed_forward: `"gelu"` or `"swiglu"`.
        width_levels: Increasing fractions of the width that can be active; the last one is 1.
        rotation: Variants by name, joined by `+`, or the fields of a `RotationConfig`.
        rope_base: Default base of the rotary frequencies.
        span_ramp: Tokens over which the attention span fades to zero; `None` means `context / 8`.

    Raises:
        ValueError: If the numbers do not fit together; the message names the field and the value.
    """

    vocab_size: int = 256
    d_model: int = 32
    n_layers: int = 2
    n_heads: int = 4
    context: int = 32
    d_ff: int | None = None
    feed_forward: str = "gelu"
    width_levels: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    rotation: str | Mapping[str, Any] = "rope"
    rope_base: float = 10_000.0
    span_ramp: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "context", "d_ff"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not ((whole and value >= 1) or (name == "d_ff" and value is None)):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.feed_forward not in FEED_FORWARDS:
            known = ", ".join(FEED_FORWARDS)
            raise ValueError(f"feed_forward must be one of {known}, got {self.feed_forward!r}")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"d_model / n_heads must be an even whole number (rotations act on pairs), "
                f"got d_model={self.d_model}, n_heads={self.n_heads}"
            )
        if not _is_number(self.rope_base) or not 1 < self.rope_base <= LARGEST_BASE:
            raise ValueError(
                f"rope_base must be a number in (1, {LARGEST_BASE:g}], got {self.rope_base!r}"
            )
        ramp = self.span_ramp
        if ramp is not None and not (_is_number(ramp) and _SHORTEST_RAMP <= ramp < math.inf):
            raise ValueError(
                f"span_ramp must be finite and at least {_SHORTEST_RAMP} tokens, got {ramp!r}"
            )
        if isinstance(self.rotation, Mapping):  # nobody changes it afterwards
            object.__setattr__(self, "rotation", deepcopy(dict(self.rotation)))
        self._check_width_levels()
        self.rotary.check_shape(self.head_dim, self.context)
        needed = useful_base(self.context)
        if self.rotary.positions == "rope" and self.rope_base < needed:
            warnings.warn(
                f"rope_base={self.rope_base:g} is below the useful bound of about {needed:.0f} "
                f"for a context of {self.context} tokens (arXiv 2405.14591)",
                stacklevel=4,
            )

    def _check_width_levels(self) -> None:
        levels = self.width_levels
        if not isinstance(levels, tuple | list) or not all(_is_number(each) for each in levels):
            raise ValueError(f"width_levels must be a list of numbers, got {levels!r}")
        object.__setattr__(self, "width_levels", tuple(self.width_levels))  # as JSON gives them
        levels = self.width_levels
        increasing = all(a < b for a, b in pairwise(levels))
        if not levels or levels[-1] != 1 or levels[0] <= 0 or not increasing:
            raise ValueError(f"width_levels must increase from above 0 to exactly 1, got {levels}")
        for name in ("n_heads", "hidden_units"):
            full = getattr(self, name)
            for level in levels:
                if not _is_whole(full * level):
                    fitting = (n for n in range(1, 101) if all(_is_whole(n * x) for x in levels))
                    advice = next((f", such as a multiple of {n}" for n in fitting), "")
                    raise ValueError(
                        f"{name}={full}: width level {level} leaves {full * level:g} of them, and "
                        f"every level must leave a whole number{advice}"
                    )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @cached_property
    def rotary(self) -> RotationConfig:
        """The rotation, spelt out."""
        return parse_rotation(self.rotation)

    def rotation_shape(
        self,
        n_replicas: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Shape:
        """Sizes that the rotation of such models is built for."""
        return Shape(
            n_replicas=n_replicas,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            head_dim=self.head_dim,
            context=self.context,
            dtype=dtype,
            device=device,
        )

    @property
    def hidden_units(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def ramp(self) -> float:
        """Length of the span's soft edge, in tokens."""
        return max(1.0, self.context / 8) if self.span_ramp is None else self.span_ramp

    def knob_ranges(self) -> dict[str, dict[str, Any]]:
        """Where a controller may move each knob: the fields of a `Knob`, all but its default.

        A base of a quarter of the context is the smallest: then the slowest pair of a large head,
        whose wavelength is nearly 2 pi times the base, just does not come round within the context.
        """
        levels = self.width_levels
        return {
            "rope_base": {
                "low": min(max(self.context / 4, 4.0), self.rope_base),
                "high": max(1e6, self.rope_base),
                "scale": "log2",
                "unit": "base",
            },
            "attention_span": {
                "low": max(1.0, min(4.0, self.context / 2)),
                "high": float(self.context),
                "scale": "log2",
                "unit": "tokens",
            },
            "embedding_width": {
                "low": levels[0],
                "high": 1.0,
                "scale": "levels",
                "levels": levels,
                "max_move": 1.0,  # every change of width is a shock: at most once across in a run
                "unit": "fraction",
            },
            "dropout": {"low": 0.0, "high": 0.6, "scale": "linear", "unit": "probability"},
            "position_scale": {"low": 0.125, "high": 8.0, "scale": "log2", "unit": "factor"},
            "rotation_strength": {"low": 0.0, "high": 2.0, "scale": "linear", "unit": "factor"},
            "orthogonality_weight": {"low": 1e-3, "high": 10.0, "scale": "log2", "unit": "weight"},
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(number: float) -> bool:
    return round(number) >= 1 and math.isclose(number, round(number), abs_tol=1e-9)
