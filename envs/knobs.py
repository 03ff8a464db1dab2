"""The knobs of an adaptive transformer, as a controller moves them."""

from collections.abc import Iterable

from metactl.adapters.optimizer import LearningRateKnob, weight_decay_knob
from metactl.knobs import Knob, unknown_name
from models import TransformerConfig

USUAL_KNOBS = ("rope_base", "attention_span", "embedding_width", "dropout")
OPTIMIZER_KNOBS = ("learning_rate_multiplier", "weight_decay")


def knobs_of(
    shape: TransformerConfig, names: Iterable[str], default_dropout: float, weight_decay: float
) -> tuple[Knob, ...]:
    """The named knobs, with the recipe's values as defaults.

    A base where no position turns is left out; any other knob that would move nothing is refused.

    Args:
        shape: The transformer.
        names: Which of them a controller gets.
        default_dropout: Dropout of a run that nobody controls.
        weight_decay: And its weight decay.

    Raises:
        ValueError: For an unknown name, or a knob that this rotation does not have.
    """
    known = {knob.name: knob for knob in _all_knobs(shape, default_dropout, weight_decay)}
    rotary = shape.rotary
    missing = {
        "position_scale": None if rotary.positions == "rope" else "positions that turn",
        "rotation_strength": None if rotary.givens else "a rotation with Givens angles",
        "orthogonality_weight": None if rotary.orthogonal == "free" else "a free matrix",
    }
    chosen = []
    for name in names:
        if name == "weight_decay" and not weight_decay > 0:
            raise ValueError("knob 'weight_decay' needs a weight_decay above 0 to start from")
        if name not in known:
            raise ValueError(unknown_name("knob", name, tuple(known)))
        if missing.get(name):
            raise ValueError(
                f"knob {name!r} needs {missing[name]}, and rotation {shape.rotation!r} has none"
            )
        if name != "rope_base" or rotary.positions == "rope":
            chosen.append(known[name])
    return tuple(chosen)


def _all_knobs(
    shape: TransformerConfig, default_dropout: float, weight_decay: float
) -> tuple[Knob, ...]:
    defaults = {
        "rope_base": shape.rope_base,
        "attention_span": float(shape.context),
        "embedding_width": 1.0,
        "dropout": default_dropout,
        "position_scale": 1.0,
        "rotation_strength": 1.0,
        "orthogonality_weight": min(max(shape.rotary.orthogonality_weight, 1e-3), 10.0),
    }
    ranges = shape.knob_ranges()
    of_model = (Knob(name=n, default=value, **ranges[n]) for n, value in defaults.items())
    decay = (weight_decay_knob(weight_decay),) if weight_decay > 0 else ()
    return (*of_model, LearningRateKnob.knob, *decay)
