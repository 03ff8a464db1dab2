"""What goes on inside a model, as a few numbers per replica: optional signals for a controller."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

DORMANT = 0.025  # share of its layer's mean activation up to which a unit is dormant
_OPEN = 1e-3  # a gate that has closed may keep a remainder


class Watch:
    """Collects, over the layers of one forward pass, what `signals` then reports."""

    def __init__(self) -> None:
        self._entropies: list[Tensor] = []
        self._dormant: list[Tensor] = []
        self._stable_rank: Tensor | None = None

    def attention(
        self,
        q: Float[Tensor, "replica batch head query qk_dim"],
        k: Float[Tensor, "replica batch head key qk_dim"],
        bias: Float[Tensor, "replica bias_head query key"],
        head_dim: int,
        gates: Float[Tensor, "replica head"],
    ) -> None:
        """Entropy of the weights of one layer, as a share of the largest that there can be.

        Queries that see a single key say nothing; heads count by their gates.
        """
        logits = q @ k.transpose(-1, -2) / math.sqrt(head_dim) + bias[:, None]
        entropy = torch.special.entr(torch.softmax(logits, dim=-1)).sum(-1)
        n_keys = torch.isfinite(bias).sum(-1)[:, None]  # [replica, 1, bias_head, query]
        several = n_keys > 1
        share = torch.where(several, entropy / n_keys.clamp(min=2).log(), 0.0)
        counted = several.expand_as(share).to(share).sum(3)
        by_head = (share.sum(3) / counted.clamp(min=1)).mean(1)
        self._entropies.append((by_head * gates).sum(1) / gates.sum(1))

    def hidden(
        self, h: Float[Tensor, "replica token unit"], gate: Float[Tensor, "replica 1 unit"]
    ) -> None:
        """Share of a layer's active units that hardly ever answer (arXiv 2302.12902)."""
        active = gate[:, 0] > _OPEN
        score = torch.where(active, h.abs().mean(1), 0.0)
        n_active = active.sum(1, keepdim=True)
        silent = active & (score <= DORMANT * score.sum(1, keepdim=True) / n_active)
        self._dormant.append(silent.to(h).sum(1) / n_active[:, 0])

    def final(self, x: Float[Tensor, "replica token channel"]) -> None:
        """Stable rank of the final representations: ||X||_F^2 / ||X||_2^2, at least 1."""
        gram = (x.transpose(1, 2) @ x).double()
        total = gram.diagonal(dim1=1, dim2=2).sum(1)
        sound = torch.isfinite(total)  # no decomposition of what diverged
        gram = torch.where(sound[:, None, None], gram, 0.0)
        largest = torch.linalg.eigvalsh(gram)[:, -1]
        self._stable_rank = torch.where(sound, total / largest.clamp(min=1e-30), torch.nan)

    def signals(self) -> dict[str, Float[Tensor, " replica"]]:
        """`attention_entropy` and `dormant_fraction` in [0, 1], `stable_rank` from 1."""
        assert self._stable_rank is not None
        return {
            "attention_entropy": torch.stack(self._entropies).mean(0),
            "dormant_fraction": torch.stack(self._dormant).mean(0),
            "stable_rank": self._stable_rank,
        }


def noise_scale(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None]
) -> Float[Tensor, " replica"]:
    """Gradient noise scale in batches (arXiv 1812.06162, appendix A.1), from two half batches.

    The share of the squared norm of the whole batch's gradient that is noise over the share that is
    signal, at most 100: beyond, this estimate is noise itself.

    Args:
        first: Gradients by parameter, `[replica, ...]`, over one half of a batch.
        second: Over the other half.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    halves = torch.stack(
        [(a.flatten(1).square().sum(1) + b.flatten(1).square().sum(1)) / 2 for a, b in pairs]
    ).sum(0)
    whole = torch.stack([((a + b) / 2).flatten(1).square().sum(1) for a, b in pairs]).sum(0)
    signal = (2 * whole - halves).clamp(min=0.01 * halves)
    return (halves - whole) / signal
