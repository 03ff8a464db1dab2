"""The knobs of an adaptive transformer, as a controller moves them."""

from collections.abc import Iterable

from metactl.knobs import Knob, unknown_name
from models import TransformerConfig

USUAL_KNOBS = ("rope_base", "attention_span", "embedding_width", "dropout")


def knobs_of(
    shape: TransformerConfig, names: Iterable[str], default_dropout: float
) -> tuple[Knob, ...]:
    """The named knobs, with the recipe's values as defaults.

    A base where no position turns is left out; any other knob that would move nothing is refused.

    Args:
        shape: The transformer.
        names: Which of them a controller gets.
        default_dropout: Dropout of a run that nobody controls.

    Raises:
        ValueError: For an unknown name, or a knob that this rotation does not have.
    """
    known = {knob.name: knob for knob in _all_knobs(shape, default_dropout)}
    rotary = shape.rotary
    missing = {
        "position_scale": None if rotary.positions == "rope" else "positions that turn",
        "rotation_strength": None if rotary.givens else "a rotation with Givens angles",
        "orthogonality_weight": None if rotary.orthogonal == "free" else "a free matrix",
    }
    chosen = []
    for name in names:
        if name not in known:
            raise ValueError(unknown_name("knob", name, tuple(known)))
        if missing.get(name):
            raise ValueError(
                f"knob {name!r} needs {missing[name]}, and rotation {shape.rotation!r} has none"
            )
        if name != "rope_base" or rotary.positions == "rope":
            chosen.append(known[name])
    return tuple(chosen)


def _all_knobs(shape: TransformerConfig, default_dropout: float) -> tuple[Knob, ...]:
    return (
        Knob(
            name="rope_base", low=4.0, high=1e6, default=shape.rope_base, scale="log2", unit="base"
        ),
        Knob(
            name="attention_span",
            low=min(4.0, shape.context / 2),
            high=float(shape.context),
            default=float(shape.context),
            scale="log2",
            unit="tokens",
        ),
        Knob(
            name="embedding_width",
            low=shape.width_levels[0],
            high=1.0,
            default=1.0,
            scale="levels",
            levels=shape.width_levels,
            max_move=1.0,  # every change of width is a shock: at most once across in a run
            unit="fraction",
        ),
        Knob(
            name="dropout",
            low=0.0,
            high=0.6,
            default=default_dropout,
            scale="linear",
            unit="probability",
        ),
        Knob(name="position_scale", low=0.125, high=8.0, default=1.0, scale="log2", unit="factor"),
        Knob(
            name="rotation_strength",
            low=0.0,
            high=2.0,
            default=1.0,
            scale="linear",
            unit="factor",
        ),
        Knob(
            name="orthogonality_weight",
            low=1e-3,
            high=10.0,
            default=min(max(shape.rotary.orthogonality_weight, 1e-3), 10.0),
            scale="log2",
            unit="weight",
        ),
    )
