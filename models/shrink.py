"""Deployment at the width in force: a model without what is inactive, or what can be folded."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.config import TransformerConfig
from models.width import active_along


def shrunk_config(config: TransformerConfig, top: int) -> TransformerConfig:
    """The shape of what is active at a width level; lower levels stay levels.

    Args:
        config: The whole shape.
        top: Index of the level.
    """
    share = config.width_levels[top]
    return _changed(
        config,
        d_model=round(config.d_model * share),
        n_heads=round(config.n_heads * share),
        d_ff=round(config.hidden_units * share),
        width_levels=tuple(level / share for level in config.width_levels[: top + 1]),
    )


def folded_config(config: TransformerConfig) -> TransformerConfig:
    """The shape without the static matrices of its rotation."""
    return _changed(config, rotation=config.rotary.without_static_matrices())


def _changed(config: TransformerConfig, **changes: Any) -> TransformerConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say of the base was said before
        return replace(config, **changes)


def active_parameters(
    parameters: Mapping[str, Tensor], levels: Mapping[str, Tensor], top: int
) -> dict[str, Tensor]:
    """What is active of parameters `[replica, ...]`, by name.

    Args:
        parameters: By name.
        levels: By name: the width level of every element of one replica.
        top: Highest level that is kept.
    """
    kept = {}
    for name, parameter in parameters.items():
        part = parameter.detach()
        active = levels[name] <= top
        for axis in range(active.dim()):
            index = active_along(active, axis).nonzero().flatten()
            part = part.index_select(axis + 1, index)
        kept[name] = part
    return kept


def active_knobs(storage: Mapping[str, Tensor], n_heads: int, top: int) -> dict[str, Tensor]:
    """The buffers behind the knobs, as a model of fewer heads and levels has them."""
    kept = {name: value.clone() for name, value in storage.items()}
    kept["gates"] = kept["gates"][:, : top + 1]
    if kept["log_base"].dim() == 3:  # one base per head
        kept["log_base"] = kept["log_base"][:, :, :n_heads]
    return kept


def common_level(gates: Tensor, width_level: Tensor) -> int:
    """The width level that all replicas are at, with no gate in motion.

    Raises:
        ValueError: If they differ, or a width still fades in or out.
    """
    levels = width_level.unique().tolist()
    if len(levels) != 1:
        raise ValueError(f"Replicas of different widths cannot shrink together, got {levels}")
    wanted = (torch.arange(gates.shape[1], device=gates.device) <= levels[0]).to(gates)
    if not torch.equal(gates, wanted.expand_as(gates)):
        raise ValueError("The width still fades: call knobs.step_gates until gates_moving is False")
    return int(levels[0])
