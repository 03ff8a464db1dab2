"""Agreement between the processes of a data-parallel run: all see the same, all do the same."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from metactl.knobs import FloatArray
from metactl.run import Measurement


class Ranks:
    """The processes that train one model together; one, where there is no process group.

    Args:
        device: Where the group's backend takes its tensors from.
    """

    def __init__(self, device: torch.device) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.n, self.rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)
        self._device = device

    def gather(self, values: Sequence[float]) -> FloatArray:
        """Everybody's values, `[n_ranks, n_values]`."""
        if self.n == 1:
            return np.array([values], dtype=np.float64)
        own = torch.tensor(values, dtype=torch.float64, device=self._device)
        everybody = [torch.empty_like(own) for _ in range(self.n)]
        dist.all_gather(everybody, own)
        return torch.stack(everybody).cpu().numpy()

    def require(self, error: Exception | None) -> None:
        """Raises in all processes if one of them failed, so that none waits for another."""
        failed = self.gather([float(error is not None)])[:, 0]
        if error is not None:
            raise error
        if failed.any():
            raise RuntimeError(f"the controller failed in process {int(failed.argmax())}")

    def mean(self, measurement: Measurement) -> Measurement:
        """The measurement of the run as a whole.

        A loss that is not finite anywhere is not finite; other fields are averaged where known.
        """
        if self.n == 1:
            return measurement
        fields = {k: v for k, v in measurement.arrays().items() if k != "diverged"}
        own = [np.nan if value is None else float(value[0]) for value in fields.values()]
        probe = list(fields).index("probe_loss")
        if measurement.probe_loss is not None and not np.isfinite(own[probe]):
            own[probe] = np.inf  # measured, where NaN is not
        rows = self.gather(own)
        known = np.isfinite(rows)
        sums = np.where(known, rows, 0.0).sum(axis=0)
        means = np.where(known.any(axis=0), sums / np.maximum(known.sum(axis=0), 1), np.nan)
        averaged = {
            name: None if value is None and not known[:, i].any() else means[i : i + 1]
            for i, (name, value) in enumerate(fields.items())
        }
        loss = rows[:, list(fields).index("train_loss")].mean(keepdims=True)
        averaged["train_loss"] = loss
        if np.isinf(rows[:, probe]).any():
            averaged["probe_loss"] = np.array([np.inf])
        return Measurement(diverged=~np.isfinite(loss), **averaged)  # type: ignore[arg-type]
