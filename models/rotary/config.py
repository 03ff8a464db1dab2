"""What a rotation is made of, the names of the variants, and which combinations make no sense."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from models.rotary.bias import BIASES
from models.rotary.frequencies import SCALINGS, xpos_reach
from models.rotary.givens import SCHEDULES, partners
from models.rotary.orthogonal import PARAMETRISATIONS

BASE_SHAPES = ("replica", "layer", "head")
POSITIONS = ("rope", "none")
_TURNING = (
    "rotary_share",
    "base_per",
    "base_factors",
    "learn_frequencies",
    "polar",
    "learn_position_scale",
    "xpos",
    "scaling",
)


@dataclass(frozen=True, kw_only=True)
class RotationConfig:
    """How positions enter attention; the parts combine.

    Args:
        positions: `"rope"`, or `"none"`: queries and keys are not turned by position (NoPE).
        rotary_share: Share of each head's pairs that turn; the others carry no position.
        base_per: What has a base of its own: each `"replica"`, `"layer"` or `"head"`.
        base_factors: Factors of the base for groups of heads; head h gets the h-th, cyclically
            (layers instead of heads, where each layer has a base of its own).
        learn_frequencies: Learned change of every pair's log frequency, on top of the base.
        polar: Non-negative magnitudes that turn, one frequency per channel, and learned phases
            on the keys (PoPE, arXiv 2509.10534).
        learn_position_scale: Learned multiplier of the positions, per head.
        learn_temperature: Learned multiplier of the logits, per head.
        givens: Schedule of a learned Givens product, `"round_robin"` or `"butterfly"`.
        n_rotations: Givens products per head.
        orthogonal: Parametrisation of a learned matrix R, orthogonal at the start: `"free"`,
            `"cayley"`, `"exp"` or `"householder"`.
        orthogonality_weight: Default weight of ||R R^T - I||^2 in the loss.
        share_layers: One set of learned rotations and biases for all layers.
        conditional: Angles accumulated from the tokens in between.
        value_rotation: Values are turned as keys are, and the output is turned back.
        bias: Learned relative bias: `"t5"`, `"alibi"`, `"kerple"` or `"fire"`.
        xpos: Magnitudes that decay with distance.
        scaling: For sequences longer than in training: `"linear"`, `"ntk"`, `"dynamic"`, `"yarn"`.
        scaling_factor: How many times longer.
        trained_context: Tokens per sequence in training; `None` is the context, divided by
            `scaling_factor` where there is a scaling.

    Raises:
        ValueError: For a value out of range or a combination that makes no sense.
    """

    positions: str = "rope"
    rotary_share: float = 1.0
    base_per: str = "replica"
    base_factors: tuple[float, ...] = (1.0,)
    learn_frequencies: bool = False
    polar: bool = False
    learn_position_scale: bool = False
    learn_temperature: bool = False
    givens: str | None = None
    n_rotations: int = 1
    orthogonal: str | None = None
    orthogonality_weight: float = 0.0
    share_layers: bool = False
    conditional: bool = False
    value_rotation: bool = False
    bias: str | None = None
    xpos: bool = False
    scaling: str | None = None
    scaling_factor: float = 4.0
    trained_context: int | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("positions", POSITIONS),
            ("base_per", BASE_SHAPES),
            ("givens", (None, *SCHEDULES)),
            ("orthogonal", (None, *PARAMETRISATIONS)),
            ("bias", (None, *BIASES)),
            ("scaling", (None, *SCALINGS)),
        ):
            value = getattr(self, name)
            if value not in known:
                names = ", ".join(str(each) for each in known)
                raise ValueError(f"rotation: {name} must be one of {names}, got {value!r}")
        self._check_ranges()
        self._check_combination()

    def _check_ranges(self) -> None:
        trained = self.trained_context
        for name, fits, wanted in (
            ("rotary_share", 0 < self.rotary_share <= 1, "in (0, 1]"),
            ("n_rotations", self.n_rotations >= 1, "at least 1"),
            ("orthogonality_weight", 0 <= self.orthogonality_weight <= 1e6, "in [0, 1e6]"),
            ("scaling_factor", 1 <= self.scaling_factor <= 1e6, "in [1, 1e6]"),
            ("base_factors", _factors(self.base_factors), "one or more in [1e-9, 1e9]"),
            ("trained_context", trained is None or trained >= 1, "at least 1 token"),
        ):
            if not fits:
                raise ValueError(f"rotation: {name} must be {wanted}, got {getattr(self, name)}")

    def _check_combination(self) -> None:
        if self.positions == "none":
            for name in (name for name in self.changes() if name in _TURNING):
                if getattr(self, name):
                    raise ValueError(
                        f"rotation: {name} changes how positions turn, and with "
                        f"positions='none' nothing turns; drop one of the two"
                    )
        if self.value_rotation and self.positions == "none" and not self.conditional:
            raise ValueError(
                "rotation: value_rotation turns values by their position, and with "
                "positions='none' and without conditional angles nothing turns"
            )
        if self.orthogonality_weight > 0 and self.orthogonal != "free":
            raise ValueError(
                f"rotation: orthogonality_weight={self.orthogonality_weight} needs "
                f"orthogonal='free', got {self.orthogonal!r}"
            )
        if self.polar and self.value_rotation:
            raise ValueError(
                "rotation: polar has one frequency per channel and value_rotation one per pair; "
                "choose one of them"
            )
        if self.n_rotations > 1 and self.givens is None:
            raise ValueError(f"rotation: n_rotations={self.n_rotations} needs givens")
        if self.scaling is None and self.scaling_factor != RotationConfig.scaling_factor:
            raise ValueError(f"rotation: scaling_factor={self.scaling_factor:g} needs scaling")

    def check_shape(self, head_dim: int, context: int) -> None:
        """Refuses a head dimension or context that does not suit.

        Raises:
            ValueError: The message names the field and the value.
        """
        if self.givens is not None:
            try:
                partners(self.givens, head_dim)
            except ValueError as error:
                raise ValueError(f"rotation: {error} (head_dim)") from None
        if self.rotary_channels(head_dim) < 2:
            raise ValueError(
                f"rotation: rotary_share={self.rotary_share} of head_dim={head_dim} leaves no pair"
            )
        frequencies = self.rotary_channels(head_dim) * (2 if self.polar else 1) // 2
        if self.scaling in ("ntk", "dynamic") and frequencies == 1:
            raise ValueError(
                f"rotation: scaling={self.scaling!r} raises a base that one pair alone does not "
                f"have; head_dim={head_dim} leaves one"
            )
        if self.xpos and context > xpos_reach():
            raise ValueError(
                f"rotation: xpos reaches over at most {xpos_reach()} tokens (its magnitudes grow "
                f"with the context), got context={context}"
            )
        if self.trained_context is not None and self.trained_context > context:
            raise ValueError(
                f"rotation: trained_context must be at most the context of {context} tokens, "
                f"got {self.trained_context}"
            )

    def rotary_channels(self, head_dim: int) -> int:
        """Channels of a head that turn, an even number."""
        return 2 * round(self.rotary_share * head_dim / 2)

    def trained_on(self, context: int) -> int:
        """Tokens per sequence in training."""
        if self.trained_context is not None:
            return self.trained_context
        return max(1, round(context / self.scaling_factor)) if self.scaling else context

    @property
    def static_matrices(self) -> bool:
        """Whether something can be folded into the projections of queries and keys."""
        return bool(self.givens or self.orthogonal or (self.learn_temperature and not self.polar))

    def changes(self) -> dict[str, Any]:
        """The fields that differ from plain RoPE."""
        plain = RotationConfig()
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value != getattr(plain, name)}

    def without_static_matrices(self) -> dict[str, Any]:
        """The changes that are left when the static matrices are folded away."""
        folded = {"givens", "n_rotations", "orthogonal", "orthogonality_weight"}
        if not self.polar:
            folded.add("learn_temperature")
        return {name: value for name, value in self.changes().items() if name not in folded}


VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {},
    "nope": {"positions": "none"},
    "layer_bases": {"base_per": "layer", "base_factors": (0.1, 10.0)},
    "head_bases": {"base_per": "head", "base_factors": (0.1, 1.0, 10.0)},
    "multi_scale": {"base_factors": (0.01, 1.0, 100.0)},
    "partial": {"rotary_share": 0.5},
    "frequencies": {"learn_frequencies": True},
    "polar": {"polar": True},
    "position_scale": {"learn_position_scale": True},
    "temperature": {"learn_temperature": True},
    "givens": {"givens": "round_robin"},
    "butterfly": {"givens": "butterfly"},
    "multi_givens": {"givens": "round_robin", "n_rotations": 2},
    "shared_givens": {"givens": "round_robin", "share_layers": True},
    "free": {"orthogonal": "free", "orthogonality_weight": 0.1},
    "cayley": {"orthogonal": "cayley"},
    "exp": {"orthogonal": "exp"},
    "householder": {"orthogonal": "householder"},
    "block": {"givens": "round_robin", "orthogonal": "free", "orthogonality_weight": 0.1},
    "conditional": {"conditional": True},
    "value": {"value_rotation": True},
    "t5": {"bias": "t5"},
    "alibi": {"bias": "alibi"},
    "kerple": {"bias": "kerple"},
    "fire": {"bias": "fire"},
    "xpos": {"xpos": True},
    "linear": {"scaling": "linear"},
    "ntk": {"scaling": "ntk"},
    "dynamic": {"scaling": "dynamic"},
    "yarn": {"scaling": "yarn"},
}


def _factors(numbers: tuple[float, ...]) -> bool:
    return bool(numbers) and all(1e-9 <= each <= 1e9 for each in numbers)


def rotation_names() -> list[str]:
    """Names of the variants; `"+"` combines several."""
    return sorted(VARIANTS)


def parse_rotation(rotation: "str | Mapping[str, Any] | RotationConfig") -> RotationConfig:
    """A rotation from its name, from names joined by `+`, or from the fields themselves.

    Args:
        rotation: Such as `"givens"`, `"givens+t5"`, or `{"variant": "yarn", "scaling_factor": 8}`.

    Raises:
        ValueError: For an unknown name (the message lists the known ones), an unknown field, or
            variants that contradict each other.
    """
    if isinstance(rotation, RotationConfig):
        return rotation
    if isinstance(rotation, str):
        return RotationConfig(**_combined(rotation))
    if not isinstance(rotation, Mapping):
        raise ValueError(f"rotation must be names or fields, got {rotation!r}")
    known = [field.name for field in fields(RotationConfig)]
    own = dict(rotation)
    chosen = _combined(str(own.pop("variant", "rope")))
    for name in own:
        if name not in known:
            raise ValueError(_unknown("rotation field", str(name), [*known, "variant"]))
        own[name] = _as_declared(name, own[name])
    return RotationConfig(**{**chosen, **own})


def _as_declared(name: str, value: Any) -> Any:
    """A field as YAML or JSON gives it, in its own type.

    Raises:
        ValueError: If it is of another.
    """
    plain = getattr(RotationConfig(), name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(plain, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(plain, tuple):
        fits, wanted = isinstance(value, list | tuple), "a list of numbers"
        fits = fits and all(isinstance(each, int | float) for each in value)
        value = tuple(float(each) for each in value) if fits else value
    elif isinstance(plain, float):
        fits, wanted = number, "a number"
        value = float(value) if number else value
    elif name in ("n_rotations", "trained_context"):
        whole = number and math.isfinite(value) and int(value) == value
        value = int(value) if whole else value
        fits, wanted = whole or (value is None and plain is None), "a whole number"
    else:
        fits, wanted = value is None or isinstance(value, str), "a name"
    if not fits:
        raise ValueError(f"rotation: {name} must be {wanted}, got {value!r}")
    return value


def _combined(names: str) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    seen: list[str] = []
    for name in (part.strip() for part in names.split("+")):
        if name not in VARIANTS:
            raise ValueError(_unknown("rotation", name, rotation_names()))
        if name in seen:
            raise ValueError(
                f"rotation {names!r} names {name!r} twice: two passes with a mixing between them "
                f"would no longer depend on relative positions alone"
            )
        seen.append(name)
        for key, value in VARIANTS[name].items():
            if changes.get(key, value) != value:
                raise ValueError(
                    f"rotation {names!r} contradicts itself: {said_by[key]!r} says "
                    f"{key}={changes[key]!r}, {name!r} says {value!r}"
                )
            changes[key], said_by[key] = value, name
    if "rope" in seen and changes.get("positions") == "none":
        raise ValueError(f"rotation {names!r} contradicts itself: 'rope' turns, 'nope' does not")
    return changes


def _unknown(kind: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}. Known: {', '.join(known)}.{hint}"
