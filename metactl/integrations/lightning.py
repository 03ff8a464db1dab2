"""Lightning `Trainer`: one callback."""

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from metactl.adapters import AttachError
from metactl.adapters.optimizer import forget_factor
from metactl.attach import Controller, check_trainers_options
from metactl.integrations.trainer import take_charge
from metactl.meter import gradient_norm

logger = logging.getLogger(__name__)
_PATIENCE = 64  # batches without a loss before something must be wrong


class MetaControlCallback(lightning.Callback):
    """Controls a Lightning run; resumes with Lightning's own checkpoints.

    Args:
        policy: Name or folder of a policy, or a controller that is not attached yet.
        options: Of `Controller.attach`; the budget is the Trainer's.

    Raises:
        AttachError: For an option that `attach` does not have.

    Example:
        `lightning.Trainer(..., callbacks=[MetaControlCallback("default")])`
    """

    def __init__(self, policy: str | Path | Controller, **options: Any) -> None:
        check_trainers_options(options)
        self.controller = Controller.of(policy)
        self.options = options
        self._norm: Tensor | None = None
        self._pending: dict[str, Any] | None = None
        self._active, self._skipped = False, 0

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        if stage == "fit":  # another one begins anew; a checkpoint's state comes after this
            self._pending = None

    def state_dict(self) -> dict[str, Any]:
        if self._active:
            self._pending = self.controller.state_dict()
        return {"controller": self._pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict["controller"]

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if len(trainer.optimizers) != 1:
            raise AttachError(
                f"a run of one optimizer can be controlled, this has {len(trainer.optimizers)}"
            )
        steps = trainer.estimated_stepping_batches
        pending = self._pending
        # A run that was begun without the callback: what is left of it is the whole.
        begun = 0 if pending else trainer.global_step
        total = int(steps) - begun if math.isfinite(steps) and steps > 0 else None
        optimizer = trainer.optimizers[0]
        compiled = getattr(pl_module, "_compiler_ctx", None) is not None
        options = {"compiled": True, **self.options} if compiled else self.options
        self._active = take_charge(
            self.controller, pl_module, optimizer, total, options, again=self._active
        )
        if self._active and pending is not None:
            self.controller.load_state_dict(pending)
            self._active = self.controller.mode != "off"  # as it was in the checkpoint

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if self._active:  # before clipping
            with contextlib.suppress(Exception):  # the controller measures one itself, then
                self._norm = gradient_norm(pl_module.parameters())

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._active:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:  # a batch that the module skipped
            self._skipped += 1
            if self._skipped == _PATIENCE:
                logger.warning(
                    "metactl: training_step has returned no loss for %d batches, so nothing is "
                    "decided; return it, also where you optimize by hand",
                    _PATIENCE,
                )
            return
        norm, self._norm, self._skipped = self._norm, None, 0
        self.controller.step(loss * trainer.accumulate_grad_batches, gradient_norm=norm)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if self._active:
            self._pending, self._active = self.controller.state_dict(), False
            self.controller.detach(restore=False)
            forget_factor(trainer.optimizers[0])
