"""Hugging Face `Trainer`: one callback.

The loss is read where the model returns it, in training mode; so the Trainer's
`logging_nan_inf_filter`, which reports 0.0 or an old loss after a NaN, cannot hide one.
"""

import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from metactl.adapters import AttachError
from metactl.adapters.optimizer import forget_factor
from metactl.attach import Controller, check_trainers_options
from metactl.integrations.trainer import take_charge

logger = logging.getLogger(__name__)


class MetaControlCallback(TrainerCallback, ExportableState):
    """Controls a Trainer's run; resumes with the Trainer's own checkpoints.

    Args:
        policy: Name or folder of a policy, or a controller that is not attached yet.
        options: Of `Controller.attach`; the budget is the Trainer's.

    Raises:
        AttachError: For an option that `attach` does not have.

    Example:
        `Trainer(..., callbacks=[MetaControlCallback("default", mode="shadow")])`
    """

    def __init__(self, policy: str | Path | Controller, **options: Any) -> None:
        check_trainers_options(options)
        self.controller = Controller.of(policy)
        self.options = options
        self._losses: list[Tensor] = []
        self._scaled = False
        self._hook: Any = None
        self._saved: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        if self._hook is not None:
            self._saved = self.controller.state_dict()
        return {"args": {}, "attributes": {"saved": self._saved}}

    @classmethod
    def from_state(cls, state: Any) -> "MetaControlCallback":
        raise AttachError(
            "MetaControlCallback resumes by itself; leave the Trainer's argument "
            "restore_callback_states_from_checkpoint off"
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise AttachError(
                f"the Trainer copies the model to {args.n_gpu} GPUs by nn.DataParallel, which "
                f"cannot be watched; start it by torchrun, or show it one GPU"
            )
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        saved = self._saved_in(state)
        # A run that was begun without the callback: what is left of it is the whole.
        total = state.max_steps if saved else state.max_steps - state.global_step
        again = self._hook is not None
        self._release()
        options = {"compiled": True, **self.options} if args.torch_compile else self.options
        if not take_charge(self.controller, model, optimizer, total, options, again=again):
            return
        if saved:
            self.controller.load_state_dict(saved)
        if self.controller.mode == "off":  # as it was in the checkpoint
            self._saved = saved
            return
        self._hook = model.register_forward_hook(_Noting(self), with_kwargs=True)

    def _saved_in(self, state: TrainerState) -> dict[str, Any] | None:
        """The controller's state in the Trainer's checkpoint, where it was at work there."""
        callbacks: Any = state.stateful_callbacks
        # The Trainer saves only what it finds here, and fails where a checkpoint did not have it.
        kept = callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(kept, list):
            raise AttachError("a Trainer can have one MetaControlCallback, this has several")
        return kept["attributes"]["saved"] if state.global_step else None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._hook is None:
            return
        if not self._losses:
            logger.warning(
                "The controller is off: the model returned no loss (it sees none that is "
                "computed outside the model, as by compute_loss_func or label smoothing)"
            )
            self._finish(restore=True)
            self._saved = self.controller.state_dict()
            return
        total = torch.stack(self._losses).sum()
        # Of counted items, the model divides by those of all processes; the Trainer mends it later.
        share = args.world_size if args.average_tokens_across_devices else 1
        loss = share * total if self._scaled else total / len(self._losses)
        self._losses = []
        self.controller.step(loss)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._hook is not None:
            self._saved = self.controller.state_dict()
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self._return_to(Path(state.best_model_checkpoint))
            self._finish(restore=False)
            optimizer = kwargs["optimizer"]
            forget_factor(getattr(optimizer, "optimizer", optimizer))

    def _finish(self, restore: bool) -> None:
        self._release()
        self.controller.detach(restore=restore)

    def _return_to(self, checkpoint: Path) -> None:
        """The knobs that belong to the weights that the Trainer has just loaded."""
        try:
            kept: Any = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            saved = kept.stateful_callbacks[type(self).__name__]["attributes"]["saved"]
            self.controller.put_knobs(saved)
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning(
                "metactl: the best model's knobs cannot be read from %s (%s); those of the end of "
                "the run stay in force",
                checkpoint,
                error,
            )

    def _release(self) -> None:
        """Looks at the model's outputs no more."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._losses = None, []

    def note(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Keeps a minibatch's loss; it is a share of the step's where the items were counted."""
        loss = output[0] if isinstance(output, tuple) and output else _named_loss(output)
        counts = isinstance(loss, Tensor) and loss.numel() == 1
        if counts and model.training and torch.is_grad_enabled():
            self._scaled = kwargs.get("num_items_in_batch") is not None
            self._losses.append(loss.detach().mean())


class _Noting:
    """Tells a callback of a model's outputs; a copy of the model, such as an average, of none.

    Args:
        callback: Told; it is kept alive by its Trainer.
    """

    def __init__(self, callback: MetaControlCallback | None) -> None:
        self._callback = None if callback is None else weakref.ref(callback)

    def __call__(self, *args: Any) -> None:
        callback = None if self._callback is None else self._callback()
        if callback is not None:
            callback.note(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Noting, (None,)


def _named_loss(output: Any) -> Any:
    """As the Trainer reads it of a mapping, also of one with attributes."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
