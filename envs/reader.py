"""Reads the sequences of a task family for many runs at once."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from envs.tasks import TaskFamily
from models import hashed_integers


class Reader:
    """A family's data on the device, cut into windows of a context and one token more.

    Args:
        family: Whose data.
        context: Tokens that are read of a sequence.
        device: Where they go.
    """

    def __init__(self, family: TaskFamily, context: int, device: torch.device) -> None:
        self.window, self.stride = context + 1, family.stride
        self._tokens = torch.from_numpy(family.data.copy()).to(device)
        self._counted: Tensor | None = None
        if family.counted is not None:
            self._counted = torch.from_numpy(family.counted).to(device)

    def read(
        self, starts: Int[Tensor, "replica batch"]
    ) -> tuple[Int[Tensor, "replica batch window"], Bool[Tensor, "replica batch seq"] | None]:
        """Sequences that begin at some places, and which of their targets count (`None`: all)."""
        tokens = self._windows(self._tokens, starts).long()
        if self._counted is None:
            return tokens, None
        return tokens, self._windows(self._counted, starts)[..., 1:]

    def _windows(self, flat: Tensor, starts: Tensor) -> Tensor:
        every = flat.as_strided((len(flat) - self.window + 1, self.window), (1, 1))
        return every.index_select(0, starts.flatten()).view(*starts.shape, self.window)

    def draw(
        self, first: Int[Tensor, " replica"], n_tokens: Int[Tensor, " replica"], *keys: Tensor
    ) -> Int[Tensor, "replica batch"]:
        """Starts of training sequences, each a function of its keys alone.

        Args:
            first: First training token of each run.
            n_tokens: Its training tokens.
            keys: Broadcast to `[replica, batch]`.
        """
        places = torch.div(n_tokens - self.window, self.stride, rounding_mode="floor") + 1
        return first[:, None] + self.stride * hashed_integers(places[:, None], *keys)
