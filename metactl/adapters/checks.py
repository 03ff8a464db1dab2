"""What `Controller.attach` is given, checked before anything is touched."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from metactl.adapters.base import AttachError

_FLAT = "FullyShardedDataParallel"  # the first generation


def check_attachment(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    total_steps: int | None,
    tokens: tuple[float | None, float | None],
    on_unsupported: str | None,
) -> None:
    """Refuses in words what a controller cannot be attached to."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"model must be a torch module, got {type(model).__name__}")
    hooked = hasattr(optimizer, "_optimizer_step_pre_hooks")  # accelerate's wrapper has none
    if not (isinstance(optimizer, torch.optim.Optimizer) and hooked):
        raise AttachError(
            f"optimizer must be a torch optimizer, got {type(optimizer).__name__}; "
            f"of a wrapper, give the optimizer inside"
        )
    if any(type(module).__name__ == _FLAT for module in model.modules()):
        raise AttachError(
            f"{_FLAT} keeps parameters in flat pieces, of which no norm can be told; "
            f"shard by torch.distributed.fsdp.fully_shard"
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in trained and p.requires_grad for p in model.parameters()):
        raise AttachError("the optimizer trains no parameter of the model")
    if total_steps is not None and not (is_number(total_steps, Integral) and total_steps >= 2):
        raise AttachError(
            f"total_steps must be a whole number of at least 2 optimizer steps, got {total_steps!r}"
        )
    for name, value in zip(("tokens_per_step", "unique_tokens"), tokens, strict=True):
        if value is not None and not (is_number(value, Real) and 0 < value < math.inf):
            raise AttachError(f"{name} must be above 0 tokens and finite, got {value!r}")
    if on_unsupported not in (None, "mask", "raise"):
        raise AttachError(f"on_unsupported must be 'mask' or 'raise', got {on_unsupported!r}")


def is_number(value: Any, kind: type) -> bool:
    """Whether a value is of a kind of `numbers`, Python's or NumPy's; truth values are not."""
    return isinstance(value, kind) and not isinstance(value, bool)
