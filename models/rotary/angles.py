"""What can be learned about plain RoPE's angles."""

from torch import Tensor

from models.rotary.component import Component, Shape
from models.rotary.config import RotationConfig


class LearnedAngles(Component):
    """Learned changes of plain RoPE; all zero is plain RoPE.

    Args:
        shape: Sizes.
        config: Which of them there are.
        n_layers: Layers with values of their own; 1 shares them.
        n_pairs: Pairs of channels of a head.
    """

    log_frequency: Tensor | None
    log_position_scale: Tensor | None
    log_temperature: Tensor | None
    key_phase: Tensor | None

    def __init__(self, shape: Shape, config: RotationConfig, n_layers: int, n_pairs: int) -> None:
        super().__init__()
        per_head = {"layer": n_layers, "head": shape.n_heads}
        for name, wanted, axes in (
            ("log_frequency", config.learn_frequencies, {**per_head, "pair": n_pairs}),
            ("log_position_scale", config.learn_position_scale, per_head),
            ("log_temperature", config.learn_temperature, per_head),
            ("key_phase", config.polar, {**per_head, "pair": n_pairs}),
        ):
            if wanted:
                self.add(name, shape, **axes)
            else:
                self.register_parameter(name, None)
