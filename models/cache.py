"""Keys and values of a sequence so far, so that generating a token costs one position."""

import torch
from torch import Tensor


class KeyValueCache:
    """What attention needs of the tokens already seen; one per sequence that is continued.

    It notes the knobs' version it was computed at: after a knob moved, keys and values of every
    layer are stale (not only their angles), and the model computes them afresh from the tokens.
    It does not notice new weights: an optimizer step needs a new cache.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None  # [replica, batch, seq]
        self.version = -1
        self._layers: list[tuple[Tensor, Tensor, Tensor | None]] = []

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return 0 if self.tokens is None else self.tokens.shape[2]

    def clear(self) -> None:
        self.tokens = None
        self._layers = []

    def append_tokens(self, tokens: Tensor, version: int) -> None:
        self.version = version
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), dim=2)

    def last_angles(self, layer: int) -> Tensor | None:
        """Accumulated angles at the last token seen, `[replica, batch, head, pair]`."""
        return self._layers[layer][2] if layer < len(self._layers) else None

    def append(
        self, layer: int, k: Tensor, v: Tensor, angles: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Adds a layer's keys and values `[replica, batch, head, seq, dim]`; returns all."""
        last = None if angles is None else angles[:, :, -1]
        if layer == len(self._layers):
            self._layers.append((k, v, last))
        else:
            old_k, old_v, _ = self._layers[layer]
            k, v = torch.cat((old_k, k), dim=3), torch.cat((old_v, v), dim=3)
            self._layers[layer] = (k, v, last)
        return k, v
