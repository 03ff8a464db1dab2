"""What the callbacks of all trainers do alike."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from metactl.attach import Controller

logger = logging.getLogger(__name__)


def take_charge(
    controller: Controller,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    total_steps: int | None,
    options: Mapping[str, Any],
) -> bool:
    """Attaches a controller at the beginning of a trainer's run.

    A trainer that was interrupted and starts again still has its controller; it begins anew.

    Returns:
        Whether it is at work: not in mode `"off"`, nor in a run that leaves nothing to decide.

    Raises:
        AttachError: If the run cannot be controlled.
    """
    controller.detach()
    if total_steps is not None and total_steps < 2:
        logger.warning(
            "metactl: a run of %d optimizer steps leaves nothing to decide; the controller is off",
            total_steps,
        )
        return False
    controller.attach(model, optimizer, total_steps=total_steps, **options)
    return controller.mode != "off"
