"""What the rotation does to trained queries and keys: their norms, and how features correlate."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models import AdaptiveTransformer
from models.layers import Pass, attention, embed, feed_forward, normalise
from models.rotary import LayerTurn, fold

Pair = dict[str, Tensor]
_SEED = 0x0F7
_TINY = 1e-6


@torch.no_grad()
def geometry(model: AdaptiveTransformer, tokens: Tensor) -> dict[str, list[float]]:
    """Norm changes and correlations of every replica on test sequences.

    Three places are looked at: the *projection* (queries and keys as the weights make them), the
    *block* (after the static matrices: Givens products, R, temperature) and *turned* (after the
    positions). Norm changes are |block or turned| / |projection| - 1 in absolute value, the
    greatest over tokens, heads and layers. Correlations are between the features of a head, over
    tokens; the absolute values off the diagonal are averaged over heads and layers.

    `correlation_random` is that of the projection turned by one random rotation per head: what
    any rotation does that has learned nothing.
    """
    seen = _queries_and_keys(model, tokens)
    report: dict[str, list[float]] = {}
    for kind in ("query", "key"):
        before = torch.stack([layer[f"{kind}_projection"] for layer in seen])
        for place in ("block", "turned"):
            after = torch.stack([layer[f"{kind}_{place}"] for layer in seen])
            change = after.norm(dim=-1) / before.norm(dim=-1).clamp(min=_TINY) - 1
            report[f"{kind}_norm_change_{place}"] = _greatest(change.abs())
    for place in ("projection", "block", "turned", "random"):
        values = [
            correlation(layer[f"{kind}_{place}"]) for layer in seen for kind in ("query", "key")
        ]
        report[f"correlation_{place}"] = torch.stack(values).mean(0).tolist()
    return report


def _greatest(change: Float[Tensor, "layer replica token head"]) -> list[float]:
    greatest: list[float] = change.amax((0, 2, 3)).tolist()
    return greatest


def correlation(features: Float[Tensor, "replica token head dim"]) -> Float[Tensor, " replica"]:
    """Mean absolute correlation between different features of a head, averaged over heads."""
    x = features.double().transpose(1, 2)
    x = x - x.mean(dim=2, keepdim=True)
    x = x / x.norm(dim=2, keepdim=True).clamp(min=_TINY)
    between = (x.transpose(2, 3) @ x).abs()
    dim = between.shape[-1]
    off_diagonal = between.sum((2, 3)) - between.diagonal(dim1=2, dim2=3).sum(2)
    return (off_diagonal / (dim * (dim - 1))).mean(1)


def _queries_and_keys(model: AdaptiveTransformer, tokens: Tensor) -> list[Pair]:
    """Per layer, `[replica, token, head, dim]` at every place, along a forward pass."""
    generator = torch.Generator().manual_seed(_SEED)
    size = (model.config.n_heads, model.config.head_dim, model.config.head_dim)
    random = torch.linalg.qr(torch.randn(size, generator=generator)).Q
    state = model._prepare(tokens, None, None)
    x = embed(tokens.flatten(1), model.embedding, state)
    seen = []
    for layer, module in enumerate(model.blocks):
        block = cast(nn.ParameterDict, module)
        y = normalise(x, state)
        seen.append(_places(y, block, state, layer, random))
        x = x + attention(y, block, state, layer)
        x = x + feed_forward(normalise(x, state), block, state)
    return seen


def _places(y: Tensor, block: nn.ParameterDict, state: Pass, layer: int, random: Tensor) -> Pair:
    heads = state.n_heads
    weight = block["qkv"] * block["attention_norm"][..., None]

    def queries_keys(weight: Tensor) -> Tensor:
        return torch.bmm(y, weight).unflatten(2, (3, heads, -1))[:, :, :2]

    projection = queries_keys(weight)
    matrices = queries_keys(fold(weight, state.rotary, layer, heads))
    angles = state.rotation.conditional_angles(y, layer, heads, state.batch, None)
    turn = LayerTurn(state.rotary, layer, heads, angles, state.config.rotary.polar)
    turned = turn.queries_keys(matrices.unflatten(1, (state.batch, -1))).flatten(1, 2)
    places = {
        "projection": projection,
        "block": matrices,
        "turned": turned,
        "random": torch.einsum("ntqhd,hde->ntqhe", projection, random),
    }
    return {
        f"{kind}_{place}": both[:, :, i]
        for place, both in places.items()
        for i, kind in enumerate(("query", "key"))
    }
