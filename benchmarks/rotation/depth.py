"""How the gradients of the first and the last layer compare as models grow deeper."""

from dataclasses import replace
from typing import cast

import torch
from torch import nn

from benchmarks.rotation.data import task_data
from benchmarks.rotation.recipes import RECIPES
from benchmarks.rotation.training import Trainer, scores
from models import AdaptiveTransformer

DEPTHS = (2, 4, 8, 16, 32)
ROTATIONS = ("rope", "block")
_STEPS = 20  # of the recipe's warm-up
_BATCH = 4


def gradient_ratios(
    rotation: str, n_layers: int, n_seeds: int, most_steps: int
) -> dict[str, list[float]]:
    """|gradient of the first layer| / |gradient of the last| per seed, on text.

    The gradient is that of a batch's loss by a layer's own weights (not by its rotation's),
    before clipping; at initialisation, and after the first steps of the usual training.
    """
    n_steps = min(_STEPS, most_steps)
    recipe = replace(RECIPES["text"], n_layers=n_layers, batch_size=_BATCH)
    data = task_data("text", recipe, n_seeds, n_steps + 1)
    trainer = Trainer(recipe, rotation, data, recipe.steps)
    report = {"at_initialisation": _ratios(trainer, 0)}
    for index in range(n_steps):
        trainer.step(index)
    report[f"after_{n_steps}_steps"] = _ratios(trainer, n_steps)
    return report


def _ratios(trainer: Trainer, index: int) -> list[float]:
    places = slice(index * _BATCH, (index + 1) * _BATCH)
    tokens, counted = trainer.data.tokens[:, places], trainer.data.counted[:, places]
    losses, _, targets = scores(trainer.model, tokens, counted)
    (losses / targets).sum().backward()
    first, last = _norm(trainer.model, 0), _norm(trainer.model, -1)
    trainer.model.zero_grad()
    ratios: list[float] = (first / last).tolist()
    return ratios


def _norm(model: AdaptiveTransformer, layer: int) -> torch.Tensor:
    block = cast(nn.ParameterDict, model.blocks[layer])
    gradients = [p.grad.flatten(1) for p in block.values() if p.grad is not None]
    return torch.cat(gradients, dim=1).norm(dim=1)
