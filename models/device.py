"""Bringing numbers to where the model lives."""

import torch
from torch import Tensor


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; a GPU that is still busy is not waited for."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
