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
    *,
    again: bool,
) -> bool:
    """Attaches a controller at the beginning of a trainer's run.

    Args:
        controller: Who is to decide.
        model: The trainer's.
        optimizer: The trainer's.
        total_steps: Optimizer steps of the run, where they are known.
        options: Of `Controller.attach`.
        again: The callback attached it before, and the trainer was interrupted: it begins anew.

    Returns:
        Whether it is at work: not in mode `"off"`, nor in a run that leaves nothing to decide.

    Raises:
        AttachError: If the run cannot be controlled.
    """
    if again:
        controller.detach()
    if total_steps is not None and total_steps < 2:
        logger.warning(
            "metactl: a run of %d optimizer steps leaves nothing to decide; the controller is off",
            total_steps,
        )
        return False
    controller.attach(model, optimizer, total_steps=total_steps, **options)
    return controller.mode != "off"
