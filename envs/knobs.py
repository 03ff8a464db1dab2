"""The knobs of an adaptive transformer, as a controller moves them."""

from collections.abc import Iterable

from metactl.adapters.optimizer import LearningRateKnob, weight_decay_knob
from metactl.errors import unknown_name
from metactl.knobs import Knob
from models import TransformerConfig

USUAL_KNOBS = ("rope_base", "attention_span", "embedding_width", "dropout")
OPTIMIZER_KNOBS = ("learning_rate_multiplier", "weight_decay")


def knobs_of(
    shape: TransformerConfig, names: Iterable[str], default_dropout: float, weight_decay: float
) -> tuple[Knob, ...]:
    """The named knobs, with the recipe's values as defaults.

    A base that would move nothing (where no position turns, or one pair alone: base^0 is 1) is left
    out; any other such knob is refused.

    Args:
        shape: The transformer.
        names: Which of them a controller gets.
        default_dropout: Dropout of a run that nobody controls.
        weight_decay: And its weight decay.

    Raises:
        ValueError: For an unknown name, a knob that this rotation does not have, a default outside
            the knob's range, or if no knob is left.
    """
    names = tuple(names)
    known = {knob.name: knob for knob in _all_knobs(shape, default_dropout, weight_decay)}
    rotary = shape.rotary
    missing = {
        "position_scale": None if rotary.positions == "rope" else "positions that turn",
        "rotation_strength": None if rotary.givens else "a rotation with Givens angles",
        "orthogonality_weight": None if rotary.orthogonal == "free" else "a free matrix",
    }
    chosen = []
    several = rotary.polar or rotary.rotary_channels(shape.head_dim) > 2  # frequencies
    base_matters = rotary.positions == "rope" and several
    weight, of_weight = rotary.orthogonality_weight, known["orthogonality_weight"]
    for name in names:
        if (
            name == "orthogonality_weight"
            and rotary.orthogonal == "free"
            and not of_weight.low <= weight <= of_weight.high
        ):
            raise ValueError(
                f"knob 'orthogonality_weight' needs one in [{of_weight.low:g}, "
                f"{of_weight.high:g}] to start from, got {weight:g}"
            )
        if name == "weight_decay" and not weight_decay > 0:
            raise ValueError("knob 'weight_decay' needs a weight_decay above 0 to start from")
        if name not in known:
            raise ValueError(unknown_name("knob", name, tuple(known)))
        if missing.get(name):
            raise ValueError(
                f"knob {name!r} needs {missing[name]}, and rotation {shape.rotation!r} has none"
            )
        if name != "rope_base" or base_matters:
            chosen.append(known[name])
    if not chosen:
        left = " that moves something (a base does not, where nothing turns)" * bool(names)
        raise ValueError(f"knobs must name at least one knob{left}, got {list(names)}")
    return tuple(chosen)


def _all_knobs(
    shape: TransformerConfig, default_dropout: float, weight_decay: float
) -> tuple[Knob, ...]:
    ranges = shape.knob_ranges()
    low, high = (ranges["orthogonality_weight"][end] for end in ("low", "high"))
    defaults = {
        "rope_base": shape.rope_base,
        "attention_span": float(shape.context),
        "embedding_width": 1.0,
        "dropout": default_dropout,
        "position_scale": 1.0,
        "rotation_strength": 1.0,
        "orthogonality_weight": min(max(shape.rotary.orthogonality_weight, low), high),
    }
    of_model = (Knob(name=n, default=value, **ranges[n]) for n, value in defaults.items())
    decay = (weight_decay_knob(weight_decay),) if weight_decay > 0 else ()
    return (*of_model, LearningRateKnob.knob, *decay)
