"""The rotation of a model: its parts, put together once per forward pass."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.rotary.angles import LearnedAngles
from models.rotary.bias import build_bias
from models.rotary.component import Component, Shape
from models.rotary.conditional import ConditionalAngles, accumulated
from models.rotary.config import RotationConfig
from models.rotary.frequencies import scaled_frequencies, xpos_gain, yarn_temperature
from models.rotary.givens import GivensRotations
from models.rotary.orthogonal import OrthogonalMatrix, orthogonality_defect
from models.rotary.pairs import at_least_float32, without_autocast
from models.rotary.turning import RotaryPass


class Rotary(nn.Module):
    """Turns queries and keys so that their product carries relative position.

    Tables that depend on nothing but the base are built by `refresh`, which the model calls when
    a knob moved and never otherwise. What is learned is built once per forward pass, for all
    layers together. Matrices that do not depend on tokens are multiplied into the projections,
    so they cost the same for any number of tokens.

    Args:
        config: Which parts there are.
        shape: Sizes.
    """

    table: Tensor

    def __init__(self, config: RotationConfig, shape: Shape) -> None:
        super().__init__()
        config.check_shape(shape.head_dim, shape.context)
        self.config, self.shape = config, shape
        n_layers = 1 if config.share_layers else shape.n_layers
        self.n_pairs = shape.head_dim if config.polar else shape.head_dim // 2
        self.learned = LearnedAngles(shape, config, n_layers, self.n_pairs)
        self.givens = self.orthogonal = self.conditional = self.relative = None
        if config.givens is not None:
            self.givens = GivensRotations(shape, config.givens, config.n_rotations, n_layers)
        if config.orthogonal is not None:
            self.orthogonal = OrthogonalMatrix(shape, config.orthogonal, n_layers)
        if config.conditional:
            self.conditional = ConditionalAngles(shape, self.n_pairs, n_layers)
        if config.bias is not None:
            trained = config.trained_on(shape.context)
            self.relative = build_bias(config.bias, shape, n_layers, trained)
        self.register_buffer("table", torch.zeros(0, device=shape.device), persistent=False)
        self._log_base = self._position_scale = torch.zeros(0)

    def components(self) -> dict[str, Component]:
        """The parts with parameters, by attribute name."""
        return {name: m for name, m in self.named_children() if isinstance(m, Component)}

    @torch.no_grad()
    def initialise(self, row: int, generator: torch.Generator) -> None:
        """Draws fresh parameters for one replica."""
        for component in self.components().values():
            component.initialise(row, generator)

    def levels(self, head: Tensor, channel: Tensor) -> dict[str, Tensor]:
        """Width levels of all parameters; see `Component.levels`."""
        return {
            f"{prefix}.{name}": level
            for prefix, component in self.components().items()
            for name, level in component.levels(head, channel).items()
        }

    # Angles ----------------------------------------------------------------------------------

    def base_shape(self) -> tuple[int, ...]:
        """Shape of one replica's `log_base`: none, per layer, or per layer and head."""
        sizes = {"replica": 0, "layer": 1, "head": 2}[self.config.base_per]
        return (self.shape.n_layers, self.shape.n_heads)[:sizes]

    def refresh(self, log_base: Tensor, position_scale: Float[Tensor, " replica"]) -> None:
        """Takes over the knobs that turn positions, and rebuilds the table where it is fixed.

        Args:
            log_base: `[replica]`, `[replica, layer]` or `[replica, layer, head]`.
            position_scale: Multiplier of the positions.
        """
        precise = at_least_float32(log_base)
        self._log_base = precise.view(*precise.shape, *(1,) * (3 - precise.dim()))
        self._position_scale = position_scale.to(precise)
        if self._fixed():
            with torch.no_grad():
                turn = self._turn(torch.arange(self.shape.context, device=precise.device))
            table = torch.view_as_real(turn)
            if table.shape == self.table.shape and table.dtype == self.table.dtype:
                self.table.copy_(table)
            else:
                self.table = table

    def _fixed(self) -> bool:
        """Whether the turn of a position depends on the knobs alone."""
        config = self.config
        learned = config.learn_frequencies or config.learn_position_scale
        return config.positions == "rope" and not learned and config.scaling != "dynamic"

    def _turn(self, positions: Tensor) -> Tensor:
        """exp(i * position * scale * inv_freq), `[replica, layer, seq, head, pair]`."""
        angles = self._positions(positions) * self._frequencies(len(positions))[:, :, None]
        return torch.complex(angles.cos(), angles.sin())

    def _positions(self, positions: Tensor) -> Tensor:
        scale = self._position_scale.view(-1, 1, 1, 1, 1)
        own = self.learned.log_position_scale
        if own is not None:
            scale = scale * at_least_float32(own).exp()[:, :, None, :, None]
        return positions.to(self._log_base)[:, None, None] * scale

    def _frequencies(self, seq: int) -> Tensor:
        """Radians per position, `[replica, layer, head, pair]`; 0 where a pair does not turn."""
        config, shape = self.config, self.shape
        log_base = self._log_base
        factors = config.base_factors
        if factors != (1.0,):
            per_layer = config.base_per == "layer"
            n = shape.n_layers if per_layer else shape.n_heads
            each = [log_base.new_full((1,), factors[i % len(factors)]) for i in range(n)]
            spread = torch.cat(each).log()
            log_base = log_base + (spread[:, None] if per_layer else spread)
            log_base = log_base.clamp(min=0.0)  # a base below 1 would turn later pairs faster
        channels = config.rotary_channels(shape.head_dim) * (2 if config.polar else 1)
        trained = config.trained_on(shape.context)
        frequencies = scaled_frequencies(
            log_base, channels, config.scaling, config.scaling_factor, trained, seq
        )
        frequencies = F.pad(frequencies, (0, self.n_pairs - frequencies.shape[-1]))
        own = self.learned.log_frequency
        return frequencies if own is None else frequencies * at_least_float32(own).exp()

    # One forward pass ------------------------------------------------------------------------

    def prepare(self, seq: int, strength: Float[Tensor, " replica"], offset: int = 0) -> RotaryPass:
        """What the layers need at positions offset .. seq - 1.

        Args:
            seq: Tokens of the sequence so far, those at hand included.
            strength: Multiplier of the Givens angles.
            offset: Tokens before those at hand (kept in a cache).
        """
        positions = torch.arange(seq, device=self.table.device)
        turn: Tensor | None = None
        if self._fixed():
            turn = torch.view_as_complex(self.table)[:, :, offset:seq]
        elif self.config.positions == "rope":
            turn = self._turn(positions)[:, :, offset:]
        with without_autocast(self.table.device):  # what is orthogonal stays so
            query, key = self._matrices(strength)
        by_distance = bias = None
        if self.relative is not None:
            precise = positions.to(self._log_base)
            if offset or not self.relative.by_distance_up_to(seq):
                bias = self.relative(precise[offset:], precise)
            else:
                by_distance = self.relative.at_distance(precise)
        gain = self._gain(positions[offset:].to(self._log_base))
        return RotaryPass(turn, gain, query, key, by_distance, bias)

    def _matrices(self, strength: Tensor) -> tuple[Tensor | None, Tensor | None]:
        matrix: Tensor | None = None
        if self.givens is not None:
            matrix = self.givens(strength)
        if self.orthogonal is not None:
            r = self.orthogonal()
            matrix = r if matrix is None else matrix @ r
        temperature = self.learned.log_temperature
        if temperature is None or self.config.polar:
            return matrix, matrix
        factor = at_least_float32(temperature).exp()[..., None, None]
        if matrix is None:
            matrix = torch.eye(self.shape.head_dim, dtype=factor.dtype, device=factor.device)
            return factor * matrix, None
        return factor * matrix, matrix

    def _gain(self, positions: Tensor) -> Tensor | None:
        gain: Tensor | None = None
        if self.config.xpos:
            turning = self.config.rotary_channels(self.shape.head_dim) // 2
            turning *= self.n_pairs // (self.shape.head_dim // 2)
            query = xpos_gain(positions - self.shape.context // 2, turning)
            query = F.pad(query, (0, self.n_pairs - turning), value=1.0)
            gain = torch.stack((query, 1 / query), dim=1)[None, None, :, :, None]
        if self.config.scaling == "yarn":
            temperature = yarn_temperature(self.config.scaling_factor)
            root = positions.new_full((1,) * 6, temperature) ** 0.5
            gain = root if gain is None else gain * root
        if self.learned.key_phase is not None:
            phase = at_least_float32(self.learned.key_phase)[:, :, None]
            query_angle = torch.zeros_like(phase)
            angle = torch.stack((query_angle, phase), dim=3)
            polar = torch.complex(angle.cos(), angle.sin())
            if self.learned.log_temperature is not None:
                warm = at_least_float32(self.learned.log_temperature).exp()[:, :, None, :, None]
                warm = torch.stack((warm, torch.ones_like(warm)), dim=3)
                polar = polar * warm
            gain = polar if gain is None else polar * gain
        return gain

    def conditional_angles(
        self,
        x: Float[Tensor, "replica token d_model"],
        layer: int,
        n_heads: int,
        batch: int,
        before: Tensor | None,
    ) -> Float[Tensor, "replica batch seq head pair"] | None:
        """Accumulated angles of a layer's tokens, if the rotation has them.

        Args:
            x: What enters the layer's attention.
            layer: Which layer.
            n_heads: Active heads.
            batch: Sequences that the tokens belong to.
            before: The angles at the token before these, if they continue a sequence.
        """
        if self.conditional is None:
            return None
        increments = self.conditional.increments(x, layer, n_heads)
        return accumulated(increments.unflatten(1, (batch, -1)), before)

    def extends(self, before: int, seq: int) -> bool:
        """Whether what was computed for `before` tokens still holds in a sequence of `seq`."""
        trained = self.config.trained_on(self.shape.context)
        return self.config.scaling != "dynamic" or max(before, trained) == max(seq, trained)

    def penalty(self, gate: Float[Tensor, "replica head"]) -> Float[Tensor, " replica"]:
        """||R R^T - I||_F^2 averaged over the model's rotations; 0 where R cannot leave them.

        Args:
            gate: How far each head is open; closed ones do not count.
        """
        if self.orthogonal is None or self.orthogonal.parametrisation != "free":
            return torch.zeros_like(self._position_scale)
        with without_autocast(self.table.device):
            defect = orthogonality_defect(self.orthogonal()).mean(1)
        return (defect * gate).sum(1) / gate.sum(1)
