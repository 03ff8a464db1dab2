"""Whether runs fit into a device's memory, said before anything is allocated."""

import math
import os

import torch

from envs.run_config import RunConfig
from models.flops import matrix_weights


def require_memory(config: RunConfig, n_runs: int) -> None:
    """Refuses runs that certainly do not fit; others may still turn out not to.

    Raises:
        MemoryError: If their matrices with gradients and both moments of AdamW, and the logits of a
            batch, are more than the device has.
    """
    shape = config.transformer()
    weights = int(matrix_weights(shape))
    logits = config.batch_size * config.context * shape.vocab_size
    needed = n_runs * (4 * weights + logits) * getattr(torch, config.dtype).itemsize
    there = _total_bytes(torch.device(config.device))
    if needed > there:
        raise MemoryError(
            f"{n_runs:,} run{'s' * (n_runs > 1)} of at least {weights:,} parameters, in batches of "
            f"{config.batch_size:,} times {config.context:,} tokens: needs {needed / 1e9:,.1f} GB "
            f"or more, and {config.device!r} has {there / 1e9:,.1f} GB"
        )


def _total_bytes(device: torch.device) -> float:
    """Memory of a device; infinite where it cannot be asked."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf
