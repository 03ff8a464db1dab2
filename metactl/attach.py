"""A controller on somebody else's training run."""

import contextlib
import inspect
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metactl.adapters import KNOWN, AttachError, KnobAdapter, find_adapters
from metactl.adapters.base import ModelKnob, unwrapped
from metactl.adapters.checks import check_attachment, is_number
from metactl.attachment import STATE_VERSION, Attachment, Given
from metactl.controllers import BaseController, Learned
from metactl.decision import Decision
from metactl.errors import unknown_name
from metactl.homeostasis import SetPoints
from metactl.log import Log
from metactl.meter import require_number
from metactl.policy import Policy

__all__ = ["MODES", "Controller", "Decision"]

logger = logging.getLogger(__name__)

MODES = ("act", "shadow", "off")
_TRAINERS = ("model", "optimizer", "total_steps")  # what a trainer's callback knows by itself
_controlled: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()
_at_work: "weakref.WeakValueDictionary[int, BaseController]" = weakref.WeakValueDictionary()
_moved: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()
"""The knobs of each model, and of nothing else, that controllers move now."""


class Controller:
    """Watches a training run and moves its knobs, from within the training loop.

    In mode `"shadow"` it decides and logs, and moves nothing; in mode `"off"` it does nothing. In
    both the run is bit for bit what it would be alone.

    Args:
        controller: Who decides: a policy, or any controller of `metactl.controllers`.
        n_control_steps: Control steps of a run, at least 2; by default the policy's, else 40.
        strict: Raise what goes wrong in a control step, instead of switching off with a warning.

    Raises:
        TypeError: If `controller` is neither.
        ValueError: If `n_control_steps` is no whole number of at least 2.

    Example:
        >>> import numpy as np
        >>> from metactl.controllers import Schedule
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> half_way = Schedule(np.array([0.0, 1.0]), np.array([[0.5], [0.5]]))
        >>> controller = Controller(half_way, n_control_steps=2)
        >>> controller.attach(
        ...     model, optimizer, total_steps=4, knobs=["dropout"], example=torch.ones(1, 4)
        ... )
        >>> for _ in range(4):
        ...     loss = model(torch.ones(1, 4)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     decision = controller.step(loss=loss)
        ...     if decision is not None:
        ...         print(decision.step, round(model[1].p, 2))
        2 0.3
    """

    def __init__(
        self,
        controller: BaseController | Policy,
        *,
        n_control_steps: int | None = None,
        strict: bool = False,
    ) -> None:
        self._set_points: SetPoints | None = None
        if isinstance(controller, Policy):
            self._set_points = controller.card.set_points
            if n_control_steps is None:
                n_control_steps = controller.card.n_control_steps
            controller = Learned(controller)
        if not isinstance(controller, BaseController):
            raise TypeError(
                f"controller must be a policy or a controller, got {controller!r}; a policy's "
                f"folder or name is for Controller.from_pretrained"
            )
        self.n_control_steps = 40 if n_control_steps is None else n_control_steps
        if not (is_number(self.n_control_steps, Integral) and self.n_control_steps >= 2):
            raise ValueError(
                f"n_control_steps must be a whole number of at least 2, got {n_control_steps!r}"
            )
        self.controller, self.strict = controller, strict
        self._run: Attachment | None = None
        self._warned = False
        self._attached = False  # also in mode "off", where there is no run
        self._held: tuple[set[str], set[str]] = (set(), set())  # of the model; of them, one's own

    @property
    def mode(self) -> str:
        """`"act"` or `"shadow"` while attached, else `"off"`."""
        if self._run is None:
            return "off"
        return "act" if self._run.act else "shadow"

    @classmethod
    def from_pretrained(cls, policy: str | Path, **options: Any) -> "Controller":
        """A controller by a policy.

        Args:
            policy: Folder of a policy, as `metactl train` leaves it, or the name of one that
                ships: `"default"`.
            options: Of the constructor.

        Raises:
            PolicyError: If there is none, or it is damaged.
        """
        return cls(Policy.load(policy), **options)

    @classmethod
    def of(cls, policy: "str | Path | Controller") -> "Controller":
        """A controller as it is, or one by a policy."""
        return policy if isinstance(policy, Controller) else cls.from_pretrained(policy)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int | None = None,
        probe: Callable[[], float | Tensor] | None = None,
        tokens_per_step: float | None = None,
        unique_tokens: float | None = None,
        mode: str = "act",
        knobs: Sequence[str | KnobAdapter] | None = None,
        on_unsupported: str | None = None,
        example: Any = None,
        compiled: bool | None = None,
        log: Any = None,
    ) -> None:
        """Takes charge of a training run; every knob is tried first, and put back.

        Args:
            model: The model.
            optimizer: The one that trains it; its own object, without wrappers.
            total_steps: Optimizer steps of the whole run; estimated where not known.
            probe: Returns the loss on a few fixed held-out batches, in nats per token. It is called
                with the model in evaluation mode, without gradients, at control steps only.
            tokens_per_step: Tokens of one optimizer step.
            unique_tokens: Distinct training tokens that there are.
            mode: `"act"`, `"shadow"` or `"off"`.
            knobs: Names or adapters of the knobs to move; by default those that the policy knows.
            on_unsupported: What becomes of a knob that this run does not have: `"mask"` leaves it
                out with a warning, `"raise"` refuses. By default asked-for knobs raise.
            example: An input of the model, for trying knobs; token ids by default.
            compiled: Whether the model runs through `torch.compile`, where that does not show: a
                trainer compiles it, or you attach what is inside.
            log: A TensorBoard `SummaryWriter`, or a function of (tag, value, step).

        Raises:
            AttachError: If the run cannot be controlled as asked.
        """
        _check_values(mode, probe)
        if self._run is not None:
            raise AttachError("this controller is attached already; detach it first")
        if mode == "off":
            self._attached = True
            return
        if _at_work.get(id(self.controller)) is self.controller:
            raise AttachError("this rule is at work in another run; make one for each")
        if optimizer in _controlled:
            raise AttachError("this optimizer has a controller already; detach that one first")
        written = Log(log, strict=self.strict)
        tokens = (tokens_per_step, unique_tokens)
        check_attachment(model, optimizer, total_steps, tokens, on_unsupported)
        adapters = self._find(knobs, model, optimizer, on_unsupported, example, compiled)
        held = {name for name, adapter in adapters.items() if isinstance(adapter, ModelKnob)}
        others = _moved.setdefault(unwrapped(model), set())
        try:
            if mode == "act" and held & others:
                raise AttachError(
                    f"another controller moves {', '.join(sorted(held & others))} of this model; "
                    f"give each its own by knobs="
                )
            self._run = Attachment(
                self.controller,
                adapters,
                model,
                optimizer,
                Given(total_steps, probe, *tokens),
                act=mode == "act",
                n_control_steps=self.n_control_steps,
                log=written,
                set_points=self._set_points,
                strict=self.strict,
            )
            self._attached = True
            _controlled.add(optimizer)
            _at_work[id(self.controller)] = self.controller
            self._held = (others, held if mode == "act" else set())
            others |= self._held[1]
        except Exception as error:
            for adapter in adapters.values():
                adapter.close()
            if isinstance(error, ValueError):
                raise AttachError(str(error)) from error
            raise

    def step(
        self, loss: Tensor | float, gradient_norm: Tensor | float | None = None
    ) -> Decision | None:
        """Call it after every minibatch (and after `optimizer.step()` where there was one).

        Args:
            loss: The minibatch's training loss, in nats per token.
            gradient_norm: Of the optimizer step just taken, before clipping; for runs that clip.

        Returns:
            A decision at control steps, else None.

        Raises:
            TypeError: If one of them is not one number.
        """
        if self._run is None:
            if not self._attached and not self._warned:
                self._warned = True
                logger.warning("metactl: step before attach: nothing is controlled")
            return None
        require_number("loss", loss)
        if gradient_norm is not None:
            require_number("gradient_norm", gradient_norm)
        try:
            self._run.note(loss, gradient_norm)
            return self._run.step()
        except Exception:
            if self.strict:
                raise
            logger.warning(
                "metactl: the controller failed and is off; the run goes on", exc_info=True
            )
            self.detach(restore=False)
            return None

    def detach(self, restore: bool = True) -> None:
        """Lets go of the run.

        Args:
            restore: Put the knobs back to what they were at `attach`; else they stay.
        """
        if self._run is not None:
            run, self._run = self._run, None
            _controlled.discard(run.optimizer)
            _at_work.pop(id(self.controller), None)
            others, held = self._held
            others -= held
            run.close(restore=restore)

    def __del__(self) -> None:
        """Who can no longer be asked lets go; the knobs stay."""
        with contextlib.suppress(Exception):  # such as in the middle of an interpreter's end
            self.detach(restore=False)

    def state_dict(self) -> dict[str, Any]:
        """All that determines how the controller goes on, as JSON values."""
        if self._run is None:
            return {"version": STATE_VERSION, "mode": "off"}
        return self._run.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; `attach` to the same kind of run comes first.

        Raises:
            AttachError: If the state is of another version, damaged, or of another run, or if
                nothing was attached yet.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != STATE_VERSION:
            raise AttachError(f"state has version {version!r}; this metactl reads {STATE_VERSION}")
        if not self._attached:
            raise AttachError("attach comes before load_state_dict")
        if self._run is None:
            return
        if state.get("mode") == "off":
            logger.warning(
                "metactl: in the run of this state the controller was off, and it stays off; to "
                "begin anew, attach without loading a state"
            )
            self.detach()
            return
        self._run.load_state_dict(state)

    def put_knobs(self, state: Mapping[str, Any]) -> None:
        """Puts the knobs of an earlier state of this run in force, as for its best checkpoint.

        Raises:
            AttachError: If nothing is attached, or the state has other knobs.
        """
        if self._run is None:
            raise AttachError("put_knobs needs a run that is attached")
        self._run.put_knobs(state)

    def _find(
        self,
        knobs: Sequence[str | KnobAdapter] | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        on_unsupported: str | None,
        example: Any,
        compiled: bool | None,
    ) -> dict[str, KnobAdapter]:
        missing: dict[str, str] = {}
        wanted: Sequence[str | KnobAdapter] = KNOWN if knobs is None else knobs
        if knobs is None and isinstance(self.controller, Learned):
            names = [knob.name for knob in self.controller.policy.card.knobs]
            missing = {n: "no way to move it in this model" for n in names if n not in KNOWN}
            wanted = [name for name in names if name in KNOWN]
        found, refused = find_adapters(wanted, model, optimizer, example, compiled)
        missing |= refused
        strict = knobs is not None if on_unsupported is None else on_unsupported == "raise"
        if not found or (missing and strict):
            for adapter in found:
                adapter.close()
            raise AttachError(f"cannot move {_listed(missing) or 'anything: knobs is empty'}")
        if missing:
            everything = knobs is None and not isinstance(self.controller, Learned)
            level = logging.INFO if everything else logging.WARNING
            logger.log(level, "metactl leaves alone what it cannot move: %s", _listed(missing))
        by_name = {adapter.knob.name: adapter for adapter in found}
        if isinstance(self.controller, Learned):
            moved = [knob.name for knob in self.controller.policy.card.knobs]
            still = [name for name in by_name if name not in moved]
            if still:
                logger.warning(
                    "metactl: the policy never moves %s, which it did not learn to; it moves %s",
                    *(", ".join(names) for names in (still, moved)),
                )
        return by_name


def check_trainers_options(options: Mapping[str, Any]) -> None:
    """Refuses what a trainer's callback cannot give to `Controller.attach`, before there is a run.

    Raises:
        AttachError: With the option, and what it may be.
    """
    parameters = inspect.signature(Controller.attach).parameters
    known = [name for name in parameters if name not in ("self", *_TRAINERS)]
    for name in options:
        if name in _TRAINERS:
            raise AttachError(f"{name} is the trainer's: leave it out")
        if name not in known:
            raise AttachError(unknown_name("option", name, known))
    _check_values(**{name: options[name] for name in ("mode", "probe") if name in options})


def _check_values(mode: str = "act", probe: Any = None) -> None:
    """Refuses values that are wrong whatever the model is."""
    if mode not in MODES:
        raise AttachError(unknown_name("mode", str(mode), MODES))
    if probe is not None and not callable(probe):
        raise AttachError(f"probe must be a function that returns a loss, got {probe!r}")


def _listed(missing: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in missing.items())
